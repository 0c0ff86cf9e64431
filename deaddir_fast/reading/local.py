"""A model at a point, ready for local readings: outputs, exact Fisher split, relaxed jets."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.fisher.jacobian import (
    ROW_BLOCK,
    Spectrum,
    decompose,
    whitened_coefficients,
    whitened_jacobian,
)
from deaddir_fast.fisher.range_finder import find_range
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.degree import polynomial_degree
from deaddir_fast.nets.graph import (
    batch_size,
    call_model,
    check_deterministic,
    readable_attention,
)
from deaddir_fast.nets.jet import JetProgram, kink_notes
from deaddir_fast.nets.space import ParameterSpace

DENSE_PARAMETERS = 4096  # up to here the Jacobian is formed,
DENSE_ENTRIES = 250_000_000  # if it has at most this many entries
MATRIX_FREE_RANK = 1024  # beyond, the live space is looked for up to this dimension
REPLICAS = 2  # perturbed propagations, of opposite sign, that measure rounding
MARGIN = 30.0  # a coefficient is zero below this many times the change they make
AMBIGUOUS = 100.0  # and present above this many times that; nothing is claimed in between


def in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A copy of the model and its inputs in fp64; integer inputs stay."""
    double = copy.deepcopy(model).double()
    double.requires_grad_(False)
    cast = pytree.tree_map(
        lambda x: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x,
        inputs,
    )
    return double, cast


def first_orders(coefficients: Tensor, noise: Tensor) -> list[float | None]:
    """First degree >= 1 whose coefficient (order+1, p, N) is above its noise (order+1, p)."""
    norms = coefficients.norm(dim=-1)
    found: list[float | None] = []
    for p in range(norms.shape[1]):
        order: float | None = float("inf")
        for degree in range(1, norms.shape[0]):
            size, level = float(norms[degree, p]), float(noise[degree, p])
            if size > AMBIGUOUS * level:
                order = float(degree)
                break
            if size > level:
                order = None
                break
        found.append(order)
    return found


@dataclass(frozen=True)
class RelaxedJets:
    """Outputs along curves θ0 + t·u + live corrections, the live equations solved.

    Attributes:
        residual: (order+1, p, N) whitened Taylor coefficients left after relaxing; those of degree
            0 and 1 vanish up to rounding.
        straight: (order+1, p, N) the same along the straight line θ0 + t·u.
        noise: (order+1, p) rounding level of the norm of a residual coefficient.
        corrections: (order+1, p, d) Taylor coefficients of the live corrections.
        notes: what the jets met on the way (kinks, operators without a rule).
    """

    residual: Tensor
    straight: Tensor
    noise: Tensor
    corrections: Tensor
    notes: tuple[str, ...]

    def orders(self) -> list[float | None]:
        """Per curve the KL order: first degree above rounding, inf if none, None if unclear."""
        return first_orders(self.residual, self.noise)


@dataclass
class Spent:
    """Network evaluations in units of one plain forward over all inputs.

    A Taylor propagation to order q along one curve counts as the (q+1)(q+2)/2 products of
    coefficients it may need in every linear map.
    """

    forwards: float = 0.0

    def jets(self, curves: int, order: int, copies: int = 1) -> None:
        """Count a propagation of ``curves`` curves."""
        self.forwards += curves * copies * (order + 1) * (order + 2) / 2


class LocalModel:
    """A model at a point θ0 of its parameters, taken as the truth, in fp64.

    Args:
        model: any module in evaluation mode; copied, never changed.
        inputs: a tensor, a tuple or a dict of tensors; the sample dimension leads.
        likelihood: a name or a ``Likelihood``.
    """

    def __init__(self, model: nn.Module, inputs: Any, likelihood: Any) -> None:
        check_deterministic(model)
        self.likelihood = likelihoods.get(likelihood)
        self.samples = batch_size(inputs)
        if self.samples == 0:
            raise ValueError("inputs: expected at least one sample, got none")
        self.model, self.inputs = in_double(model, inputs)
        for name, value in self.model.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"model: parameter {name} holds NaN or infinite values")
        self.space = ParameterSpace.of(self.model)
        if self.space.dimension == 0:
            raise _check.fail("model", type(model).__name__, "a model with parameters")
        self.program = JetProgram(self.model, self.inputs)
        self.spent = Spent()
        self.degree = polynomial_degree(self.program.captured)
        self.state = {k: v.detach() for k, v in self.model.named_parameters()}
        self._set_outputs()

    def _set_outputs(self) -> None:
        self.outputs = call_model(self.model, self.state, self.inputs).detach()
        if not bool(torch.isfinite(self.outputs).all()):
            raise ValueError("model: its outputs on these inputs hold NaN or infinite values")

    def at(self, theta: Tensor) -> LocalModel:
        """The same model at other parameters (d,), which become the truth; nothing is retraced."""
        moved = copy.copy(self)
        for cached in ("jacobian", "spectrum"):
            moved.__dict__.pop(cached, None)
        moved.state = self.space.directions(theta.detach().clone())
        moved._set_outputs()
        return moved

    @cached_property
    def jacobian(self) -> Tensor:
        """(N, d) whitened Jacobian at θ0."""
        return self.jacobian_at(self.theta)

    def jacobian_at(self, theta: Tensor, *, metric: bool = True) -> Tensor:
        """(N, d) whitened Jacobian at ``theta``, in the metric of its own outputs or of θ0's."""
        self.spent.jets(self.space.dimension, 1)
        outputs = None if metric else self.outputs
        found = whitened_jacobian(
            self.program,
            self.space,
            self.likelihood,
            base=self.space.directions(theta),
            outputs=outputs,
        )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                "model: its outputs have no finite derivative at these parameters (a square root, "
                "a norm or a division at zero?)"
            )
        return found

    @cached_property
    def kinked(self) -> bool:
        """Whether outputs have a kink at θ0: one-sided derivatives that differ."""
        generator = torch.Generator().manual_seed(5)
        d = self.space.dimension
        draws = torch.randn(4, d, dtype=torch.float64, generator=generator) / d**0.5
        curves = {k: v[None] for k, v in self.space.directions(draws).items()}
        right = self.program.run(curves, 1, base=self.state)
        if not bool(right.kinks.any()):
            return False
        left = self.program.run(curves, 1, side=-1, base=self.state)
        a, b = right.coefficients[1], left.coefficients[1]
        return float((a - b).norm()) > 1e-9 * max(float(a.norm()), float(b.norm()))

    @cached_property
    def spectrum(self) -> Spectrum:
        """Live and dead directions at θ0."""
        if self.dense:
            return decompose(self.jacobian)
        return find_range(
            self.push, self.pull, self.rows, self.space.dimension, limit=MATRIX_FREE_RANK
        )

    @property
    def rows(self) -> int:
        """N, the number of output equations."""
        return self.outputs.numel()

    @property
    def dense(self) -> bool:
        """Whether the whole Jacobian is formed."""
        d = self.space.dimension
        return d <= DENSE_PARAMETERS and d * self.rows <= DENSE_ENTRIES

    def push(self, vectors: Tensor) -> Tensor:
        """(k, d) directions -> (k, N) whitened output tangents B v."""
        curves = {k: v[None] for k, v in self.space.directions(vectors).items()}
        self.spent.jets(vectors.shape[0], 1)
        jet = self.program.run(curves, 1, base=self.state)
        return self.whiten(jet.coefficients[1])

    def tangents_at(self, theta: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (n, *out) at ``theta`` and their derivatives (k, n, *out) along (k, d)."""
        if vectors.shape[0] == 0:
            return self.outputs_at(theta), self.outputs.new_zeros(0, *self.outputs.shape)
        self.spent.jets(vectors.shape[0], 1)
        base = self.space.directions(theta)
        outputs, parts = self.outputs, []
        for block in vectors.split(ROW_BLOCK):
            curves = {k: v[None] for k, v in self.space.directions(block).items()}
            jet = self.program.run(curves, 1, base=base)
            outputs, tangents = jet.coefficients[0][0], jet.coefficients[1]
            parts.append(tangents)
        return outputs, torch.cat(parts)

    def pull(self, cotangents: Tensor) -> Tensor:
        """(k, N) cotangents -> (k, d) products Bᵀ w, one backward pass each."""
        self.spent.forwards += 1 + 2 * cotangents.shape[0]
        leaves = {k: v.clone().requires_grad_() for k, v in self.state.items()}
        with torch.enable_grad(), readable_attention():
            rows = self.whiten(call_model(self.model, leaves, self.inputs))
        out = []
        for w in cotangents:
            grads = torch.autograd.grad(
                rows, list(leaves.values()), w, retain_graph=True, allow_unused=True
            )
            filled = [
                torch.zeros_like(v) if g is None else g
                for g, v in zip(grads, leaves.values(), strict=True)
            ]
            out.append(torch.cat([g.reshape(-1) for g in filled]))
        return torch.stack(out)

    @property
    def theta(self) -> Tensor:
        """(d,) parameters at θ0 as a vector."""
        return torch.cat([self.state[k].reshape(-1) for k in self.space.names])

    def residuals(self, theta: Tensor) -> Tensor:
        """(N,) whitened difference of the outputs at ``theta`` from those at θ0 (base metric)."""
        return self.whiten(self.outputs_at(theta) - self.outputs)

    def outputs_at(self, theta: Tensor) -> Tensor:
        """(n, *out) outputs at ``theta``."""
        self.spent.forwards += 1
        return call_model(self.model, self.space.directions(theta), self.inputs)

    def residual_floor(self) -> float:
        """Rounding of the norm of :meth:`residuals` at θ0."""
        plain = whitened_coefficients(self.outputs, self.outputs, self.likelihood)
        rms = float(self.outputs.square().mean().sqrt())
        spread = self.likelihood.whiten(self.outputs, torch.ones_like(self.outputs))
        size = float(plain.norm()) + rms * float(spread.norm()) / self.samples**0.5
        return 64 * torch.finfo(torch.float64).eps * size

    def whiten(self, coefficients: Tensor, outputs: Tensor | None = None) -> Tensor:
        """(..., n, *out) -> (..., N) in the metric at θ0, or that of other outputs (n, *out)."""
        outputs = self.outputs if outputs is None else outputs
        return whitened_coefficients(coefficients, outputs, self.likelihood)

    def relaxed_jets(
        self, vectors: Tensor, order: int, *, side: int = 1, uncertainty: float = 0.0
    ) -> RelaxedJets:
        """Taylor coefficients along dead vectors with the live coordinates solved out.

        With B = U S Vᵀ at θ0, the live coordinates y(t) are the power series with
        Uᵀ f(θ0 + t·u + V y(t)) = 0; they exist and are analytic because S is invertible. What is
        left, (1 − U Uᵀ) f, generates with the live coordinates the ideal of f, so
        λ = r/2 + λ(residual) (lines through dead space that are only tangent to a curved fibre
        become flat). One power of t is gained per pass.

        Args:
            vectors: (p, d) unit vectors in the dead space.
            order: highest degree.
            side: +1 or −1, the side of a kink (piecewise models).
            uncertainty: how far the vectors may be off; what such an error explains is rounding.
        """
        split = self.spectrum
        p, rank = vectors.shape[0], split.rank
        # Rounding: the whole computation again for vectors turned by the digits that the split
        # into live and dead loses, and every number perturbed by its last digits.
        loss = self._loss
        both = torch.cat([vectors, self._turned(vectors, max(loss, uncertainty))])
        corrections = torch.zeros(order + 1, 2 * p, self.space.dimension, dtype=torch.float64)
        inverse = (split.left / split.values[:rank]).T  # (r, N)
        (straight,), notes = self._rows(both, None, order, side, 0)
        rows, removed = straight, straight.norm(dim=-1)
        for degree in range(2, order + 1):
            step = -(rows[degree] @ inverse.T) @ split.live.T
            if rank and float(step.abs().max()) > 0:
                corrections[degree] += step
                (rows,), _ = self._rows(both, corrections[: degree + 1], order, side, 0)
                removed = torch.maximum(removed, rows.norm(dim=-1))
        residual = self._off_live(rows)
        changes = [(residual[:, p:] - residual[:, :p]).norm(dim=-1), loss * removed[:, :p]]
        corrections = corrections[:, :p]
        (_, *copies), _ = self._rows(vectors, corrections, order, side, REPLICAS)
        changes += [self._off_live(c - rows[:, :p]).norm(dim=-1) for c in copies]
        noise = MARGIN * torch.stack(changes).amax(0)
        return RelaxedJets(residual[:, :p], straight[:, :p], noise, corrections, notes)

    def line_orders(self, vectors: Tensor, order: int) -> list[float | None]:
        """KL orders of straight lines along (p, d) unit vectors.

        A computed dead vector is off by the digits the split loses; coefficients that such an
        error explains count as zero.
        """
        p = vectors.shape[0]
        both = torch.cat([vectors, self._turned(vectors, self._loss)])
        (rows, *copies), _ = self._rows(both, None, order, 1, 1)
        changes = [(c - rows)[:, :p].norm(dim=-1) for c in copies]
        changes += [(rows[:, p:] - rows[:, :p]).norm(dim=-1)]
        rows = rows[:, :p]
        noise = MARGIN * torch.stack(changes).amax(0)
        noise = torch.maximum(noise, MARGIN * torch.finfo(torch.float64).eps * rows.norm(dim=-1))
        noise[1] = noise[1].clamp_min(MARGIN * self.spectrum.tolerance)
        return first_orders(rows, noise)

    @property
    def _loss(self) -> float:
        """How far a computed dead vector may be off."""
        split = self.spectrum
        condition = float(split.values[0] / split.values[split.rank - 1]) if split.rank else 1.0
        return 8 * torch.finfo(torch.float64).eps * condition

    @staticmethod
    def _turned(vectors: Tensor, angle: float) -> Tensor:
        """Unit vectors turned at random by a small angle."""
        generator = torch.Generator().manual_seed(3)
        turn = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
        return vectors + angle * turn / turn.norm(dim=1, keepdim=True)

    def curve_coefficients(self, curves: Tensor, order: int, replicas: int = 0) -> list[Tensor]:
        """Whitened coefficients along curves (q, p, d) of t^1..t^q, and perturbed copies of them.

        Each is (order+1, p, N); the perturbed ones show the rounding.
        """
        padded = torch.cat([torch.zeros_like(curves[:1]), curves])
        return self._rows(torch.zeros_like(curves[0]), padded, order, 1, replicas)[0]

    def curve_orders(self, curves: Tensor, order: int) -> tuple[list[int], tuple[str, ...]]:
        """Orders of the outputs along curves of any degree, and what the jets met on the way.

        Args:
            curves: (q+1, p, d) coefficients of t^0..t^q, the first of them ignored; q <= order.
            order: highest degree.

        Returns:
            per curve the first degree whose coefficient is not below its rounding, ``order`` + 1
            if there is none.
        """
        (rows, *copies), notes = self._rows(
            curves[1], torch.cat([curves[:1], 0 * curves[1:2], curves[2:]]), order, 1, REPLICAS
        )
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                "model: its outputs have no finite Taylor coefficients along these curves (a "
                "square root, a norm or a division at zero?)"
            )
        change = torch.stack([(c - rows).norm(dim=-1) for c in copies]).amax(0)
        level = MARGIN * torch.maximum(change, torch.finfo(torch.float64).eps * rows.norm(dim=-1))
        present = rows.norm(dim=-1) > level
        present[0] = False
        found = torch.where(present.any(0), present.int().argmax(0), order + 1)
        return found.tolist(), notes

    def _off_live(self, rows: Tensor) -> Tensor:
        """The part of (..., N) output patterns that live directions cannot produce."""
        left = self.spectrum.left
        return rows - (rows @ left) @ left.T

    def _rows(
        self,
        vectors: Tensor,
        corrections: Tensor | None,
        order: int,
        side: int,
        replicas: int,
    ) -> tuple[list[Tensor], tuple[str, ...]]:
        """(order+1, p, N) whitened coefficients along curves, and perturbed copies of them."""
        curves = self._curve(vectors, corrections)
        if corrections is None:
            self.program.check(curves, order, side, self.state)
        self.spent.jets(vectors.shape[0], order, replicas + 1)
        shape = (order + 1, vectors.shape[0], *self.outputs.shape)
        results = [torch.zeros(shape, dtype=torch.float64) for _ in range(replicas + 1)]
        notes: dict[str, None] = {}
        met: dict[str, int] = {}
        for block in self.program.blocks(curves, order, side, base=self.state, replicas=replicas):
            for result, series in zip(results, [block.exact, *block.perturbed], strict=True):
                for degree, value in enumerate(series[1:], 1):
                    if value is not None:
                        result[degree, block.curves, block.samples] = value
            notes.update(dict.fromkeys(block.notes))
            for label, count in block.kinks.items():
                met[label] = met.get(label, 0) + int(count.sum())
        rows = [self.whiten(result) for result in results]
        return rows, tuple(notes) + kink_notes(met, side)

    def _curve(self, vectors: Tensor, corrections: Tensor | None) -> dict[str, Tensor]:
        curve = vectors[None]
        if corrections is not None and corrections.shape[0] > 1:
            curve = corrections[1:].clone()
            curve[0] += vectors
        return self.space.directions(curve)

"""A moving frame: the group elements that take a state to a normal form of its orbit.

For a gauge group G a frame is a map from states to elements with frame(h θ) = h frame(θ) (up to
rotations inside GL blocks, phases and signs, which are isometries). What is measured after moving
back by the frame does not depend on where on its orbit a state lies: the metric

    <x, y>_θ = <A x, A y>,   A = differential of the inverse frame element at θ,

is G-invariant, and orthogonality, gradients and flows in it project to Θ/G ("Dead Directions",
arXiv 2606.05957, on the quotient; the choice of the frame is ours: the path-norm frame).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State, spread
from deaddir_fast.gauge.batch_norm import Norm, NormRescaling
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.entries import (
    Axes,
    Hold,
    Keep,
    Multiplicative,
    blocks,
    counts,
    folded,
    holds,
    in_turn,
    kept,
    norms_of,
    squares,
    translations_in_turn,
    undivided,
)
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.rescaling import Rescaling
from deaddir_fast.gauge.shift import ClassShift, Translation

Move = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Step:
    """One gauge's part of a frame: the element that leads from the normal form, and back."""

    gauge: Gauge
    element: Tensor
    inverse: Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame at a state; made by :func:`frame`.

    Attributes:
        state: the state it was made at.
        normal: the state moved back by the frame: the same for all of an orbit, but for rotations
            of GL blocks, phases and signs. Where scales pass through batch norms in evaluation mode
            it has γ s for γ and β − γ s μ for β, which such scales leave alone.
        steps: the gauges' parts, in the order in which they lead to ``normal``.
        norms: these batch norms.
        remarks: for each gauge under which the frame is not, or not fully, equivariant, why.
    """

    state: State
    normal: dict[str, Tensor]
    steps: tuple[Step, ...]
    norms: tuple[Norm, ...]
    remarks: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names that :meth:`push` needs or changes, in the order of the state."""
        touched = {n for s in self.steps for n in read_by(s.gauge)}
        return tuple(n for n in self.state if n in touched)

    @property
    def factors(self) -> dict[str, tuple[tuple[Axes, Tensor], ...]]:
        """{name: ((axes, (size,) vector), ...)}: the diagonal frame f as products along axes.

        f_e = product of the vectors' entries; f_e(h θ) = |s_e(h)| f_e(θ) where a rescaling h
        multiplies θ_e by s_e(h), a complex one its pair. Only these; names that none of them
        moves are missing, and what a scale shifts besides (the bias of a batch norm) is left out.
        Axes are one, or those that a stack indexes together, flattened in ``vector``.
        """
        out: dict[str, tuple[tuple[Axes, Tensor], ...]] = {}
        for step in self.steps:
            if isinstance(step.gauge, Rescaling | ComplexRescaling):
                complex_ = isinstance(step.gauge, ComplexRescaling)
                size = step.element.norm(dim=-1) if complex_ else step.element
                for s in step.gauge.slots:
                    vector = spread(size**s.exponent, s.unit_of(), 1.0)
                    out[s.parameter] = (*out.get(s.parameter, ()), (s.axes, vector))
        return out

    def tensor(self, name: str) -> Tensor:
        """The diagonal frame of one parameter, of its shape: ``factors`` multiplied out.

        Raises:
            ValueError: ``name`` is not in the state, or a GL block mixes its entries, so that no
                diagonal frame is equivariant.
        """
        if name not in self.state:
            raise ValueError(f"name: no parameter called {name!r} in the state")
        w = self.state[name]
        for step in self.steps:
            if isinstance(step.gauge, GeneralLinear) and name in step.gauge.parameters:
                raise ValueError(
                    f"name: {name!r} has no diagonal frame, {step.gauge.name} mixes it"
                )
        out = torch.ones_like(w)
        for axes, vector in self.factors.get(name, ()):
            out = out * vector.to(w).reshape([s if a in axes else 1 for a, s in enumerate(w.shape)])
        return out

    def push(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A x: directions at ``state`` -> at ``normal``, {name: (p, *shape)} each way."""
        return self._batched(directions, self._push)

    def pull(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`push`."""
        return self._batched(directions, self._pull)

    def gradient(self, covector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient in the invariant metric, (AᵀA)⁻¹ g, from the Euclidean one.

        Args:
            covector: {name: tensor of the parameter's shape}; a missing parameter is zero.
        """
        if not self.steps:
            return dict(covector)
        zeros = {n: torch.zeros_like(self.state[n]) for n in self.parameters}
        back = torch.func.vjp(self._pull, zeros)[1]
        (lowered,) = back({n: covector.get(n, z) for n, z in zeros.items()})
        return {**covector, **self._pull(lowered)}

    def _batched(self, directions: Mapping[str, Tensor], move: Move) -> dict[str, Tensor]:
        p = next((v.shape[0] for v in directions.values()), 0)
        full = {
            n: directions[n]
            if n in directions
            else self.state[n].new_zeros(p, *self.state[n].shape)
            for n in self.parameters
        }
        return {**directions, **(torch.vmap(move)(full) if full and p else full)}

    def _push(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        adding, multiplying = self._parts()
        for step in adding:
            x = _differential(step.gauge, x, step.inverse)
        x = folded(x, self.norms)
        for step in multiplying:
            x = _differential(step.gauge, x, step.inverse)
        return x

    def _pull(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        adding, multiplying = self._parts()
        for step in reversed(multiplying):
            x = _differential(step.gauge, x, step.element)
        for norm in self.norms:
            x = {**x, **norm.unfold(x)}
        for step in reversed(adding):
            x = _differential(step.gauge, x, step.element)
        return x

    def _parts(self) -> tuple[list[Step], list[Step]]:
        """Steps that add, which come first, and steps that multiply."""
        parts: tuple[list[Step], list[Step]] = ([], [])
        for step in self.steps:
            parts[isinstance(step.gauge, Multiplicative)].append(step)
        return parts


def read_by(gauge: Gauge) -> tuple[str, ...]:
    """Parameters that decide how a gauge acts or are moved by it."""
    extra = [r.weight for r in gauge.readers] if isinstance(gauge, Translation) else []
    return tuple(dict.fromkeys([*gauge.parameters, *extra]))


def _differential(gauge: Gauge, x: dict[str, Tensor], element: Tensor) -> dict[str, Tensor]:
    """Derivative along x of ``act(·, element)``: all actions here are affine in the state.

    Scales through batch norms act in ``folded`` coordinates.
    """
    if isinstance(gauge, Translation):
        out = dict(x)
        for reader in gauge.readers:
            out[reader.bias] = out[reader.bias] - reader.response(x[reader.weight], element)
        return out
    if isinstance(gauge, ClassShift):
        return x
    return {**x, **_multiplied(gauge, x, element)}


def _multiplied(gauge: Gauge, x: State, element: Tensor) -> dict[str, Tensor]:
    if isinstance(gauge, NormRescaling):
        return Rescaling._act(gauge, x, element)
    return gauge._act(x, element)


def frame(state: State, gauges: Sequence[Gauge]) -> Frame:
    """The path-norm frame of a state.

    Gauges that add come first. A translation is undone by the bias it shifts (b -> 0, readers'
    biases become effective ones, c -> c + W b), a class shift by the mean over classes. Then
    rescalings and GL blocks, each from the entries of its writers as the gauges before it have
    left them, i.e. measured in the frame of what they read:

    - rescaling: φ_j is the root mean square of unit j's writer entries (bias included), so that
      φ_j² ∝ Σ_i (W_ji φ_i)² + b_j²; with exponent e an entry's square counts as its 1/e-th power.
      Behind a batch norm in evaluation mode that passes scales of its input on, its γ and β count
      as γ s and β − γ s μ, which those only scale;
    - complex rescaling: the same over the entries of both units of a pair, with phase 0: phases
      are isometries of the metric, like signs;
    - GL block: a root of the Gram matrix, S = mean of columns w wᵀ of the writers, element L with
      S = L Lᵀ. It transforms under the whole of GL(d), S -> C S Cᵀ.

    Fall-backs: entries that would need the gauge itself (a layer shared between its own units) or
    a gauge that is still to come are left out; where no writer is left, or they are zero (of
    deficient rank, for GL), readers take their place, inversely; units that neither determines
    wait for the gauges around them. A unit with nothing but zeros reads 1. A GL block that neither
    writers nor readers span has a non-compact isotropy group, hence no invariant metric whatsoever:
    it gets a multiple of the identity, equivariant under rotations and scalings only, and a remark.
    Where the rank of a writer is within rounding of deficient, so is the frame. Permutations have
    no orbits to move along and take no part.

    Args:
        state: parameter name to tensor. Norms are taken in fp64.
        gauges: as returned by ``find``; leave out those of another likelihood.

    Raises:
        ValueError: a parameter is missing from ``state`` or not finite.
        TypeError: a kind of gauge that has no frame.
    """
    for gauge in gauges:
        if not isinstance(gauge, Gauge):
            raise _check.fail("gauges", gauge, "a sequence of Gauge", TypeError)
        gauge._check_state(state)
        for name in read_by(gauge):
            if not bool(state[name].isfinite().all()):
                raise ValueError(f"state: expected finite numbers, {name!r} has others")
    current = dict(state)
    steps: list[Step] = []
    remarks: list[str] = []

    def back(gauge: Gauge, element: Tensor, inverse: Tensor) -> None:
        current.update(gauge._act(current, inverse))
        steps.append(Step(gauge, element, inverse))

    translations, clean = translations_in_turn(gauges, state)
    if not clean:
        remarks.append("translations move each other's sources: not equivariant under them")
    for translation in translations:
        shift = current[translation.source].detach()[translation.entries].double()
        back(translation, shift, -shift)
    sources = {t.source for t in translations}
    for gauge in gauges:
        if isinstance(gauge, ClassShift):
            if sources & set(gauge.parameters):
                remarks.append(f"{gauge.name}: moves the source of a translation: not equivariant")
            mean = _class_mean(gauge, current)
            back(gauge, mean, -mean)
    multiplicative = [g for g in gauges if isinstance(g, Multiplicative)]
    norms = norms_of(multiplicative)
    current = folded(current, norms)
    found, why = _multiplicative(multiplicative, current)
    steps += found
    remarks += _same_axis(multiplicative) + why
    finite = [g for g in gauges if isinstance(g, Permutation)]
    others = [g for g in gauges if not any(g is o for o in (*finite, *(s.gauge for s in steps)))]
    if others:
        raise TypeError(f"gauges: no frame for {type(others[0]).__name__} {others[0].name!r}")
    return Frame(dict(state), current, tuple(steps), norms, tuple(remarks))


def _class_mean(gauge: ClassShift, state: State) -> Tensor:
    w = state[gauge.weight].detach().double()
    row = w.mean(gauge.class_axis).reshape(-1)
    if gauge.bias is None:
        return row
    return torch.cat([row, state[gauge.bias].detach().double().mean().reshape(1)])


def _same_axis(gauges: Sequence[Multiplicative]) -> list[str]:
    """What rotates does not commute with another gauge on the very same entries of an axis."""
    out = []
    for g in gauges:
        if isinstance(g, GeneralLinear | ComplexRescaling):
            for s in g.slots:
                for other in gauges:
                    for t in other.slots if other is not g else ():
                        if (s.parameter, s.axes) == (t.parameter, t.axes) and bool(
                            torch.isin(s.positions, t.positions).any()
                        ):
                            out.append(f"{g.name}: {other.name} acts on the same units")
    return list(dict.fromkeys(out))


def _multiplicative(
    gauges: Sequence[Multiplicative], current: dict[str, Tensor]
) -> tuple[list[Step], list[str]]:
    """Frame elements of rescalings and GL blocks; ``current`` is moved back by them.

    Units that their own entries do not determine wait until the gauges around them are known; so
    long they hold the entries they move, as a later gauge does.
    """
    steps: list[Step] = []
    order: list[Multiplicative] = []  # their gauges
    waiting: dict[int, Tensor] = {}  # step -> (h,) bool, its undetermined units

    def around(i: int) -> list[Hold]:
        rest = ((j, units) for j, units in waiting.items() if j != i)
        return [h for j, units in rest for h in holds(steps[j].gauge, current, units)]

    def own(i: int, gauge: Multiplicative) -> list[Keep]:
        return [kept(s, [*holds(gauge, current), *around(i)]) for s in gauge.slots]

    for gauge, keeps in in_turn(gauges, current):
        held = around(-1)
        keeps = [kept(s, held, k) for s, k in zip(gauge.slots, keeps, strict=True)]
        element, unknown = _determined(gauge, current, keeps)
        order.append(gauge)
        steps.append(_stepped(gauge, element, current))
        if bool(unknown.any()):
            waiting[len(steps) - 1] = unknown
    progress = True
    while waiting and progress:
        progress = False
        for i, units in list(waiting.items()):
            gauge = order[i]
            element, unknown = _determined(gauge, current, own(i, gauge))
            if bool((units & ~unknown).any()):
                element = _restricted(gauge, element, units & ~unknown)
                moved = _stepped(gauge, element, current)
                steps[i] = _joined(steps[i], moved)
                progress = True
                waiting[i] = units & unknown
                if not bool(waiting[i].any()):
                    del waiting[i]
    remarks = []
    for i, units in waiting.items():
        gauge = order[i]
        if isinstance(gauge, GeneralLinear):
            number = int(units.sum()) // gauge.shape[1]
            remarks.append(
                f"{gauge.name}: neither writers nor readers span {number} of {gauge.shape[0]} "
                "blocks; equivariant there under rotations and scalings only"
            )
            element = _restricted(gauge, _conformal(gauge, current, own(i, gauge)), units)
            moved = _stepped(gauge, element, current)
            steps[i] = _joined(steps[i], moved)
        else:
            remarks.append(
                f"{gauge.name}: {int(units.sum())} units have no entry, other than zero, that "
                "moves with them alone"
            )
    return steps, remarks


def _stepped(gauge: Multiplicative, element: Tensor, current: dict[str, Tensor]) -> Step:
    """Move ``current`` back by an element."""
    if isinstance(gauge, GeneralLinear):
        inverse = torch.linalg.inv(element)
    elif isinstance(gauge, ComplexRescaling):  # on its identity's phase
        inverse = torch.stack([1 / element[:, 0], element[:, 1]], 1)
    else:
        inverse = 1 / element
    current.update(_multiplied(gauge, current, inverse))
    return Step(gauge, element, inverse)


def _joined(first: Step, second: Step) -> Step:
    """One step for two of one gauge that lead to the normal form in turn."""
    return Step(
        first.gauge,
        first.gauge.compose(second.element, first.element),
        first.gauge.compose(first.inverse, second.inverse),
    )


def _restricted(gauge: Multiplicative, element: Tensor, units: Tensor) -> Tensor:
    """The element on some units, the identity on the others."""
    if isinstance(gauge, GeneralLinear):
        chosen = units.reshape(gauge.shape[:2])[:, :1, None]
    else:
        chosen = units.reshape(-1, *[1] * (element.ndim - 1))
    return torch.where(chosen, element, gauge.identity().to(element))


def _determined(
    gauge: Multiplicative, state: State, keeps: Sequence[Keep]
) -> tuple[Tensor, Tensor]:
    """(element, (h,) bool of units that the kept entries do not determine, identity there)."""
    if isinstance(gauge, GeneralLinear):
        return _roots(gauge, state, keeps)
    scales, unknown = _scales(gauge, state, keeps)
    if isinstance(gauge, ComplexRescaling):
        return torch.stack([scales, torch.zeros_like(scales)], 1), unknown
    return scales, unknown


def _scales(
    gauge: Rescaling | ComplexRescaling, state: State, keeps: Sequence[Keep]
) -> tuple[Tensor, Tensor]:
    device = state[gauge.slots[0].parameter].device

    def side(sign: int) -> Tensor:
        total = torch.zeros(gauge.shape[:1], dtype=torch.float64, device=device)
        number = torch.zeros_like(total)
        for slot, keep in zip(gauge.slots, keeps, strict=True):
            if slot.exponent * sign > 0:
                w = state[slot.parameter]
                n = counts(slot, w.shape, keep).to(device)
                mean = squares(w, slot, keep).to(device) / n.clamp(min=1)
                total += n * mean ** (1 / abs(slot.exponent))
                number += n
        return (total / number.clamp(min=1)).sqrt()

    writers, readers = side(1), side(-1)
    from_readers = torch.where(readers > 0, 1 / readers, torch.ones_like(readers))
    every = [squares(state[s.parameter], s, {}).to(device) for s in gauge.slots]
    unknown = (writers == 0) & (readers == 0) & (torch.stack(every) > 0).any(0)
    return torch.where(writers > 0, writers, from_readers), unknown


def _sides(
    gauge: GeneralLinear, state: State, keeps: Sequence[Keep]
) -> dict[int, tuple[list[Tensor], int]]:
    """Writers (1) and readers (−1): (blocks, d, columns) kept entries, and how many columns."""
    device = state[gauge.slots[0].parameter].device
    out: dict[int, tuple[list[Tensor], int]] = {1: ([], 1), -1: ([], 1)}
    for sign in out:
        columns, number = [], 0
        for slot, keep in zip(gauge.slots, keeps, strict=True):
            if slot.exponent == sign and undivided(slot, keep):
                w = state[slot.parameter]
                columns.append(blocks(w, slot, keep, gauge.shape).to(device))
                number += int(counts(slot, w.shape, keep)[0])
        out[sign] = (columns, max(number, 1))
    return out


def _roots(gauge: GeneralLinear, state: State, keeps: Sequence[Keep]) -> tuple[Tensor, Tensor]:
    sides = _sides(gauge, state, keeps)
    eps = torch.finfo(state[gauge.slots[0].parameter].dtype).eps
    element = gauge.identity().to(state[gauge.slots[0].parameter].device)
    unknown = torch.ones(gauge.shape[:2], dtype=torch.bool, device=element.device)
    for b in range(gauge.shape[0]):
        for sign, (columns, number) in sides.items():
            if columns and bool(unknown[b, 0]):
                root = _triangle(torch.cat([x[b] for x in columns], 1) / number**0.5, eps)
                if root is not None:
                    element[b] = root if sign > 0 else torch.linalg.inv(root).mT
                    unknown[b] = False
    return element, unknown.reshape(-1)


def _conformal(gauge: GeneralLinear, state: State, keeps: Sequence[Keep]) -> Tensor:
    """The root mean square of writers, or of readers inversely, times the identity."""
    sides = _sides(gauge, state, keeps)
    element = gauge.identity().to(state[gauge.slots[0].parameter].device)
    done = torch.zeros(gauge.shape[0], dtype=torch.bool, device=element.device)
    for sign, (columns, number) in sides.items():
        if columns:
            sizes = torch.cat(columns, 2).square().sum((1, 2)) / (gauge.shape[1] * number)
            use = (sizes > 0) & ~done
            scale = torch.where(use, sizes, torch.ones_like(sizes)) ** (sign / 2)
            element = element * scale[:, None, None]
            done |= use
    return element


def _triangle(columns: Tensor, eps: float) -> Tensor | None:
    """Lower triangular L with L Lᵀ = columns columnsᵀ; None where it is singular.

    By QR: the Gram matrix itself would lose half the digits.
    """
    d, n = columns.shape
    if n < d:
        return None
    root = torch.linalg.qr(columns.mT, mode="r").R.mT
    values = torch.linalg.svdvals(root)
    return root if float(values[-1]) > max(d, n) * eps * float(values[0]) else None

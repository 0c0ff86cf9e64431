"""Taylor-mode forward: the coefficients of a network's outputs along curves of parameters.

Along theta(t) = theta_0 + c_1 t + ... + c_q t^q the outputs are a power series in t. Propagating
truncated series through the captured graph gives its coefficients exactly (to rounding) at a cost
quadratic in the order, where nested derivatives cost 2^order. Our choice; the method is classical
(Griewank & Walther 2008, chapter 13; Bettencourt, Johnson & Duvenaud 2019).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from deaddir_fast import _check
from deaddir_fast.nets import graph as capturing
from deaddir_fast.nets.branches import Branches
from deaddir_fast.nets.jet_context import Context, short_name, uses_series
from deaddir_fast.nets.jet_fallback import check_derivative
from deaddir_fast.nets.jet_rules import RULES, propagate
from deaddir_fast.nets.series import Series

aten = torch.ops.aten

# These move values without rounding them.
_EXACT = {
    aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.slice.Tensor, aten.clone.default,
    aten.alias.default, aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.unbind.int, aten.cat.default, aten.neg.default, aten.index.Tensor, aten.where.self,
    aten.relu.default, aten.embedding.default, aten.slice_scatter.default, operator.getitem,
}  # fmt: skip

# Temporaries of one operation, in units of its result.
_WORKSPACE = 3.0


@dataclass(frozen=True)
class Jet:
    """Taylor coefficients of a model's outputs along p curves.

    Attributes:
        coefficients: (order+1, p, n, *out): plain coefficients of t^0..t^order, not derivatives.
        kinks: (p,) elements inside the network that sit exactly on a kink and whose branch the
            curve decided; where positive, the coefficients hold on the given side of t = 0 only.
        notes: operations differentiated without a Taylor rule, kinks met, other reservations.
    """

    coefficients: Tensor
    kinks: Tensor
    notes: tuple[str, ...]


@dataclass
class Block:
    """Coefficients of some curves on some samples: an exact propagation and perturbed ones."""

    curves: slice
    samples: slice
    exact: list[Tensor | None]
    perturbed: list[list[Tensor | None]]
    kinks: dict[str, Tensor]
    notes: tuple[str, ...]


class _Perturbation:
    """Relative perturbations of the size of rounding, reproducible, and reversible in sign."""

    def __init__(self, seed: int, sign: float, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sign = sign

    def tensor(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        return x + x * ((noise * 2 - 1) * (2 * self.sign * torch.finfo(x.dtype).eps))

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Series):
            return value.map(self.tensor)
        if isinstance(value, (list, tuple)):
            return [self(x) for x in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return self.tensor(value)
        return value


class JetProgram:
    """A model captured once, ready to be expanded along any curves of its parameters.

    Args:
        model: any deterministic module (dropout and batch norm in evaluation mode).
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments); samples lead.
        names: parameters that curves may move; all by default.

    Raises:
        ValueError: for an unknown parameter or a module in training mode.
    """

    def __init__(self, model: nn.Module, inputs: Any, names: Sequence[str] | None = None):
        self.model, self.inputs = model, inputs
        self.samples = capturing.batch_size(inputs)
        first = capturing.capture(model, inputs, names=names)
        self.names = first.names
        self.parameters = first.parameters
        self._captures = {self.samples: first}
        self._bytes = self._rehearse()

    def run(
        self,
        curves: Mapping[str, Tensor],
        order: int,
        side: int = 1,
        *,
        base: Mapping[str, Tensor] | None = None,
        memory: int = 2**30,
    ) -> Jet:
        """Expand the outputs along p curves.

        Args:
            curves: {parameter name: (q, p, *shape)}, coefficients of t^1..t^q, q <= order; a
                missing parameter or coefficient is zero.
            order: highest power kept, >= 1.
            side: +1 or -1: where the base point is on a kink, expand for t > 0 or t < 0.
            base: parameters to use at t = 0 instead of the captured ones.
            memory: bytes of intermediate results to stay below, by taking fewer curves, then
                fewer samples, at a time; the result does not depend on it.

        Returns:
            The coefficients, in the dtype of the parameters.

        Raises:
            ValueError: for curves of a wrong name, shape or length, or a wrong order or side.
            NotImplementedError: for an operation without a rule or a forward derivative.
        """
        self.check(curves, order, side, base)
        count = next(iter(curves.values())).shape[1]
        out: Tensor | None = None
        kinks = torch.zeros(count, dtype=torch.int64)
        notes: dict[str, None] = {}
        met: dict[str, int] = {}
        for block in self.blocks(curves, order, side, base=base, memory=memory):
            value = block.exact[0]
            assert value is not None, "the base value is never dropped"
            if out is None:
                out = value.new_zeros((order + 1, count, self.samples, *value.shape[2:]))
            for q, c in enumerate(block.exact):
                if c is not None:
                    out[q, block.curves, block.samples] = c
            notes.update(dict.fromkeys(block.notes))
            for label, per_curve in block.kinks.items():
                kinks[block.curves] += per_curve.cpu()
                met[label] = met.get(label, 0) + int(per_curve.sum())
        assert out is not None, "there is at least one block"
        return Jet(out, kinks, tuple(notes) + kink_notes(met, side))

    def check(
        self,
        curves: Mapping[str, Tensor],
        order: int,
        side: int,
        base: Mapping[str, Tensor] | None,
    ) -> None:
        """Refuse arguments of :meth:`run` that do not fit the model."""
        if not isinstance(order, int) or order < 1:
            raise _check.fail("order", order, "an integer >= 1")
        if side not in (1, -1):
            raise _check.fail("side", side, "+1 or -1")
        if not isinstance(curves, Mapping) or not curves:
            raise _check.fail("curves", curves, "a non-empty dict of parameter curves", TypeError)
        count = None
        for name, value in curves.items():
            if name not in self.parameters:
                raise ValueError(f"curves: no parameter called {name!r} in the program")
            shape = tuple(self.parameters[name].shape)
            _check.tensor(f"curves[{name!r}]", value)
            if value.ndim != len(shape) + 2 or tuple(value.shape[2:]) != shape:
                raise _check.fail(f"curves[{name!r}]", value, f"shape (q, p, {shape})")
            if not 1 <= value.shape[0] <= order:
                raise _check.fail(f"curves[{name!r}]", value, f"1 to {order} coefficients")
            if value.shape[1] < 1 or value.shape[1] != (count or value.shape[1]):
                raise _check.fail(f"curves[{name!r}]", value, f"{count or 'at least 1'} curves")
            count = value.shape[1]
        for name, value in (base or {}).items():
            if name not in self.parameters:
                raise ValueError(f"base: no parameter called {name!r} in the program")
            _check.tensor(f"base[{name!r}]", value)
            if value.shape != self.parameters[name].shape:
                expected = f"shape {tuple(self.parameters[name].shape)}"
                raise _check.fail(f"base[{name!r}]", value, expected)

    def blocks(
        self,
        curves: Mapping[str, Tensor],
        order: int,
        side: int,
        *,
        base: Mapping[str, Tensor] | None = None,
        memory: int = 2**30,
        replicas: int = 0,
    ) -> Iterator[Block]:
        """Propagate in blocks of curves and samples; ``replicas`` perturbed copies of each."""
        count = next(iter(curves.values())).shape[1]
        each = self._bytes * (order + 1) * _WORKSPACE * self.samples
        some = max(1, min(count, int(memory / max(each, 1.0))))
        samples = self.samples
        if each > memory:
            samples = max(1, min(self.samples, int(self.samples * memory / each)))
        parameters = dict(self.parameters)
        for name, value in (base or {}).items():
            like = self.parameters[name]
            parameters[name] = value.detach().to(dtype=like.dtype, device=like.device)
        moving = {}
        for name, value in curves.items():
            like = self.parameters[name]
            moving[name] = value.detach().to(dtype=like.dtype, device=like.device)
        for start in range(0, self.samples, samples):
            rows = slice(start, min(start + samples, self.samples))
            for first in range(0, count, some):
                columns = slice(first, min(first + some, count))
                part = {k: v[:, columns] for k, v in moving.items()}
                yield self._block(part, parameters, order, side, columns, rows, replicas)

    @property
    def captured(self) -> capturing.Capture:
        """The captured forward over all samples."""
        return self._captures[self.samples]

    def _capture(self, samples: int) -> capturing.Capture:
        if samples not in self._captures:
            inputs = capturing.slice_batch(self.inputs, 0, samples)
            self._captures[samples] = capturing.capture(self.model, inputs, names=self.names)
        return self._captures[samples]

    def _rehearse(self) -> int:
        """One plain forward: checks what has no rule, and returns the peak bytes per sample."""
        program = self._captures[self.samples]
        feed = iter([*program.parameters.values(), *program.bind(self.inputs)])
        moving = _dependent(program)
        env: dict[fx.Node, Any] = {}
        alive = peak = 0
        sizes: dict[fx.Node, int] = {}
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "output":
                    out = _result(node, env)
                    if out.ndim == 0 or out.shape[0] != self.samples:
                        given = tuple(out.shape)
                        raise ValueError(
                            f"model: expected outputs that lead with the {self.samples} samples, "
                            f"got shape {given}"
                        )
                    break
                env[node] = _plain(program, node, env, feed)
                if node in moving and node.op == "call_function":
                    if node.target not in RULES and node.target is not operator.getitem:
                        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                        check_derivative(node.target, args, kwargs)
                    sizes[node] = _size(env[node])
                    alive += sizes[node]
                    peak = max(peak, alive)
                for old in program.last_use[node]:
                    alive -= sizes.pop(old, 0)
                    del env[old]
        return max(1, peak // self.samples)

    def _block(
        self,
        curves: dict[str, Tensor],
        parameters: dict[str, Tensor],
        order: int,
        side: int,
        columns: slice,
        rows: slice,
        replicas: int,
    ) -> Block:
        program = self._capture(rows.stop - rows.start)
        inputs = program.bind(capturing.slice_batch(self.inputs, rows.start, rows.stop))
        # Coefficients that are zero for every curve are dropped, and everything they multiply.
        keys = [
            (name, q)
            for name, value in curves.items()
            for q in range(value.shape[0])
            if bool(value[q].any())
        ]
        notes: dict[str, None] = {}
        layout: list[list[bool]] = []
        labels: list[str] = []
        device = next(iter(parameters.values())).device

        def outputs(values: list[Tensor]) -> list[Tensor]:
            branches = Branches(side)
            results: list[Tensor] = []
            layout.clear()
            for replica in range(replicas + 1):
                perturb = None
                if replica:
                    # Pairs of opposite sign: a decision made by rounding flips in one of them.
                    seed, sign = (replica - 1) // 2, 1.0 if replica % 2 else -1.0
                    perturb = _Perturbation(seed, sign, device)
                    branches = Branches(side, branches.ties, perturbed=True)
                context = Context(order, branches, notes=notes)
                moving = {
                    name: Series([value] + [None] * order) for name, value in parameters.items()
                }
                for (name, q), value in zip(keys, values, strict=True):
                    moving[name].c[q + 1] = value
                out = _propagate(program, context, moving, inputs, perturb)
                series = context.series(out)
                layout.append([c is not None for c in series.c])
                results.extend(c for c in series.c if c is not None)
                if not replica:
                    labels[:] = list(branches.kinks)
                    counts = list(branches.kinks.values())
            return results + counts

        values = [curves[name][q] for name, q in keys]
        size = columns.stop - columns.start
        with torch.no_grad():
            if values:
                flat = list(torch.vmap(outputs, randomness="same")(values))
            else:  # every curve stands still
                flat = [x.expand(size, *x.shape) for x in outputs(values)]
        found: list[list[Tensor | None]] = []
        for present in layout:
            found.append([flat.pop(0) if here else None for here in present])
        kinks = dict(zip(labels, flat, strict=True))
        return Block(columns, rows, found[0], found[1:], kinks, tuple(notes))


def kink_notes(met: Mapping[str, int], side: int) -> tuple[str, ...]:
    """One sentence per operation that sits on a kink."""
    beside = "t > 0" if side > 0 else "t < 0"
    return tuple(
        f"{label}: {count} elements on a kink, branch taken for {beside}"
        for label, count in met.items()
        if count
    )


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(x) for x in value) if isinstance(value, (list, tuple)) else 0


def _dependent(program: capturing.Capture) -> set[fx.Node]:
    """Nodes whose value depends on a parameter."""
    nodes = list(program.graph.nodes)
    found = set(nodes[: len(program.names)])
    for node in nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _plain(program: capturing.Capture, node: fx.Node, env: dict[fx.Node, Any], feed: Any) -> Any:
    if node.op == "placeholder":
        return next(feed)
    if node.op == "get_attr":
        return getattr(program.module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function: callable


def _result(output: fx.Node, env: dict[fx.Node, Any]) -> Any:
    value = fx.node.map_arg(output.args[0], env.__getitem__)
    return value[0] if isinstance(value, (list, tuple)) else value


def _propagate(
    program: capturing.Capture,
    context: Context,
    parameters: dict[str, Series],
    inputs: list[Tensor],
    perturb: _Perturbation | None,
) -> Any:
    """Run the graph on series; values that do not depend on t stay plain tensors."""
    env: dict[fx.Node, Any] = {}
    dependent = _dependent(program) if perturb else set()
    starts: list[Any] = []
    for name in program.names:
        series = parameters[name]
        value = series if any(c is not None for c in series.c[1:]) else series.base
        starts.append(perturb(value) if perturb else value)
    feed = iter([*starts, *inputs])
    for node in program.graph.nodes:
        if node.op == "output":
            return _result(node, env)
        if node.op != "call_function":
            env[node] = _plain(program, node, env, feed)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is operator.getitem:
            env[node] = args[0][args[1]]
        elif uses_series(args, kwargs):
            context.node = node.name
            context.label = f"{short_name(node.target)} ({node.name})"
            env[node] = propagate(context, node.target, args, kwargs)
        else:
            env[node] = node.target(*args, **kwargs)
        if node in dependent and node.target not in _EXACT and perturb:
            env[node] = perturb(env[node])
        for old in program.last_use[node]:
            del env[old]
    raise RuntimeError("the captured graph has no output")

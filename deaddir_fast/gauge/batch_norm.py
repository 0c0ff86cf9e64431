"""Batch norm in evaluation mode: an affine map whose running statistics are constants.

y = γ s (z − μ) + β with s = 1/√(variance + ε). Running statistics are buffers and stay where they
are, so a scale c of z moves both parameters: γ → γ/c alone would leave γ s (c z − μ)/c, which is
off by γ s μ (1 − 1/c), and β takes that back. In the coordinates γ̂ = γ s, β̂ = β − γ s μ the map is
γ̂ z + β̂ and symmetries act plainly: scales of z divide γ̂, permutations of channels permute both,
shifts of z by v take γ̂ v off β̂. In training mode s comes from z itself, and ε keeps scales of z
from being symmetries.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.rescaling import Rescaling
from deaddir_fast.gauge.units import Units
from deaddir_fast.nets.graph import Capture
from deaddir_fast.nets.moves import MOVES, SAME, operands

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Norm:
    """One evaluation-mode batch norm.

    Attributes:
        gamma, beta: names of its parameters.
        mean, scale: (C,) fp64: running mean μ and 1/√(running variance + ε).
    """

    gamma: str
    beta: str
    mean: Tensor
    scale: Tensor

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like), self.scale.to(like)

    def fold(self, state: State) -> dict[str, Tensor]:
        """γ̂ and β̂ under the names of γ and β."""
        gamma, beta = state[self.gamma], state[self.beta]
        mean, scale = self._constants(gamma)
        return {self.gamma: gamma * scale, self.beta: beta - gamma * scale * mean}

    def unfold(self, state: State) -> dict[str, Tensor]:
        """The inverse of ``fold``, linear like it."""
        gamma, beta = state[self.gamma], state[self.beta]
        mean, scale = self._constants(gamma)
        return {self.gamma: gamma / scale, self.beta: beta + gamma * mean}


class _Folding(Gauge):
    """A gauge that acts on γ̂ and β̂ of some batch norms instead of on γ and β."""

    norms: tuple[Norm, ...]

    def _folded(self, state: State) -> dict[str, Tensor]:
        folded = dict(state)
        for norm in self.norms:
            folded.update(norm.fold(state))
        return folded

    def _unfolded(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        unfolded = {k: values[k] for k in self.parameters}
        for norm in self.norms:
            unfolded.update(norm.unfold(values))
        return unfolded

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        folded = self._folded(state)
        return self._unfolded({**folded, **super()._act(folded, element)})  # type: ignore[safe-super]

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        folded = self._folded(state)
        rates = super()._velocity(folded, algebra)  # type: ignore[safe-super]
        still = {k: torch.zeros_like(state[k]) for k in self.parameters if k not in rates}
        return self._unfolded({**still, **rates})


@dataclass(frozen=True, eq=False)
class NormRescaling(_Folding, Rescaling):
    """Units scaled on their way into batch norms in evaluation mode.

    The parameters that write the units scale by c, γ and the units' other readers by 1/c, and β
    takes back what the running mean makes of it.
    """

    norms: tuple[Norm, ...]


@dataclass(frozen=True, eq=False)
class NormPermutation(_Folding, Permutation):
    """Channels permuted through batch norms in evaluation mode, whose statistics stay in place."""

    norms: tuple[Norm, ...]


@dataclass(frozen=True)
class NormReader:
    """A batch norm that reads shifted units: β takes γ s v back.

    Attributes:
        weight, bias: names of γ and β.
        positions: (h, m) long: channels of each unit.
        scale: (C,) fp64: s.
    """

    weight: str
    bias: str
    positions: Tensor
    scale: Tensor

    def response(self, gamma: Tensor, shift: Tensor) -> Tensor:
        """(C,): what ``shift`` (h,) of the channels adds to the norm's output."""
        at = self.positions.reshape(-1).to(gamma.device)
        own = shift.to(gamma).repeat_interleave(self.positions.shape[1])
        full = torch.zeros_like(gamma).index_add(0, at, own)
        return gamma * self.scale.to(gamma) * full


@dataclass(frozen=True, eq=False)
class Site:
    """A batch norm in the graph.

    Attributes:
        norm: parameters and constants.
        centred: the node z − μ.
        constants: the nodes of μ and s as they enter the arithmetic.
        buffer: the lifted running mean.
        shape: of μ as it broadcasts against z: C and ones.
    """

    norm: Norm
    centred: fx.Node
    constants: tuple[fx.Node, fx.Node]
    buffer: fx.Node
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """What stands for the running mean where parameters are listed."""
        return f"running mean before {self.norm.gamma}"


def sites(capture: Capture) -> list[Site]:
    """The evaluation-mode batch norms of a graph whose parameters are used nowhere else."""
    nodes = list(capture.graph.nodes)
    names = dict(zip(nodes, capture.names, strict=False))
    constant: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(a in constant for a in node.all_input_nodes)
        ):
            constant.add(node)
    found = []
    for node in nodes:
        if node.target is aten.sub.Tensor and not node.kwargs:
            site = _site(capture, names, constant, node)
            if site is not None:
                found.append(site)
    return found


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    user = next(iter(node.users), None)
    plain = user is not None and user.target is target and not user.kwargs
    return user if plain and len(node.users) == 1 else None


def _site(
    capture: Capture, names: dict[fx.Node, str], constant: Collection[fx.Node], node: fx.Node
) -> Site | None:
    z, mean = operands(node)[:2]
    scaled = _only_user(node, aten.mul.Tensor)
    gained = None if scaled is None else _only_user(scaled, aten.mul.Tensor)
    shifted = None if gained is None else _only_user(gained, aten.add.Tensor)
    if scaled is None or gained is None or shifted is None:
        return None
    if not isinstance(z, fx.Node) or z in constant or mean not in constant:
        return None
    scale = _other(scaled, node)
    gamma, beta = (_source(_other(a, b), names) for a, b in ((gained, scaled), (shifted, gained)))
    if scale not in constant or gamma is None or beta is None:
        return None
    buffer = mean
    while buffer.op == "call_function" and buffer.target in MOVES | SAME - {aten.neg.default}:
        buffer = operands(buffer)[0]
    mu, s = _exact(capture, mean), _exact(capture, scale)
    axes = [a for a, extent in enumerate(mu.shape) if extent > 1]
    channels = capture.parameters[names[gamma]].shape
    if buffer.op != "get_attr" or len(buffer.users) > 1 or len(axes) > 1 or mu.shape != s.shape:
        return None
    if len(channels) != 1 or mu.numel() != channels[0] or not bool((s > 0).all()):
        return None
    norm = Norm(names[gamma], names[beta], mu.reshape(-1), s.reshape(-1))
    return Site(norm, node, (mean, scale), buffer, tuple(mu.shape))


def _other(node: fx.Node, known: fx.Node) -> Any:
    a, b = operands(node)[:2]
    return b if a is known else a


def _source(arg: Any, names: dict[fx.Node, str]) -> fx.Node | None:
    """The parameter that an argument moves and that nothing else uses."""
    while isinstance(arg, fx.Node) and arg not in names:
        if arg.target not in MOVES | SAME - {aten.neg.default} or len(arg.users) > 1:
            return None
        arg = operands(arg)[0]
    return arg if isinstance(arg, fx.Node) and len(arg.users) == 1 else None


def _exact(capture: Capture, node: Any) -> Any:
    """A constant node's value worked out in fp64."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        value: Tensor = getattr(capture.module, str(node.target)).detach()
        return value.double() if value.is_floating_point() else value
    args = [_exact(capture, a) for a in operands(node)]
    if node.target is aten._to_copy.default:
        return args[0]
    target: Any = node.target
    return target(*args, **node.kwargs)


def kinked(units: Units, vectors: Sequence[dict[int, int]]) -> bool:
    """Whether any of these scales still moves something that meets a kink.

    A scale that γ takes back at once does not, though γ itself meets one further on.
    """
    exponents = np.zeros(len(units.parameter))
    draws = np.random.default_rng(0).uniform(1.0, 2.0, len(vectors))
    for draw, vector in zip(draws, vectors, strict=True):
        exponents[list(vector)] += draw * np.array(list(vector.values()))
    for scale in units.kinks:
        net = sum((float(t.coefficient) * exponents[t.ids] for t in scale), np.zeros(()))
        if (np.abs(net) > 1e-9).any():
            return True
    return False


def with_norms(gauge: Rescaling, norms: tuple[Norm, ...], order: dict[str, int]) -> NormRescaling:
    """A rescaling found with running means that scale, turned into one with means that do not."""
    return NormRescaling(
        **{f: getattr(gauge, f) for f in gauge.__dataclass_fields__ if f != "parameters"},
        parameters=_including(gauge.parameters, norms, order),
        norms=norms,
    )


def through_norms(
    gauge: Permutation, found: Collection[Site], order: dict[str, int]
) -> Permutation:
    """A permutation found with running statistics that move along, as one where they stay."""
    own = {s.parameter for s in gauge.slots}
    norms = tuple(s.norm for s in found if s.norm.gamma in own)
    if not norms:
        return gauge
    return NormPermutation(
        **{f: getattr(gauge, f) for f in gauge.__dataclass_fields__ if f != "parameters"},
        parameters=_including(gauge.parameters, norms, order),
        norms=norms,
    )


def _including(
    parameters: tuple[str, ...], norms: tuple[Norm, ...], order: dict[str, int]
) -> tuple[str, ...]:
    names = {*parameters, *(n for norm in norms for n in (norm.gamma, norm.beta))}
    return tuple(sorted(names, key=order.__getitem__))

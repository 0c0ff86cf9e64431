"""Find the symmetries of a model from the dataflow of its forward pass."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.gauge import batch_norm
from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.centring import mean_shifts
from deaddir_fast.gauge.inputs import made_up
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permuting import permutations
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.gauge.scaling import MOVES, SAME, Flow, aten, flow, grouped, operands, rule_of
from deaddir_fast.gauge.shift import ClassShift
from deaddir_fast.gauge.shifting import translations
from deaddir_fast.gauge.turning import turned
from deaddir_fast.gauge.units import Term
from deaddir_fast.gauge.verify import Verifier, at_rest
from deaddir_fast.nets.graph import batch_size, capture, slice_batch

_TRACED = 2  # samples the dataflow is followed on
_CHECKED = 16  # samples every claim is checked on, at most
_WORK = 5e9  # multiplications a forward pass of the check may take if two samples take fewer


_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
# A parameter, its axes and the exponent with which it takes part: what becomes a slot.
_Place = tuple[str, tuple[int, ...], int, int]


def find(model: nn.Module, inputs: Any = None) -> list[Gauge]:
    """The symmetries that the architecture has, each checked numerically.

    The forward pass is captured as ATen operations, in evaluation mode. Every axis entry of
    every parameter gets an unknown log scale; each operation says which sums of them must vanish
    for it to commute; the exact null space of these equations is the group of all diagonal
    symmetries the rules can see: per-unit rescaling through ReLU-like functions, convolutions,
    pooling and flattening, gated units (up, down), the scales of normalisation layers into the
    linear maps that follow, scales in front of a batch norm (running statistics are constants,
    and its two parameters make up for that), per-channel scales of a residual stream only where
    every reader and writer takes part. Where units meet linear maps alone the group is the full
    GL(h) (deep linear networks; per head for values and outputs, queries and keys).

    Shifts come next: of biases that later biases, batch norms or a softmax take back; of all
    outputs of a map alike, where only norms that subtract their mean read them, or a softmax; of
    all class rows and biases of the last linear map (``likelihood="categorical"``).

    Permutations come last: units, channels, attention heads and the features of a residual
    stream that no operation tells apart (:class:`Permutation`, of dimension 0). Those that are
    elements of a linear group found already are left out. What is indexed by two axes of one
    parameter at once permutes alike along the other (the hidden units of stacked experts, the
    channels inside the groups of a grouped convolution), and experts kept in separate modules are
    not compared. Tokens sorted by expert are not followed: what permutes through the experts of a
    grouped product (their units, the features they read) is not found.

    Args:
        model: any module; left exactly as it is.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments), samples leading;
            made up from the first layer's shape if None. At most 16 samples are used.

    Returns:
        Gauges: rescalings and general linear groups first, then translations, class shifts and
        permutations. Each leaves the outputs unchanged at the model's parameters and at a random
        point nearby. A claim that fails this is dropped with a ``UserWarning``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no inputs were given and none can be made up.
    """
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    with at_rest(model):
        if inputs is None:
            inputs = made_up(model)
        n = batch_size(inputs)
        if not any(True for _ in model.parameters()) or n == 0:
            return []
        claims, samples = _claims(model, slice_batch(inputs, 0, min(n, _TRACED)))
        if not claims:
            return []
        return verified(Verifier(model, slice_batch(inputs, 0, min(n, samples))), claims)


def _claims(model: nn.Module, few: Any) -> tuple[list[tuple[Gauge, Gauge | None]], int]:
    """What the rules find on few samples, and on how many to check it."""
    run, norms = _followed(model, few)
    traced = batch_size(few)
    if run.unseen and run.repeat > 1:
        traced *= run.repeat
        run, norms = _followed(model, pytree.tree_map(partial(_repeated, times=run.repeat), few))
    names = dict(
        zip(
            (v for v in run.capture.graph.nodes if v.op == "placeholder"),
            run.capture.names,
            strict=False,
        )
    )
    diagonal = _diagonal(run, norms)
    linear = [g for g, _ in diagonal if isinstance(g, GeneralLinear)]
    others: list[Gauge] = [
        *translations(run, names, norms.values()),
        *mean_shifts(run),
        *_class_shifts(run, names),
        *permutations(run, linear, norms.values()),
    ]
    claims = [*diagonal, *((g, None) for g in others)]
    products = sum(_multiplications(run, node) for node in run.capture.graph.nodes)
    samples = int(_WORK / max(products / traced, 1.0))
    return claims, min(_CHECKED, max(_TRACED, samples))


def _followed(model: nn.Module, few: Any) -> tuple[Flow, dict[str, batch_norm.Site]]:
    """The forward pass, and its batch norms by what stands for their running means."""
    captured = capture(model, few)
    norms = {site.label: site for site in batch_norm.sites(captured)}
    return flow(captured, few, {site.buffer: label for label, site in norms.items()}), norms


def _repeated(x: Any, times: int) -> Any:
    return x.repeat(times, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else x


def _multiplications(run: Flow, node: fx.Node) -> int:
    """Multiplications, about, of a matrix product or convolution."""
    if node.op != "call_function":
        return 0
    outputs = math.prod(run.shape(node))
    if node.target is aten.convolution.default:
        return outputs * math.prod(run.shape(operands(node)[1])[1:])
    if node.target in _PRODUCTS:
        return outputs * run.shape(operands(node)[-2])[-1]
    if rule_of(node.target) is grouped:
        return outputs * run.shape(operands(node)[0])[-1]
    return 0


def verified(verifier: Verifier, claims: Sequence[tuple[Gauge, Gauge | None]]) -> list[Gauge]:
    """The claims that stand, each replaced by its weaker form (or none) where it does not.

    Claims that move nothing at a generic point are left out; false ones with a ``UserWarning``.
    """
    moving = verifier.moves([claim for claim, _ in claims])
    kept = [pair for pair, moves in zip(claims, moving, strict=True) if moves]
    reasons = verifier.objections([claim for claim, _ in kept])
    found: list[Gauge] = []
    for (claim, weaker), reason in zip(kept, reasons, strict=True):
        if reason is None:
            found.append(claim)
            continue
        warnings.warn(f"{claim.name} ({claim.group}) dropped: {reason}", UserWarning, stacklevel=3)
        if weaker is not None:
            found += verified(verifier, [(weaker, None)])
    return found


def _modules(parameters: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(p.rpartition(".")[0] or p for p in parameters))


def _diagonal(run: Flow, norms: Mapping[str, batch_norm.Site]) -> list[tuple[Gauge, Gauge | None]]:
    """Units that act alike, gathered into gauges; GL where nothing tells them apart."""
    units = run.units
    families: dict[tuple, dict[int, list[dict[int, int]]]] = defaultdict(lambda: defaultdict(list))
    taken: dict[tuple, list[set[int]]] = defaultdict(list)
    alike: dict[tuple, list[dict[int, int]]] = defaultdict(list)
    for vector in (_oriented(run, v) for basis in units.solve() for v in basis):
        touched: dict[_Place, int] = defaultdict(int)
        for v, exponent in vector.items():
            touched[(units.parameter[v], units.outer[v], units.axis[v], exponent)] += 1
        positive = bool(units.positive[list(vector)].any())
        alike[(tuple(sorted(touched.items())), positive)].append(vector)
    for (touches, positive), vectors in alike.items():
        if positive and any(p in norms for (p, *_), _ in touches):
            positive = batch_norm.kinked(units, vectors)
        key = (touches, positive)
        for vector in vectors:
            label = int(np.sum(units.label[list(vector)], dtype=np.uint64))
            # Units of one gauge own different entries; the rare overlap opens another gauge.
            layer = next((i for i, t in enumerate(taken[key]) if not t & set(vector)), None)
            if layer is None:
                layer = len(taken[key])
                taken[key].append(set())
            taken[key][layer] |= set(vector)
            families[(*key, layer)][label].append(vector)
    claims: list[tuple[Gauge, Gauge | None]] = []
    for (_, positive, _), blocks in families.items():
        by_size: dict[int, list[list[dict[int, int]]]] = defaultdict(list)
        for members in blocks.values():
            signs_only = all(abs(e) == 1 for e in members[0].values())
            parts = [members] if signs_only and not positive else [[m] for m in members]
            for part in parts:
                by_size[len(part)].append(part)
        for size, same in sorted(by_size.items()):
            claim, weaker = _claim(run, same, size, positive, norms)
            if isinstance(claim, Rescaling) and not isinstance(claim, batch_norm.NormRescaling):
                claims += turned(run, claim)
            else:
                claims.append((claim, weaker))
    order = {name: i for i, name in enumerate(run.capture.names)}
    return sorted(claims, key=lambda c: order[c[0].parameters[0]])


def _oriented(run: Flow, vector: dict[int, int]) -> dict[int, int]:
    """Positive exponents for the parameters used first: they write the unit, the others read it."""
    own = (v for v in vector if run.units.parameter[v] in run.first_use)
    first = min(own, key=lambda v: (run.first_use[run.units.parameter[v]], v))
    return vector if vector[first] > 0 else {v: -e for v, e in vector.items()}


def _claim(
    run: Flow,
    blocks: list[list[dict[int, int]]],
    size: int,
    positive: bool,
    norms: Mapping[str, batch_norm.Site],
) -> tuple[Gauge, Gauge | None]:
    units, h = run.units, len(blocks) * size
    entries: dict[_Place, list[list[int]]] = defaultdict(lambda: [[] for _ in range(h)])
    folded: dict[str, batch_norm.Norm] = {}
    for j, vector in enumerate(u for block in blocks for u in block):
        for v, exponent in vector.items():
            if units.parameter[v] in norms:
                folded[units.parameter[v]] = norms[units.parameter[v]].norm
                continue
            slot = (units.parameter[v], units.outer[v], units.axis[v], exponent)
            entries[slot][j].append(units.index[v])
    order = {name: i for i, name in enumerate(run.capture.names)}
    slots = tuple(
        Slot(
            p,
            axis,
            torch.tensor([sorted(x) for x in at]),
            math.prod(run.capture.parameters[p].shape[a] for a in (*outer, axis))
            if run.capture.parameters[p].ndim
            else 1,
            e,
            outer,
        )
        for (p, outer, axis, e), at in sorted(
            entries.items(), key=lambda s: (order[s[0][0]], s[0][1:])
        )
    )
    parameters = tuple(dict.fromkeys(s.parameter for s in slots))
    ends = [_modules(s.parameter for s in slots if s.exponent * sign > 0) for sign in (1, -1)]
    between = " -> ".join(e for e in ends if e)
    field = "R_>0" if positive else "R^*"
    rescaling = Rescaling(
        name=f"rescaling: {between}",
        group=f"({field})^{h}",
        parameters=parameters,
        shape=(h,),
        likelihood=None,
        slots=slots,
        positive=positive,
    )
    if folded:
        return batch_norm.with_norms(rescaling, tuple(folded.values()), order), None
    if size == 1:
        return rescaling, None
    count = f"^{len(blocks)}" if len(blocks) > 1 else ""
    linear = GeneralLinear(
        name=f"general linear: {between}",
        group=f"GL({size}){count}",
        parameters=parameters,
        shape=(len(blocks), size, size),
        likelihood=None,
        slots=slots,
    )
    return linear, rescaling


def _class_shifts(run: Flow, names: dict[fx.Node, str]) -> list[Gauge]:
    """The last linear maps: nothing but data movement and sums between them and the output."""
    outputs = [n for n in run.capture.graph.nodes if n.op == "output"]
    frontier = [a for n in outputs for a in n.all_input_nodes]
    if not frontier or run.shape(frontier[0])[-1:] < (2,):
        return []
    classes = run.shape(frontier[0])[-1]
    found: list[Gauge] = []
    biases: list[str] = []
    weights: list[tuple[str, int]] = []
    while frontier:
        node = frontier.pop()
        if node.op != "call_function":
            continue
        if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            for arg in operands(node):
                if isinstance(arg, fx.Node):
                    bias = _origin(run, arg, names, classes)
                    if bias is not None and run.capture.parameters[bias[0]].ndim == 1:
                        biases.append(bias[0])
                    else:
                        frontier.append(arg)
        elif node.target in MOVES | SAME:
            frontier.append(operands(node)[0])
        elif node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            if node.target is aten.addmm.default:
                bias = _origin(run, operands(node)[0], names, classes)
                biases += [bias[0]] if bias else []
            map_of = _origin(run, operands(node)[-1], names, classes)
            weights += [map_of] if map_of else []
    if biases and not weights:  # the map is tied to another: its bias moves alone
        weights, biases = [(biases[0], 0)], []
    for i, (weight, axis) in enumerate(weights):
        # One number on all classes is one direction however many biases could carry it.
        offset = biases[0] if biases and i == 0 else None
        w = run.capture.parameters[weight]
        features = math.prod(s for a, s in enumerate(w.shape) if a != axis)
        dimension = features + (offset is not None)
        found.append(
            ClassShift(
                name=f"class shift: {_modules([weight])}",
                group=f"R^{dimension}",
                parameters=(weight, offset) if offset is not None else (weight,),
                shape=(dimension,),
                likelihood="categorical",
                weight=weight,
                bias=offset,
                class_axis=axis,
            )
        )
    return found


def _origin(
    run: Flow, node: fx.Node, names: dict[fx.Node, str], classes: int
) -> tuple[str, int] | None:
    """The parameter, used nowhere else, whose whole axis runs along the last axis of ``node``."""
    source = node
    while source.op == "call_function" and source.target in MOVES | SAME:
        if len(source.users) != 1:
            return None
        source = operands(source)[0]
    if source not in names or len(source.users) != 1:
        return None
    ndim = len(run.shape(node))
    last = [t for t in run.scale(node) if isinstance(t, Term) and t.support(ndim) == {ndim - 1}]
    if len(last) != 1 or last[0].ids.size != classes:
        return None
    variables = last[0].ids.reshape(-1)
    axis = run.units.axis[variables[0]]
    parameter: Tensor = run.values[source]
    return (names[source], axis) if parameter.shape[axis] == classes else None

"""What a scan will cost, layer by layer, before it runs; and what it did cost.

With R rows (samples times tokens), one forward pass, one backward pass for activations and the two
triangles take R (4 i o + i² + o²) FLOP a layer; A is free where another layer has the same inputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.survey import Survey
from deaddir_fast.ops._dispatch import chosen_route
from deaddir_fast.ops.gram_packed import entries


@dataclass(frozen=True)
class LayerCost:
    """Of one layer's factors.

    Attributes:
        name: of the layer.
        route: how its streams are taken and which kernel sums them.
        rows: samples times tokens.
        flops: of its part of the forward and backward pass and of both triangles.
        bytes: moved for the triangles: rows read once, sums read and written per update.
        memory: bytes of its sums.
        seconds: measured for the sums, None before the run.
        share_of_bound: time the sums' arithmetic must take at this machine's measured rate over
            the time they took.
    """

    name: str
    route: str
    rows: int
    flops: float
    bytes: float
    memory: int
    seconds: float | None = None
    share_of_bound: float | None = None


@dataclass(frozen=True)
class Plan:
    """Of a whole scan.

    Attributes:
        layers: costs of each.
        flops: of the factors in all.
        memory: bytes beyond the model: sums, rows held back and one batch's activations.
        disk: bytes of its state.
        rate: FLOP/s measured here with one matrix product.
        seconds: estimate for the factors.
    """

    layers: tuple[LayerCost, ...]
    flops: float
    memory: int
    disk: int
    rate: float
    seconds: float


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one matrix product of moderate size, the best of three."""
    size = 512 if device.type == "cpu" else 4096
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def triangles(layer: Layer, rows: int, shared: bool, passes: int, closed: bool) -> float:
    """FLOP of Σ a aᵀ and Σ g gᵀ."""
    work = 0.0
    if layer.form == "matrix" and not shared:
        work += layer.groups * rows * layer.inputs * (layer.inputs + 1)
    if not closed:
        count = rows if layer.kind != "norm" else max(1, rows // 64)
        work += layer.groups * passes * count * layer.outputs * (layer.outputs + 1)
    return work


def plan(
    survey: Survey,
    tokens: int,
    samples: int,
    *,
    dtype: torch.dtype,
    sums: torch.dtype,
    device: torch.device,
    passes: int,
    closed_head: str | None,
    batch_samples: int,
) -> Plan:
    """Costs of the factors of a surveyed model.

    Args:
        survey: of the model.
        tokens, samples: in all batches.
        dtype, sums: of the activations and of the sums.
        device: of the model.
        passes: backward passes a batch.
        closed_head: name of the head whose G is not formed.
        batch_samples: samples of the largest batch.
    """
    longest = max(survey.tokens.values(), default=1)
    costs = []
    memory = disk = activations = held = 0
    itemsize, wide = torch.finfo(dtype).bits // 8, torch.finfo(sums).bits // 8
    kernel = chosen_route(
        "gram_packed", torch.zeros(4096, 256, device=device, dtype=dtype), None, 1.0
    )
    for name, layer in survey.layers.items():
        share = survey.tokens.get(name, 1)
        # Layers over tokens see only those that count; the survey saw padded ones.
        rows = tokens if share == longest and longest > 1 else samples * max(1, share)
        shared = name in survey.leaders
        closed = name == closed_head
        size = 0
        if layer.form == "matrix" and not shared:
            size += layer.groups * entries(layer.inputs)
        elif layer.form == "diagonal":
            size += layer.inputs
        size += layer.outputs if closed else layer.groups * entries(layer.outputs)
        passes_flops = 2.0 * (1 + passes) * rows * layer.groups * layer.inputs * layer.outputs
        if layer.form != "matrix":
            passes_flops = 0.0
        sums_flops = triangles(layer, rows, shared, passes, closed)
        updates = -(-rows // 2048)
        # What is read of a layer's inputs: nothing where another reads them, indices of embeddings.
        taken = 0 if shared else layer.inputs if layer.form == "matrix" else 1
        returned = 0 if closed else layer.outputs
        moved = float(rows) * (taken + returned * passes) * itemsize * layer.groups
        held += 2048 * (taken + returned) * layer.groups * itemsize
        moved += 2.0 * updates * size * wide
        how = {"matrix": f"{kernel} gram_packed", "diagonal": "counts", "one": "exact block"}
        route = f"streams, {how[layer.form]}"
        if shared:
            route += f", A of {survey.leaders[name]}"
        if closed:
            route += ", softmax form of G"
        costs.append(LayerCost(name, route, rows, passes_flops + sums_flops, moved, size * wide))
        memory += size * wide
        disk += size * wide
        activations += batch_samples * max(1, share) * layer.groups * layer.outputs * itemsize
    flops = sum(c.flops for c in costs)
    rate = machine_rate(device, dtype)
    return Plan(
        tuple(costs),
        flops,
        memory + activations + held,
        2 * disk,
        rate,
        flops / rate,
    )

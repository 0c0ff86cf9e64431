"""One layer's entry of the report, and what the layers add up to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deaddir_fast.fisher.factors import LayerFactors
from deaddir_fast.nets.sharded import plain_type
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.bound import contradicted
from deaddir_fast.scan.nulls import Null
from deaddir_fast.scan.spectra import Spectrum

CLASSES = ("gauge", "algebraic", "data", "singular", "unresolved")
SHIFT = "shift of all classes"


def block_of(name: str) -> int | None:
    """Index of the repeated block a layer is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.)", name)
    return int(found.group(1)) if found else None


def spectrum_entry(s: Spectrum) -> dict[str, Any]:
    """What the report says of a spectrum."""
    keys = (
        "form", "dimension", "rank", "rank_limit", "dead", "top", "bottom", "trace",
        "log_pseudo_det", "tolerance", "ambiguous", "verdict",
    )  # fmt: skip
    return {k: getattr(s, k) for k in keys}


def dead_dimensions(
    a: Spectrum,
    g: Spectrum,
    nulls: tuple[Null, Null] | None,
    readings: Sequence[dict[str, Any]],
    *,
    groups: int,
    outputs: int,
    shift: bool,
) -> dict[str, int]:
    """Dimensions of the block's null space by class.

    ``block`` counts directions that A ⊗ G calls null: with A w = 0 any v, with G v = 0 any live w.
    The first are flat. Of the second a generic direction was measured, which speaks for all.
    """
    found = dict.fromkeys(("block", *CLASSES), 0)
    live = a.rank
    on_inputs = a.dead * outputs
    # Of a head whose G is not formed, the shift is the one null vector known.
    g_dead = max(g.dead, 1) if shift and g.form == "diagonal" else g.dead
    # Of groups the ranks are known together only: what their inputs leave null, at least.
    found["block"] = on_inputs + (live * g_dead if groups == 1 else 0)
    if groups > 1 or nulls is None:
        found["unresolved"] = found["block"]
        return found
    split = nulls[0].count(True) + nulls[0].count(False)
    sure = a.verdict == "resolved" and not contradicted(readings)
    if split == a.dead and nulls[0].checked and sure:
        found["algebraic"] += nulls[0].count(True) * outputs
        found["data"] += nulls[0].count(False) * outputs
    else:
        found["unresolved"] += on_inputs
    rest = g_dead
    if shift and g_dead:
        found["gauge"] += live
        rest -= 1
    by_part = {
        bool("on the data" not in r["label"]): r["class"]
        for r in readings
        if r["part"] == "outputs" and r["label"] != SHIFT
    }
    counted = 0
    for always in (True, False):
        count = nulls[1].count(always)
        if shift and always and count:
            count -= 1
        kind = by_part.get(always)
        if count > 0 and nulls[1].checked and kind in CLASSES and g.verdict == "resolved":
            found[kind] += count * live
            counted += count
    found["unresolved"] += max(0, rest - counted) * live
    return found


def layer_report(
    survey: Survey,
    f: LayerFactors,
    spectra: tuple[Spectrum, Spectrum],
    nulls: tuple[Null, Null] | None,
    readings: list[dict[str, Any]],
    depth: int,
    cost: dict[str, Any],
    *,
    head: bool,
) -> dict[str, Any]:
    """The entry of one layer."""
    layer = survey.layers[f.name]
    a, g = spectra
    dead = dead_dimensions(
        a, g, nulls, readings, groups=layer.groups, outputs=layer.outputs, shift=head
    )  # fmt: skip
    notes = []
    if survey.sharers(f.name):
        notes.append(
            f"its weight is also that of {', '.join(survey.sharers(f.name))}: what is null for one "
            "use need not be so for the other"
        )
    if survey.calls.get(f.name, 1) > 1:
        notes.append(f"used {survey.calls[f.name]} times in one pass")
    if layer.layout == "unknown":
        notes.append("which rows belong to which sample is not known: factors only")
    if layer.groups > 1:
        notes.append(f"{layer.groups} independent groups: their spectra together")
    doubts = [f"{side}: {s.verdict}" for side, s in (("A", a), ("G", g)) if s.verdict != "resolved"]
    open_rays = [r["label"] for r in readings if r["class"] == "unresolved"]
    if open_rays:
        doubts.append(f"rays unresolved: {', '.join(open_rays)}")
    if dead["unresolved"]:
        doubts.append(f"{dead['unresolved']} null dimensions not classified")
    return {
        "name": f.name,
        "kind": "head" if head else layer.kind,
        "type": plain_type(layer.module).__name__,
        "depth": depth,
        "block": block_of(f.name),
        "inputs": layer.inputs,
        "outputs": layer.outputs,
        "bias": layer.bias is not None,
        "parameters": layer.parameters,
        "rows": f.rows,
        "samples": f.samples,
        "shares_inputs_with": f.shares_inputs_with,
        "fed_by": survey.fed_by.get(f.name),
        "A": spectrum_entry(a),
        "G": spectrum_entry(g),
        "dead": dead,
        "directions": readings,
        "cost": {k: cost[k] for k in ("route", "flops", "bytes", "seconds", "share_of_bound")},
        "verdict": "; ".join(doubts) if doubts else "resolved",
        "notes": notes,
    }


def totals(
    layers: Sequence[dict[str, Any]],
    model: nn.Module,
    bound: dict[str, Any],
    gauges: Sequence[dict[str, Any]],
    tied: Mapping[str, str],
) -> dict[str, Any]:
    """Sums over the layers; a weight that several layers use counts once."""
    sums = dict.fromkeys(("dead", *CLASSES), 0)
    names = {layer["name"] for layer in layers}
    once = [layer for layer in layers if tied.get(layer["name"]) not in names]
    for layer in once:
        sums["dead"] += layer["dead"]["block"]
        for kind in CLASSES:
            sums[kind] += layer["dead"][kind]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        # Of a tied layer the bias is its own.
        "scanned": sum(layer["parameters"] for layer in once)
        + sum(layer["outputs"] for layer in layers if layer not in once and layer["bias"]),
        **sums,
        "gauge_dimension": sum(g["dimension"] for g in gauges),
        "lambda": bound,
    }

"""Two scans side by side: what changed between them, after what makes the comparison unfair."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from deaddir_fast.scan.read_report import CLASSES, Scan, finite, read
from deaddir_fast.scan.report import SCHEMA, Staged, to_json
from deaddir_fast.scan.tables import new_table
from deaddir_fast.scan.tables import order as order_text

Layer = dict[str, Any]
FACTORS = ("A", "G")


@dataclass(frozen=True)
class Comparison:
    """What differs from scan ``a`` to scan ``b``; every change is b − a.

    ``cautions`` say what, other than the network's weights, differs or limits the reading;
    ``remarks`` what else should be known. ``layers`` holds the layers in both, in a's order:
    ``dead`` by class and, for A and G, ``rank``, ``top``, ``bottom``, ``trace`` and
    ``log_pseudo_det`` as {"a", "b", "change"} (the change of the three eigenvalue sizes is the
    natural logarithm of their ratio; null where it is not defined), ``distance`` between the
    spectra (see ``log_spectral_distance``) with ``floored``, and ``directions`` matched by label.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    cautions: list[str]
    remarks: list[str]
    totals: dict[str, Any]
    bounds: dict[str, Any]
    layers: list[Layer]
    only_a: list[str]
    only_b: list[str]

    def as_json(self) -> dict[str, Any]:
        """The content of compare.json."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"schema": SCHEMA, "kind": "comparison"} | fields


def log_spectral_distance(
    a: NDArray[np.float64], b: NDArray[np.float64], floor: float
) -> tuple[float, int]:
    """Root mean square difference of the logarithms of two spectra, in nats.

    Eigenvalues (ascending, equally many) are paired by rank and raised to ``floor`` first: below
    it they are rounding. The second value counts the pairs of which one alone was raised; the
    distance counts them as ending at the floor, so it is a lower bound for them.

    Raises:
        ValueError: if the spectra have different lengths or ``floor`` is not positive.
    """
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} eigenvalues as in a, got {len(b)}")
    if not 0 < floor < math.inf:
        raise ValueError(f"floor: expected a finite number > 0, got {floor}")
    if not len(a):
        return 0.0, 0
    steps = np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor))
    return float(np.sqrt(np.mean(steps**2))), int(np.sum((a < floor) != (b < floor)))


# -------------------------------------------------------------------------------------- fairness


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shape(layer: Layer) -> tuple[Any, ...]:
    return layer["type"], layer["inputs"], layer["outputs"], layer["bias"]


def _cautions(a: Scan, b: Scan, both: list[tuple[Layer, Layer]]) -> list[str]:
    """What makes the two hard to compare, the worst first."""
    one, two = a.report, b.report
    out = []
    if one["data"]["fingerprint"] != two["data"]["fingerprint"]:
        out.append(
            "The data differ: "
            + " against ".join(
                f"{_brief(r['data']['source'])} ({r['data']['samples']:,} samples, fingerprint "
                f"{_brief(r['data']['fingerprint'])})"
                for r in (one, two)
            )
            + "; ranks and dead directions belong to the data."
        )
    for key in ("class", "parameters", "dtype"):
        if one["model"][key] != two["model"][key]:
            out.append(
                f"The models differ in {key}: {one['model'][key]} against {two['model'][key]}."
            )
    for key in sorted({*one["settings"], *two["settings"]}):
        values = [r["settings"].get(key, "not set") for r in (one, two)]
        if values[0] != values[1]:
            out.append(
                f"The setting {key} differs: {_brief(values[0])} against {_brief(values[1])}."
            )
    reshaped = [x["name"] for x, y in both if _shape(x) != _shape(y)]
    if reshaped:
        out.append(
            f"{len(reshaped)} layers have the same name and another type or size: "
            f"{_names(reshaped)}."
        )
    rows = [x["name"] for x, y in both if (x["rows"], x["samples"]) != (y["rows"], y["samples"])]
    if rows:
        out.append(f"{len(rows)} layers were read on another number of rows: {_names(rows)}.")
    limited = [
        x["name"]
        for x, y in both
        if any(side[f]["verdict"] != "resolved" for side in (x, y) for f in FACTORS)
    ]
    if limited:
        out.append(
            f"The rank of A or G is not settled in {len(limited)} layers, so its change is not "
            f"either: {_names(limited)}."
        )
    for key in sorted({*one["versions"], *two["versions"]}):
        values = [r["versions"].get(key, "unknown") for r in (one, two)]
        if values[0] != values[1]:
            out.append(f"Another version of {key}: {values[0]} against {values[1]}.")
    if one["device"] != two["device"]:
        out.append(
            f"Another device: {one['device']} against {two['device']}; rounding differs there."
        )
    return out


def _names(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --------------------------------------------------------------------------------------- changes


def _change(a: float | None, b: float | None) -> dict[str, Any]:
    """Two numbers and their difference; two equal infinities do not differ."""
    change: float | None = None
    if a is not None and b is not None and not (math.isnan(a) or math.isnan(b)):
        change = type(b)(0) if a == b else b - a
    return {"a": a, "b": b, "change": change}


def _ratio(a: float, b: float) -> dict[str, Any]:
    """Two positive numbers and the natural logarithm of b/a."""
    known = 0 < a < math.inf and 0 < b < math.inf
    return {"a": a, "b": b, "change": math.log(b) - math.log(a) if known else None}


def _floor(x: dict[str, Any], y: dict[str, Any], *spectra: NDArray[np.float64]) -> float:
    """The larger tolerance, or fp64 rounding of the largest eigenvalue where that is larger."""
    tops = [float(values[-1]) for values in spectra]
    return max(
        x["tolerance"], y["tolerance"], np.finfo(float).eps * max(tops), np.finfo(float).tiny
    )


def _factor(a: Scan, b: Scan, x: Layer, y: Layer, factor: str) -> dict[str, Any]:
    mine, other = x[factor], y[factor]
    out: dict[str, Any] = {"rank": _change(mine["rank"], other["rank"])}
    out |= {key: _ratio(mine[key], other[key]) for key in ("top", "bottom", "trace")}
    out["log_pseudo_det"] = _change(mine["log_pseudo_det"], other["log_pseudo_det"])
    out |= {"distance": None, "floored": None, "why": None}
    one, two = a.spectrum(x, factor), b.spectrum(y, factor)
    if one is None or two is None:
        out["why"] = "spectrum not stored"
    elif len(one) != len(two):
        out["why"] = f"{len(one)} eigenvalues against {len(two)}"
    elif not len(one):
        out["why"] = "no eigenvalues"
    elif not (finite(mine["tolerance"]) and finite(other["tolerance"])):
        out["why"] = "no tolerance"
    else:
        floor = _floor(mine, other, one, two)
        out["distance"], out["floored"] = log_spectral_distance(one, two, floor)
    return out


def _directions(x: Layer, y: Layer) -> list[dict[str, Any]]:
    """Directions matched by label, the first of a label with the first, and so on."""
    waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for direction in y["directions"]:
        waiting[direction["label"]].append(direction)
    pairs: list[tuple[Any, Any]] = []
    for direction in x["directions"]:
        same = waiting[direction["label"]]
        pairs.append((direction, same.pop(0) if same else None))
    pairs += [(None, direction) for rest in waiting.values() for direction in rest]
    out = []
    for mine, other in pairs:
        entry: dict[str, Any] = {"label": (mine or other)["label"]}
        entry["in"] = "both" if mine and other else "a" if mine else "b"
        for key in ("class", "verdict", "interval"):
            entry[key] = {"a": mine and mine[key], "b": other and other[key]}
        for key in ("order", "jet", "curvature"):
            entry[key] = _change(mine and mine[key], other and other[key])
        out.append(entry)
    return out


def _bounds(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """λ of both, and what may be said about its change from the bounds alone."""
    if any(math.isnan(side[end]) for side in (a, b) for end in ("lower", "upper")):
        says = "a bound is not a number: nothing can be said about a change of λ"
    elif b["lower"] > a["upper"]:
        says = "λ has grown: the bounds do not overlap"
    elif b["upper"] < a["lower"]:
        says = "λ has fallen: the bounds do not overlap"
    elif a["lower"] == a["upper"] == b["lower"] == b["upper"]:
        says = "λ is the same"
    else:
        says = "the bounds overlap: no change of λ can be claimed"
    return {"a": a, "b": b, "verdict": says}


def _about(scan: Scan) -> dict[str, Any]:
    report = scan.report
    keys = ("created", "model", "data", "device")
    return {"folder": str(scan.folder)} | {key: report[key] for key in keys}


def between(a: Scan, b: Scan) -> Comparison:
    """Lay two scans that were read side by side."""
    others = {layer["name"]: layer for layer in b.layers}
    both = [(x, others[x["name"]]) for x in a.layers if x["name"] in others]
    shared = {x["name"] for x, _ in both}
    layers = []
    for x, y in both:
        entry = {key: x[key] for key in ("name", "kind", "depth", "block", "parameters")}
        entry["dead"] = {k: _change(x["dead"][k], y["dead"][k]) for k in ("block", *CLASSES)}
        entry |= {factor: _factor(a, b, x, y, factor) for factor in FACTORS}
        entry["directions"] = _directions(x, y)
        entry["verdict"] = {"a": x["verdict"], "b": y["verdict"]}
        layers.append(entry)
    only_a = [x["name"] for x in a.layers if x["name"] not in shared]
    only_b = [y["name"] for y in b.layers if y["name"] not in shared]
    cautions = _cautions(a, b, both)
    for names, which in ((only_a, "first"), (only_b, "second")):
        if names:
            cautions.append(
                f"{len(names)} layers are in the {which} scan only: {_names(names)}; "
                "the totals count them."
            )
    if not both:
        cautions.insert(0, "No layer of one scan has the name of a layer of the other.")
    remarks = []
    if a.report["model"]["fingerprint"] == b.report["model"]["fingerprint"]:
        remarks.append("Both scans read the same weights (their fingerprints are equal).")
    keys = ("parameters", "scanned", "dead", *CLASSES)
    one, two = a.report["totals"], b.report["totals"]
    return Comparison(
        a=_about(a),
        b=_about(b),
        cautions=cautions,
        remarks=remarks,
        totals={key: _change(one[key], two[key]) for key in keys},
        bounds=_bounds(one["lambda"], two["lambda"]),
        layers=layers,
        only_a=only_a,
        only_b=only_b,
    )


def compare(a: Path, b: Path, *, out: Path | None = None) -> Comparison:
    """Compare the scans in two folders.

    With ``out``, compare.json and compare.html are written there (the page without pictures where
    matplotlib is missing).

    Raises:
        ReportError: if a folder is not that of a finished scan of this schema.
        OSError: if ``out`` cannot be written.
    """
    first, second = read(a), read(b)
    found = between(first, second)
    if out is not None:
        from deaddir_fast.scan.compare_html import render

        page = render(found, first, second)
        with Staged(Path(out)) as stage:
            (stage / "compare.json").write_bytes(
                to_json(found.as_json()).encode("utf-8", "replace")
            )
            (stage / "compare.html").write_bytes(page.encode("utf-8", "replace"))
    return found


# -------------------------------------------------------------------------------------- terminal


def moved(layer: Layer) -> float:
    """How much a layer changed: the larger distance between spectra; infinite where unknown."""
    distances = [layer[f]["distance"] for f in FACTORS]
    return math.inf if None in distances else max(distances)


def _differs(direction: dict[str, Any]) -> bool:
    """Whether class or jet differ, or the fitted orders by more than their intervals allow."""
    if direction["in"] != "both" or any(
        direction[key]["a"] != direction[key]["b"] for key in ("class", "jet")
    ):
        return True
    one, two = direction["interval"]["a"], direction["interval"]["b"]
    if one is None or two is None:
        return bool(direction["order"]["a"] != direction["order"]["b"])
    return bool(one[1] < two[0] or two[1] < one[0])


def changed_orders(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """Layer and direction wherever class, order or jet differ or one side alone has it.

    Fitted orders whose intervals overlap do not differ.
    """
    return [
        (layer["name"], direction)
        for layer in comparison.layers
        for direction in layer["directions"]
        if _differs(direction)
    ]


def _signed(value: float | None) -> str:
    if value is None:
        return "?"
    if isinstance(value, int):
        return f"{value:+,}" if value else "0"
    return f"{value:+.3g}" if value else "0"


def _plain(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _step(side: dict[str, Any]) -> str:
    texts = ["?" if side[k] is None else order_text(side[k]) for k in "ab"]
    return texts[0] if texts[0] == texts[1] else " → ".join(texts)


def show(comparison: Comparison, console: Console, *, most: int = 25) -> None:
    """Print cautions, totals, λ, the layers that moved most and the orders that changed."""
    for side in ("a", "b"):
        about = getattr(comparison, side)
        console.print(
            Text(f"{side}: {about['folder']}, {about['model']['source']}, {about['created']}")
        )
    for caution in comparison.cautions:
        console.print(Text(f"! {caution}", "yellow"))
    for remark in comparison.remarks:
        console.print(Text(remark, "dim"))
    table = new_table(
        "Totals", ("dimensions", "left"), *((k, "right") for k in ("a", "b", "change"))
    )
    for key, side in comparison.totals.items():
        table.add_row(key, f"{side['a']:,}", f"{side['b']:,}", _signed(side["change"]))
    console.print(table)
    ends = [
        f"{s['lower']:g} ≤ λ ≤ {order_text(s['upper'])}"
        for s in (comparison.bounds["a"], comparison.bounds["b"])
    ]
    console.print(Text(f"{ends[0]}  →  {ends[1]}: {comparison.bounds['verdict']}"))
    ranking = sorted(comparison.layers, key=lambda layer: -moved(layer))
    table = new_table(
        "Layers, the most changed first (changes from a to b; distances of spectra in nats)",
        ("layer", "left"),
        *((name, "right") for name in ("dead", *CLASSES, "rank A", "rank G", "dist A", "dist G")),
        *((name, "right") for name in ("ln det A", "ln det G")),
    )
    for layer in ranking[:most]:
        table.add_row(
            Text(layer["name"]),
            *(_signed(layer["dead"][key]["change"]) for key in ("block", *CLASSES)),
            *(_signed(layer[f]["rank"]["change"]) for f in FACTORS),
            *(_plain(layer[f]["distance"]) for f in FACTORS),
            *(_signed(layer[f]["log_pseudo_det"]["change"]) for f in FACTORS),
        )
    console.print(table)
    if len(ranking) > most:
        console.print(Text(f"{len(ranking) - most} layers that changed less are not shown", "dim"))
    changed = changed_orders(comparison)
    if not changed:
        console.print(Text("No direction changed its class, order or jet.", "dim"))
        return
    table = new_table(
        "Directions whose class or order changed",
        *((name, "left") for name in ("layer", "direction", "in", "class")),
        *((name, "right") for name in ("order", "jet")),
    )
    for name, direction in changed[:most]:
        classes = [direction["class"][k] or "–" for k in "ab"]
        table.add_row(
            Text(name),
            Text(direction["label"]),
            direction["in"],
            classes[0] if classes[0] == classes[1] else " → ".join(classes),
            *(_step(direction[key]) for key in ("order", "jet")),
        )
    console.print(table)
    if len(changed) > most:
        console.print(Text(f"{len(changed) - most} more directions are not shown", "dim"))

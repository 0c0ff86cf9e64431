"""Synthetic scans: folders as ``deaddir scan`` writes them, with contents chosen by the test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from deaddir_fast.scan.report import to_json

RADII = [float(r) for r in np.geomspace(1e-3, 0.3, 9)]
CLASSES = ("gauge", "algebraic", "data", "singular", "unresolved")


def factor(spectrum: np.ndarray, limit: int = 10**6) -> dict[str, Any]:
    """The entry of a Kronecker factor whose eigenvalues are given, worked out from them."""
    tolerance = 1e-9 * float(spectrum[-1])
    live = spectrum[spectrum > tolerance]
    return {
        "form": "matrix",
        "dimension": len(spectrum),
        "rank": len(live),
        "rank_limit": limit,
        "dead": len(spectrum) - len(live),
        "top": float(spectrum[-1]),
        "bottom": float(live[0]),
        "trace": float(live.sum()),
        "log_pseudo_det": float(np.log(live).sum()),
        "tolerance": tolerance,
        "ambiguous": 0,
        "verdict": "resolved" if limit > len(live) else f"limited by samples: {limit} rows",
    }


def direction(label: str, kind: str, order: float | None, **changes: Any) -> dict[str, Any]:
    """A direction with the ray K = t^(2k), F = 2k(2k − 1)/… of its order: F = k² t^(2(k−1)) · 2."""
    ray = order is not None and math.isfinite(order)
    k = order if ray else 1.0
    entry = {
        "label": label,
        "class": kind,
        "gauge": "rescaling" if kind == "gauge" else None,
        "kfac": 1.1e-12,
        "curvature": 3e-15,
        "stderr": 1e-16,
        "radii": RADII if ray else [],
        "fisher": [2 * k * k * t ** (2 * (k - 1)) for t in RADII] if ray else [],
        "fisher_stderr": [0.1 * k * k * t ** (2 * (k - 1)) for t in RADII] if ray else [],
        "kl": [t ** (2 * k) for t in RADII] if ray else [],
        "order": order,
        "interval": [k - 0.0123, k + 0.0123] if ray else None,
        "jet": order,
        "predicted": order,
        "contribution": None if order is None else (0.0 if not ray else 1 / (2 * k)),
        "verdict": "resolved" if order is not None else "unresolved: no window of a power",
        "why": f"an example of a {kind} direction",
    }
    return entry | changes


def layer(name: str, depth: int, block: int | None, **changes: Any) -> dict[str, Any]:
    """A linear layer of 6 (+1) inputs and 4 outputs."""
    dead = dict.fromkeys(CLASSES, 0)
    entry = {
        "name": name,
        "kind": "linear",
        "type": "Linear",
        "depth": depth,
        "block": block,
        "inputs": 6,
        "outputs": 4,
        "bias": True,
        "parameters": 28,
        "rows": 512,
        "samples": 64,
        "shares_inputs_with": None,
        "A": None,
        "G": None,
        "dead": {"block": 0, **dead},
        "directions": [],
        "cost": {
            "route": "hooks, C++ gram_packed",
            "flops": 1.25e9,
            "bytes": 3.5e8,
            "seconds": 0.125,
            "share_of_bound": 0.7,
        },
        "verdict": "resolved",
        "notes": [],
    }
    return entry | changes


def report(layers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A report around the layers, its totals added up from them."""
    total = {kind: sum(entry["dead"][kind] for entry in layers) for kind in CLASSES}
    scanned = sum(entry["parameters"] for entry in layers)
    entry = {
        "schema": 1,
        "kind": "scan",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"deaddir_fast": "0.1.0", "torch": "2.11.0", "python": "3.12.1"},
        "device": "cpu: a processor, 2 threads",
        "model": {
            "source": "models/toy",
            "class": "ToyModel",
            "parameters": scanned + 12,
            "dtype": "float32",
            "fingerprint": "5eed",
        },
        "data": {
            "source": "sentences.txt",
            "samples": 64,
            "tokens": 512,
            "shards": 4,
            "fingerprint": "da7a",
        },
        "settings": {
            "likelihood": "categorical",
            "fisher": "mc",
            "draws": 1,
            "seed": 0,
            "directions_per_layer": 4,
            "radii": RADII,
        },
        "cost": {
            "seconds": {"factors": 1.2, "spectra": 0.3, "gauges": 0.1, "rays": 2.0},
            "peak_bytes": 123456789,
            "flops": 1.0e12,
        },
        "layers": layers,
        "skipped": [],
        "gauges": [],
        "totals": {
            "parameters": scanned + 12,
            "scanned": scanned,
            "dead": sum(entry["dead"]["block"] for entry in layers),
            **total,
            "lambda": {"lower": 0.0, "upper": 12.5, "verdict": "unresolved: lines bound it above"},
        },
        "notes": [],
    }
    return entry | changes


def write(folder: Path, content: dict[str, Any], spectra: dict[str, np.ndarray]) -> Path:
    """Write report.json and spectra.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(to_json(content), encoding="utf-8")
    arrays = {k: np.ascontiguousarray(v, dtype=np.float64) for k, v in spectra.items()}
    save_file(arrays, folder / "spectra.safetensors")
    return folder


def falling(size: int, decades: float, dead: int = 0, scale: float = 1.0) -> np.ndarray:
    """Eigenvalues, ascending: ``dead`` at the rounding floor, the others a geometric row."""
    live = scale * np.geomspace(10.0**-decades, 1.0, size - dead)
    return np.concatenate([np.full(dead, 1e-17 * scale), live])


def small(folder: Path, *, scale: float = 1.0, dead: int = 2, order: float = 2.0) -> Path:
    """Three layers without blocks: one gauge, one singular direction, one dead input."""
    spectra = {}
    layers = []
    for depth, name in enumerate(("up", "middle", "down")):
        spectra[f"A/{name}"] = falling(7, 4, dead if depth == 1 else 0, scale)
        spectra[f"G/{name}"] = falling(4, 2)
        layers.append(
            layer(name, depth, None)
            | {"A": factor(spectra[f"A/{name}"]), "G": factor(spectra[f"G/{name}"])}
        )
    dimensions = 4 * dead
    layers[1]["dead"] |= {"block": dimensions + 3, "algebraic": dimensions, "gauge": 1}
    layers[1]["dead"] |= {"singular": 2}
    layers[1]["directions"] = [
        direction("input 3 is dead", "algebraic", math.inf),
        direction("unit 0 is off", "singular", order),
        direction("rescaling of unit 1", "gauge", math.inf, jet=math.inf),
    ]
    layers[2]["directions"] = [direction("smallest of A ⊗ G", "unresolved", None, predicted=None)]
    return write(folder, report(layers), spectra)


PARTS = (
    ("attention.query", 32, 32),
    ("attention.key", 32, 32),
    ("attention.value", 32, 32),
    ("attention.output", 32, 32),
    ("mlp.up", 32, 64),
    ("mlp.down", 64, 32),
)


def transformer(folder: Path, blocks: int, *, size: int = 1, directions: int = 4) -> Path:
    """A made-up transformer: embedding, ``6 blocks`` linear layers, head; every class occurs."""
    rng = np.random.default_rng(blocks)
    spectra: dict[str, np.ndarray] = {}
    layers: list[dict[str, Any]] = []

    def add(name: str, block: int | None, inputs: int, outputs: int, **changes: Any) -> None:
        depth = len(layers)
        off = int(rng.integers(0, 4)) if block is not None else 0
        a = falling(inputs + 1, rng.uniform(2, 5), off + (inputs // 4 if block == 1 else 0))
        g = falling(outputs, rng.uniform(1, 3), 1)
        spectra[f"A/{name}"], spectra[f"G/{name}"] = a, g
        limit = 40 if block == 2 and inputs > 40 else 10**6
        null = off * outputs
        dead = {
            "gauge": min(inputs, 3 * depth),
            "algebraic": null,
            "data": (inputs // 4) * outputs if block == 1 else 0,
            "singular": int(rng.integers(0, 5)),
            "unresolved": (inputs + 1) * 1,
        }
        if block == 0 and name.endswith("key"):
            dead = dict.fromkeys(dead, 0)
        rows = [
            direction(f"input {depth} is dead", "algebraic", math.inf),
            direction(f"unit {depth % 7} is off", "singular", float(2 + depth % 3)),
            direction("rescaling of queries and keys", "gauge", math.inf),
            direction("smallest of A ⊗ G", "unresolved", None, jet=None),
            direction("largest of A ⊗ G", "live", 1.0, kfac=1.0, curvature=2.0),
        ][:directions]
        layers.append(
            layer(name, depth, block)
            | {
                "inputs": inputs,
                "outputs": outputs,
                "parameters": (inputs + 1) * outputs,
                "A": factor(a, limit),
                "G": factor(g),
                "dead": {"block": sum(dead.values()), **dead},
                "directions": rows,
            }
            | changes
        )

    add("embeddings.word", None, 48 * size, 32 * size, kind="embedding", type="Embedding")
    for block in range(blocks):
        for part, inputs, outputs in PARTS:
            add(f"encoder.layer.{block}.{part}", block, inputs * size, outputs * size)
    add("head", None, 32 * size, 48 * size, kind="head")
    skipped = [{"name": "odd", "type": "Odd", "parameters": 12, "why": "no adapter for Odd"}]
    gauges = [
        {
            "name": "queries and keys",
            "group": "GL(8)",
            "dimension": 64,
            "parameters": ["encoder.layer.0.attention.query.weight"],
        }
    ]
    content = report(layers, skipped=skipped, gauges=gauges, notes=["A made-up network."])
    return write(folder, content, spectra)

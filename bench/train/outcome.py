"""What a trained network shows: how far its gauges drifted, and which layers can be read."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deaddir_fast as dd
from bench.train.problems import Problem
from bench.train.run import Spec, trained


def drift(problem: Problem, model: nn.Module, seed: int) -> dict[str, Any]:
    """How far a training moved what gradient flow conserves.

    Returns:
        ``median`` and ``largest`` over the gauges, of ``dd.gauge.Drift`` from the start to the end
        of the training in fp64; ``gauges`` counts them.
    """
    start = problem.model(seed).double()
    recorder = dd.gauge.Drift(start, problem.gauges())
    start.load_state_dict(model.state_dict())
    found = recorder.update()
    return {"median": statistics.median(found), "largest": max(found), "gauges": len(found)}


def is_readable(layer: dict[str, Any]) -> bool:
    """Whether the rates of a scanned layer are known.

    The scan measured a direction in it besides the live one that it compares with, each direction
    measured has an order (a number, or flat), the spectra of A and G are resolved, and every null
    dimension has a class.
    """
    looked_at = [d for d in layer["directions"] if d["part"] != "live"]
    return bool(looked_at) and layer["verdict"] == "resolved"


def readable(problem: Problem, model: nn.Module, out: Path) -> dict[str, Any]:
    """Scan a trained network on training batches; goes on with a scan that was killed.

    Returns:
        ``layers`` scanned, ``readable`` ones, and of the others ``reasons`` {name: why};
        ``dead`` is the sum of the layers' null dimensions.
    """
    report = dd.scan(
        model, problem.scan_batches(), out=out, directions_per_layer=2, ray_samples=2, gauges=False
    )
    reasons = {
        name: "no direction measured" if layer["verdict"] == "resolved" else layer["verdict"]
        for name, layer in report.layers.items()
        if not is_readable(layer)
    }
    return {
        "layers": len(report.layers),
        "readable": len(report.layers) - len(reasons),
        "dead": report.data["totals"]["dead"],
        "reasons": reasons,
    }


def outcome(problem: Problem, which: Spec, runs: Path, scans: Path) -> dict[str, Any]:
    """Both, of a finished training."""
    torch.set_num_threads(1)
    model = trained(problem, which, runs)
    return {
        "drift": drift(problem, model, which.seed),
        "scan": readable(problem, model, scans / which.name),
    }

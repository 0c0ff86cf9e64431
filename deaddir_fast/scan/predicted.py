"""What ``deaddir predict`` prints."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from deaddir_fast.rates.predict import LayerRate, Rates, predict
from deaddir_fast.scan.reference import build, is_reference


def _is_reference(spec: str) -> bool:
    """``module:callable`` rather than ``mlp:gelu``."""
    return is_reference(spec) and spec.partition(":")[0] not in ("mlp", "moe")


def rates(spec: str, unit: int, bias: str) -> Rates:
    """Rates of primitives or of a module named on the command line."""
    if _is_reference(spec):
        return predict(build("SPEC", spec).double().eval(), unit=unit, bias=bias)
    return predict(spec, unit=unit, bias=bias)


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: names instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return "unknown" if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def as_json(found: Rates) -> dict[str, Any]:
    """Everything, orders as numbers or ``"inf"`` or ``"unknown"``."""
    return dict(_finite(asdict(found)))


def _number(value: float) -> str:
    return "?" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:g}"


def _range(order: float, apparent: float) -> str:
    """A slope, and what it looks like at finite t where that differs."""
    text = _number(2 * order)
    return text if apparent == order or math.isnan(order) else f"{text} … {_number(2 * apparent)}"


def _row(layer: LayerRate) -> list[str]:
    forward, out, backward = layer.apparent
    both = layer.input_side and layer.output_side
    return [
        layer.name,
        _range(layer.forward, forward) if layer.input_side else "–",
        _range(layer.backward, backward) if layer.output_side else "–",
        _range(layer.forward + layer.backward, forward + backward) if both else "–",
        _range(layer.forward_out + layer.backward, out + backward) if layer.output_side else "–",
    ]


def show(found: Rates, console: Console) -> None:
    """Print tables of layers and blocks and whether rates add."""
    table = Table(title=f"slopes in t of unit {found.unit}, as t → 0 … at finite t")
    table.add_column("layer")
    for heading in ("A", "G", "A⊗G = Fisher", "output A + G"):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        table.add_row(*_row(layer))
    console.print(table)
    if found.blocks:
        blocks = Table(title="blocks: order k becomes …")
        for heading in ("block", "k →", "adds to G's order"):
            blocks.add_column(heading, justify="left" if heading == "block" else "right")
        for block in found.blocks:
            law = f"{_number(block.degree)}·k + {_number(block.weight)}"
            if math.isnan(block.degree):
                law = "0,1,2,3 → " + ",".join(_number(v) for v in block.forward)
            blocks.add_row(block.name, law, _number(block.backward))
        console.print(blocks)
        console.print("rates add" if found.additive else "rates do not add:")
    for line in (*found.reasons, *found.kernels, *found.notes):
        console.print(f"  {line}", markup=False)

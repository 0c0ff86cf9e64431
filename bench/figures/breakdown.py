"""Where the rate law breaks: local slope of the directional Fisher against the distance.

Exact Fisher curvature from t = 1e-3 to 3 for chains with one dead unit, and the window that
``fit_rate`` takes. Large t bend the slope; an offset of the point or rounding floors it at small t.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import deaddir_fast as dd
from bench.figures._models import DOUBLE
from bench.figures._style import DEAD, INK, LIVE, array, note
from deaddir_fast.scan.demo_models import dead_unit_chain, inputs_of_width

SIZE = (12.0, 6.6)
DEPTH = 4
OFFSET = 0.01

Ray = tuple[nn.Module, dict[str, Tensor], str]


def _activated(chain: nn.Sequential) -> nn.Sequential:
    """The chain with tanh between its layers."""
    layers: list[nn.Module] = []
    for layer in chain:
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _offset(chain: nn.Sequential, direction: dict[str, Tensor]) -> nn.Sequential:
    """The chain OFFSET short of the singular point along the direction, as after training."""
    length = sum(float(u.square().sum()) for u in direction.values()) ** 0.5
    with torch.no_grad():
        for name, p in chain.named_parameters():
            p += OFFSET * direction[name][0] / length
    return chain


def _turned(chain: nn.Sequential, direction: dict[str, Tensor]) -> Ray:
    """fp32, and every hidden layer in rotated coordinates: the dead path is a sum that cancels."""
    draw = torch.Generator().manual_seed(2)
    before = torch.eye(chain[0].in_features, dtype=DOUBLE)
    turned = {}
    with torch.no_grad():
        for i, layer in enumerate(chain):
            last = i == len(chain) - 1
            size = layer.out_features
            q = torch.randn(size, size, dtype=DOUBLE, generator=draw)
            after = torch.eye(size, dtype=DOUBLE) if last else torch.linalg.qr(q).Q
            layer.weight.copy_(after @ layer.weight @ before.T)
            turned[f"{i}.weight"] = (after @ direction[f"{i}.weight"][0] @ before.T)[None]
            before = after
    return chain.float(), {k: v.float() for k, v in turned.items()}, "gaussian"


def _cases() -> dict[str, Ray]:
    """Each with its own copy of one chain."""

    def chain() -> tuple[nn.Sequential, dict[str, Tensor]]:
        return dead_unit_chain(DEPTH, torch.Generator().manual_seed(4))

    model, u = chain()
    return {
        "linear chain": (model, u, "gaussian"),
        "tanh chain": (_activated(chain()[0]), {f"{2 * int(k[0])}.weight": v for k, v in u.items()},
                       "gaussian"),
        "linear chain, softmax": (chain()[0], u, "categorical"),
        f"linear chain, {OFFSET:g} off": (_offset(*chain()), u, "gaussian"),
        "linear chain, rotated, fp32": _turned(*chain()),
    }  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """Fisher curvature, its local slope and the fit of each case."""
    radii = torch.logspace(-3, np.log10(3.0), 25 if quick else 70, dtype=DOUBLE)
    x = inputs_of_width(3, 40, torch.Generator().manual_seed(0))
    rows = []
    for name, (model, direction, likelihood) in _cases().items():
        single = next(model.parameters()).dtype == torch.float32
        inputs = x.float() if single else x
        seen = dd.ray_curvature(model, inputs, direction, radii, likelihood=likelihood)
        values = seen.fisher[0]
        fit = dd.fit_rate(radii, values.float() if single else values)
        rows.append(
            {
                "name": name,
                "order": DEPTH,
                "fisher": values,
                "slope": np.gradient(values.log().numpy(), radii.log().numpy()),
                "fit": {
                    "order": fit.order,
                    "interval": fit.order_interval,
                    "window": fit.window,
                    "model": fit.model,
                    "floor": fit.floor,
                    "offset": fit.offset,
                    "verdict": fit.verdict,
                },
            }
        )
    return {"radii": radii, "rows": rows}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """One panel for each case, and the text that reads them in the last."""
    radii = array(measured["radii"])
    axes = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    for ax, row in zip(axes, measured["rows"], strict=False):
        expected = 2 * (row["order"] - 1)
        fit = row["fit"]
        ax.axhline(expected, lw=1, ls="--", color=DEAD, zorder=1)
        low, high = array(fit["window"])
        if np.isfinite(low) and fit["verdict"] == "resolved":
            ax.axvspan(low, high, color=LIVE, alpha=0.12, lw=0, zorder=0)
        ax.plot(radii, array(row["slope"]), "-o", ms=2.6, lw=0.9, color=INK, mfc="white", zorder=2)
        ax.set_xscale("log")
        ax.set_title(row["name"])
        if fit["verdict"] == "resolved":
            order, (low, high) = float(fit["order"]), array(fit["interval"])
            text = f"k = {order:.4f} ± {max(order - low, high - order):.0e}\n{fit['model']}"
        else:
            text = textwrap.fill(fit["verdict"], 44)
        note(ax, 0.97, 0.05, text, color=INK, ha="right")
    axes[0].set_ylim(-3, 9)
    for ax in axes[3:5]:
        ax.set_xlabel("distance t")
    axes[2].tick_params(labelbottom=True)
    axes[2].set_xlabel("distance t")
    for ax in axes[::3]:
        ax.set_ylabel("d log uᵀFu / d log t")
    for ax in axes[len(measured["rows"]) :]:
        ax.axis("off")
        note(
            ax,
            0.04,
            0.5,
            f"dashed: 2(k − 1) for the order k = {measured['rows'][0]['order']}\n"
            "by construction\n"
            "shaded: the window in which the fitted\npower dominates\n"
            "numbers: order read and its 95 % interval,\nthe form fitted, or why there is none",
            va="center",
            fontsize=9.5,
            linespacing=1.6,
        )

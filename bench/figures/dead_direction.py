"""What a dead direction is: the landscape K = θ1⁴ + θ2², its level sets, and its Fisher curvature.

K is the KL divergence of the means (√2 θ1², √2 θ2) from the true one at 0, measured with
``ray_curvature`` on a polar grid; the orders are those of ``ray_orders``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

import deaddir_fast as dd
from bench.figures._models import DOUBLE, ONE, MeanMap
from bench.figures._style import DEAD, GREY, INK, LIVE, MARK, array, note

SIZE = (13.0, 4.4)
REACH = 1.1


def _model() -> MeanMap:
    root = math.sqrt(2)
    return MeanMap(lambda p: root * torch.stack([p[0] ** 2, p[1]]), (0.0, 0.0))


def measure(quick: bool) -> dict[str, Any]:
    """KL on a polar grid, Fisher curvature along both axes and their orders."""
    angles = torch.linspace(0, 2 * math.pi, 25 if quick else 121, dtype=DOUBLE)
    # Denser towards 0, where K is small.
    radii = REACH * math.sqrt(2) * torch.linspace(0, 1, 14 if quick else 60, dtype=DOUBLE) ** 1.5
    spokes = {"theta": torch.stack([angles.cos(), angles.sin()], 1)}
    model = _model()
    kl = dd.ray_curvature(model, ONE, spokes, radii, likelihood="gaussian").kl
    axes = {"theta": torch.eye(2, dtype=DOUBLE)}
    small = torch.logspace(-3, 0, 9 if quick else 22, dtype=DOUBLE)
    along = dd.ray_curvature(model, ONE, axes, small, likelihood="gaussian")
    fits = dd.fit_rate(small, along.fisher)
    return {
        "angles": angles,
        "radii": radii,
        "kl": kl,
        "small": small,
        "fisher": along.fisher,
        "orders": dd.ray_orders(model, ONE, axes, likelihood="gaussian").orders,
        "slopes": [f.slope if f.resolved else math.nan for f in fits],
    }


def _bowl(radii: np.ndarray, kl: np.ndarray, rim: float) -> tuple[np.ndarray, np.ndarray]:
    """Each spoke up to where it reaches the level ``rim``: radii and values (spokes, 40)."""
    parts = np.linspace(0, 1, 40)
    shown = [parts * np.interp(rim, values, radii) for values in kl]
    heights = [PchipInterpolator(radii, v)(r) for r, v in zip(shown, kl, strict=True)]
    return np.array(shown), np.array(heights)


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Landscape, level sets, and the decay along the dead direction."""
    angle, radius = np.meshgrid(array(measured["angles"]), array(measured["radii"]), indexing="ij")
    x, y, kl = radius * np.cos(angle), radius * np.sin(angle), array(measured["kl"])
    orders = array(measured["orders"])
    levels = np.array([0.003, 0.03, 0.12, 0.3, 0.6, 1.0])
    grid = figure.add_gridspec(1, 3, width_ratios=(1.15, 1, 1))

    scene = figure.add_subplot(grid[0], projection="3d", computed_zorder=False)
    reach, height = _bowl(array(measured["radii"]), kl, 1.0)
    spokes = array(measured["angles"])[:, None]
    scene.plot_surface(reach * np.cos(spokes), reach * np.sin(spokes), height, cmap="Blues",
                       alpha=0.75, lw=0, rcount=150, ccount=150)  # fmt: skip
    t = np.linspace(-1, 1, 101)
    scene.plot(t, 0 * t, t**4, color=DEAD, lw=2.2, zorder=5)
    scene.plot(0 * t, t, t**2, color=LIVE, lw=2.2, zorder=5)
    scene.scatter([0], [0], [0], color=INK, s=18, zorder=6)
    scene.view_init(elev=28, azim=-62)
    scene.set_xlabel("θ₁ (dead)", labelpad=-8)
    scene.set_ylabel("θ₂ (live)", labelpad=-8)
    scene.set_zlabel("K", labelpad=-10)
    scene.set_xticks([-1, 0, 1])
    scene.set_yticks([-1, 0, 1])
    scene.set_zticks([0, 0.5, 1])
    scene.tick_params(pad=-3, labelsize=8)
    scene.set_title("KL divergence K = θ₁⁴ + θ₂²")

    above = figure.add_subplot(grid[1], aspect="equal")
    lines = above.contour(x, y, kl, levels, colors=GREY, linewidths=0.9)
    spoke = int(np.argmin(np.abs(array(measured["angles"]) - 1.74 * math.pi)))
    at = np.interp(levels[2:], kl[spoke], radius[spoke])
    places = np.stack([at * np.cos(angle[spoke, 0]), at * np.sin(angle[spoke, 0])], 1)
    above.clabel(lines, levels[2:], manual=places, fmt=lambda v: f"{v:g}", fontsize=8)
    above.axhline(0, lw=1.8, color=DEAD, zorder=0)
    above.axvline(0, lw=1.8, color=LIVE, zorder=0)
    above.plot(0, 0, "o", color=INK, ms=5)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    above.annotate("dead: K ~ t⁴", (0.98, 0), (0, 4), textcoords="offset points", color=DEAD,
                   ha="right", bbox=box)  # fmt: skip
    above.annotate("live: K ~ t²", (0, 0.92), (6, 0), textcoords="offset points", color=LIVE,
                   va="center", bbox=box)  # fmt: skip
    above.set_xlim(-REACH, REACH)
    above.set_ylim(-REACH, REACH)
    above.set_xticks([-1, -0.5, 0, 0.5, 1])
    above.set_yticks([-1, -0.5, 0, 0.5, 1])
    above.set_xlabel("θ₁")
    above.set_ylabel("θ₂")
    above.set_title("Level sets stretch along it")

    decay = figure.add_subplot(grid[2], xscale="log", yscale="log")
    small = array(measured["small"])
    for i, (colour, name) in enumerate(((DEAD, "dead θ₁"), (LIVE, "live θ₂"))):
        values = array(measured["fisher"][i])
        decay.plot(small, values[0] * (small / small[0]) ** (2 * orders[i] - 2), lw=1, color=colour)
        decay.plot(small, values, color=colour, **MARK)
        text = f"{name}: order {orders[i]:g}, slope {abs(float(measured['slopes'][i])):.2f}"
        note(decay, 0.97, 0.05 + 0.07 * i, text, color=colour, ha="right", fontsize=9.5)
    decay.set_xlabel("distance t")
    decay.set_ylabel("uᵀF(tu)u")
    decay.set_title("Fisher curvature dies on it only")

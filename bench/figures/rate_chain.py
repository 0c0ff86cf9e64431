"""One KL order, three faces: Fisher curvature, sectional curvature and Fisher volume.

The surface (t^k + w², w, t w) on w = 0, as the mean of a Gaussian model. Fisher curvature from
``ray_curvature``, sectional curvature in the plane (t, w) from ``curvature_ray``; the volume of
{|curvature| > M} on the slice integrates √det F up to where the measured curvature crosses M. Its
slope is a least-squares one over the upper half of log M: corrections are powers of M^(-1/(k-1)),
which are no Taylor series for ``fit_rate``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

import deaddir_fast as dd
from bench.figures._models import ONE, axis, umbrella
from bench.figures._style import COLOURS, MARK, array, note
from deaddir_fast.theory import CurvatureRay

SIZE = (12.0, 4.3)
ORDERS = (2, 3, 4)


def _volumes(ray: CurvatureRay, read: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds M and Fisher volumes of {|curvature| > M} on the slice."""
    t, size = ray.radii.numpy(), ray.curvature.abs().numpy()
    edges = np.geomspace(2 * t[0], 0.3, count)
    bounds = np.exp(PchipInterpolator(np.log(t), np.log(size))(np.log(edges)))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    radii = edges[:, None] * (nodes + 1) / 2
    metric = np.array([p.metric for p in read(radii.ravel()).points])
    density = np.sqrt(metric[:, 0] * metric[:, 2] - metric[:, 1] ** 2).reshape(radii.shape)
    return bounds, (density * weights).sum(1) * edges / 2


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope over the upper half in x, and how much it differs from that over the upper quarter."""
    tail = np.argsort(x)[len(x) // 2 :]
    slope = float(np.polyfit(x[tail], y[tail], 1)[0])
    end = tail[len(tail) // 2 :]
    return slope, abs(slope - float(np.polyfit(x[end], y[end], 1)[0]))


def _steady(error: float) -> str:
    """A verdict on a slope from its drift."""
    return "resolved" if error < 0.01 else f"unresolved: the slope still drifts by {error:.2g}"


def measure(quick: bool) -> dict[str, Any]:
    """Curves and fitted slopes for each order."""
    radii = torch.logspace(-3, -0.3, 13 if quick else 28, dtype=torch.float64)
    u, v = ({"theta": axis(i, 2)} for i in (0, 1))
    rows = []
    for k in ORDERS:
        model = umbrella(k)

        def read(t: Any, model: Any = model) -> CurvatureRay:
            return dd.curvature_ray(model, ONE, u, v, t, likelihood="gaussian", within="plane")

        along = {name: x[None] for name, x in u.items()}
        fisher = dd.ray_curvature(model, ONE, along, radii, likelihood="gaussian").fisher[0]
        ray = read(radii)
        rate = ray.rate()
        bounds, volumes = _volumes(ray, read, 8 if quick else 16)
        volume, error = _slope(np.log(bounds), np.log(volumes))
        metric_fit = dd.fit_rate(radii, fisher)
        exponent = dd.theory.curvature_volume(k)
        rows.append(
            {
                "k": k,
                "radii": radii,
                "fisher": fisher,
                "curvature": ray.curvature,
                "bounds": bounds,
                "volumes": volumes,
                "slopes": [metric_fit.slope, -rate.exponent, volume],
                "stderr": [metric_fit.stderr, rate.fit.stderr, error],
                "verdicts": [metric_fit.verdict, rate.verdict, _steady(error)],
                "predicted": [2 * (k - 1), -2 * (k - 1), -exponent],
            }
        )
    return {"rows": rows}


PANELS = (
    ("radii", "fisher", "distance t", "uᵀFu", "Fisher:  $t^{\\,2(k-1)}$"),
    ("radii", "curvature", "distance t", "|sectional curvature|", "Curvature:  $t^{-2(k-1)}$"),
    (
        "bounds",
        "volumes",
        "bound M",
        "Fisher volume",
        "Volume of |curvature| > M:  $M^{-k/(2(k-1))}$",
    ),
)

CORNERS = ((0.97, 0.04, "right"), (0.97, 0.72, "right"), (0.04, 0.04, "left"))


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Three log-log panels, points and the predicted powers."""
    for j, (x, y, xlabel, ylabel, title) in enumerate(PANELS):
        ax = figure.add_subplot(1, 3, j + 1)
        ax.set_xscale("log")
        ax.set_yscale("log")
        lines = []
        for row, colour in zip(measured["rows"], COLOURS, strict=False):
            t, values = array(row[x]), np.abs(array(row[y]))
            predicted = row["predicted"][j]
            power = predicted["value"] if isinstance(predicted, dict) else predicted
            anchor = int(np.argmin(t)) if x == "radii" else int(np.argmax(t))
            ax.plot(t, values[anchor] * (t / t[anchor]) ** power, lw=0.9, color=colour, zorder=1)
            ax.plot(t, values, color=colour, **MARK)
            said = predicted["exact"] if isinstance(predicted, dict) else power
            resolved = row["verdicts"][j] == "resolved"
            reading = f"{float(row['slopes'][j]):.3f}" if resolved else "not resolved"
            text = f"k = {row['k']}:  {reading}  ({said})"
            lines.append((text.replace("-", "−"), colour))
        x_text, y_text, align = CORNERS[j]
        style = {"fontsize": 9, "ha": align}
        note(ax, x_text, y_text + 0.195, "measured slope (the line’s)", ha=align)
        for i, (text, colour) in enumerate(lines):
            note(ax, x_text, y_text + 0.065 * (2 - i), text, color=colour, **style)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.set_title(title)

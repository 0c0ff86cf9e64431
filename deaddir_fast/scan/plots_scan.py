"""A scan's pictures: where dead directions are, what they are, spectra, rays and orders."""

from __future__ import annotations

import functools
import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from deaddir_fast.scan import plots
from deaddir_fast.scan.plots import CHAIN_COLOURS, DEAD, GREY, INK, LIVE
from deaddir_fast.scan.positions import Grid, grid, kinds, labels, short, spread
from deaddir_fast.scan.read_report import CLASSES, Scan, finite

COLOUR_OF_CLASS = {
    "gauge": LIVE,
    "algebraic": CHAIN_COLOURS[2],
    "data": "#CC79A7",
    "singular": DEAD,
    "unresolved": "#b5b5b5",
    "live": INK,
}
MARKER_OF_CLASS = {
    "gauge": "s",
    "algebraic": "D",
    "data": "v",
    "singular": "o",
    "unresolved": "x",
    "live": "^",
}
# Names of layers may hold dollar signs. Text stays text in SVG; without paper of their own the
# pictures turn dark with the page.
STYLE: Any = plots.STYLE | {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlesize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
# early to late; all of it reads on white and on black paper
DEPTH = LinearSegmentedColormap.from_list("depth", [LIVE, "#8f8f8f", DEAD])
P = ParamSpec("P")
R = TypeVar("R")
_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function in this module's style."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same for the same figure."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is still right in the page
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return out.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.03, wspace=0.03)
    return Figure(figsize=(width, height), layout=engine)


def power(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis."""
    return f"10{str(round(math.log10(value))).translate(_SUPER)}" if value > 0 else ""


def log_axis(ax: Axes, which: str) -> None:
    """Make the x or y axis logarithmic, its ticks plain text."""
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(LogLocator(subs=[], numticks=6))
    axis.set_major_formatter(FuncFormatter(power))
    axis.set_minor_formatter(NullFormatter())


def panel_note(ax: Axes, text: str, height: float = 0.5) -> None:
    """A line in the middle of an empty panel."""
    ax.text(
        0.5, height, text, transform=ax.transAxes, ha="center", va="center", fontsize=8.5, color=INK
    )


# ------------------------------------------------------------------------------------- heat maps


def _values(laid: Grid, value: Callable[[list[dict[str, Any]]], float]) -> NDArray[np.float64]:
    out = np.full((len(laid.rows), len(laid.columns)), np.nan)
    for place, layers in laid.cells.items():
        out[place] = value(layers)
    return out


def _dead(layers: list[dict[str, Any]], kind: str = "block") -> int:
    return sum(layer["dead"][kind] for layer in layers)


def compact(count: float) -> str:
    """A count in a few letters: 12, 3.4k, 5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def heat(
    ax: Axes,
    laid: Grid,
    values: NDArray[np.float64],
    norm: Normalize,
    *,
    cmap: str | Colormap = "cividis",
    rows: bool = True,
) -> Any:
    """One heat map of a grid; cells without a value stay empty, without a layer too."""
    height, width = values.shape
    # thousands of vector cells are heavy, and too small to need sharp edges
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values),
        norm=norm,
        cmap=cmap,
        edgecolors="face",
        lw=0.4,
        rasterized=values.size > 400,
    )
    for row, column in laid.cells:
        if not np.isfinite(values[row, column]):
            ax.plot(column + 0.5, row + 0.5, ".", ms=2.5, color=GREY)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_yticks(np.arange(height) + 0.5, laid.rows if rows else [""] * height)
    shown = spread(list(range(width)), 13)
    crowded = max((len(laid.columns[i]) for i in shown), default=0) * len(shown) > 60
    turn: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    ax.set_xticks([i + 0.5 for i in shown], [laid.columns[i] for i in shown], **turn)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel(laid.axis)
    return mesh


@styled
def dead_map(scan: Scan) -> Figure:
    """Layer x depth: the dead dimension of each block of the Fisher, as a share of its size."""
    laid = grid(scan.layers)
    share = _values(
        laid, lambda layers: _dead(layers) / max(1, sum(layer["parameters"] for layer in layers))
    )
    height, width = share.shape
    figure = new_figure(min(12.0, 4.6 + 0.62 * width), max(2.2, 1.1 + 0.3 * height))
    ax = figure.add_subplot()
    top = float(np.nanmax(share, initial=0.0)) or 1.0
    norm = Normalize(0, top)
    mesh = heat(ax, laid, share, norm)
    if width <= 16:
        for (row, column), layers in laid.cells.items():
            ax.text(
                column + 0.5,
                row + 0.5,
                compact(_dead(layers)),
                ha="center",
                va="center",
                fontsize=8,
                color="#fefefe" if norm(share[row, column]) < 0.55 else "#101010",
            )
    bar = figure.colorbar(mesh, ax=ax, pad=0.01, aspect=max(8.0, 5.0 * height / 2))
    bar.set_label("dead share of the layer")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    return figure


@styled
def class_maps(scan: Scan) -> Figure:
    """Layer x depth, five times: the share of the dead dimension that is of each class."""
    laid = grid(scan.layers)
    height = len(laid.rows)
    figure = new_figure(12, max(3.6, 2 * (0.85 + 0.235 * height)))
    axes = figure.subplots(2, 3)
    mesh = None
    for i, (ax, kind) in enumerate(zip(axes.flat, CLASSES, strict=False)):
        share = _values(
            laid,
            lambda layers, kind=kind: (  # type: ignore[misc]
                _dead(layers, kind) / _dead(layers) if _dead(layers) else math.nan
            ),
        )
        mesh = heat(ax, laid, share, Normalize(0, 1), rows=i % 3 == 0)
        ax.set_title(kind)
    axes.flat[-1].axis("off")
    if mesh is not None:
        inset = axes.flat[-1].inset_axes((0.1, 0.7, 0.8, 0.09))
        bar = figure.colorbar(mesh, cax=inset, orientation="horizontal")
        bar.set_label("share of the layer's dead dimension")
        bar.outline.set_visible(False)
        panel_note(axes.flat[-1], "small dot: nothing dead there", 0.08)
    return figure


# ----------------------------------------------------------------------------------- along depth


@styled
def along_depth(scan: Scan, most: int = 120) -> Figure:
    """Stacked bars over depth: gauge against singular dimensions, and every class as a share."""
    layers = scan.layers
    step = max(1, -(-len(layers) // most))
    groups = [layers[i : i + step] for i in range(0, len(layers), step)]
    x = np.arange(len(groups))
    figure = new_figure(min(12.0, max(6.5, 2.5 + 0.3 * len(groups))), 4.8)
    counts, shares = figure.subplots(2, 1, sharex=True)
    for ax, shown in ((counts, ("gauge", "singular")), (shares, CLASSES)):
        base = np.zeros(len(groups))
        for kind in shown:
            values = np.array([_dead(group, kind) for group in groups], dtype=float)
            if ax is shares:
                total = np.array([_dead(group) for group in groups], dtype=float)
                values = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
            ax.bar(x, values, 0.85, bottom=base, color=COLOUR_OF_CLASS[kind], label=kind)
            base += values
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=1, borderaxespad=0.2)
    counts.set_ylabel("dimensions")
    counts.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    counts.yaxis.set_major_formatter(FuncFormatter(lambda v, _: compact(v)))
    if not any(_dead(layers, kind) for kind in ("gauge", "singular")):
        counts.set_ylim(0, 1)
        panel_note(counts, "none found")
    shares.set_ylabel("share of dead")
    shares.set_ylim(0, 1)
    shares.set_xlim(-0.7, len(groups) - 0.3)
    ticks = spread(list(range(len(groups))), 20)
    shares.set_xticks(ticks, [str(groups[i][0]["depth"]) for i in ticks])
    what = "layer, by depth" if step == 1 else f"depth of the first of {step} layers in a bar"
    shares.set_xlabel(what)
    return figure


# --------------------------------------------------------------------------------------- spectra


def thin(values: NDArray[np.float64], most: int = 160) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Ranks (from 1) and eigenvalues, largest first, at most about ``most`` of them.

    They are taken evenly, and more closely at both ends, where spectra bend.
    """
    falling = values[::-1]
    n = len(falling)
    if n <= most:
        index = np.arange(n)
    else:
        ends = np.geomspace(1, n, most // 3).astype(int) - 1
        even = np.linspace(0, n - 1, most // 3).astype(int)
        index = np.unique(np.concatenate([ends, even, n - 1 - ends]))
    return index + 1, falling[index]


def _spectrum_panel(ax: Axes, scan: Scan, layers: list[dict[str, Any]], factor: str) -> None:
    drawn = []
    lines = []
    tolerances = [layer[factor]["tolerance"] for layer in layers]
    for i, layer in enumerate(layers):
        values = scan.spectrum(layer, factor)
        if values is None or not len(values):
            continue
        colour = DEPTH(i / max(1, len(layers) - 1))
        lines.append((*thin(values), colour, layer[factor]))
        drawn.append(values)
    positive = [float(v[v > 0].min()) for v in drawn if (v > 0).any()]
    if not positive:
        panel_note(ax, "not stored")
        ax.set_xticks([])
        ax.set_yticks([])
        return
    log_axis(ax, "y")
    top = max(float(v[-1]) for v in drawn)
    # what lies far below the tolerance is rounding: its depth is not worth the height of the panel
    floors = [t for t in tolerances if 0 < t < math.inf]
    low = max(min(positive), min(floors) * 1e-3) if floors else min(positive)
    low = min(low, top / 10)
    for rank, values, colour, found in lines:
        ax.plot(rank, np.maximum(values, low), "-", lw=1.1, color=colour)
        if len(rank) == 1:
            ax.plot(rank, np.maximum(values, low), "o", ms=3.5, color=colour)
        if 0 < found["tolerance"] < math.inf:
            ax.axhline(found["tolerance"], lw=0.7, ls="--", color=colour, alpha=0.8)
        if found["rank_limit"] < found["dimension"]:
            ax.axvline(found["rank_limit"], lw=0.9, ls=":", color=colour)
    ax.set_ylim(low / 3, top * 4)
    widest = max(len(v) for v in drawn)
    ax.set_xlim(0.5, widest + max(0.5, 0.02 * widest))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


@styled
def spectra(scan: Scan, most: int = 8) -> Figure:
    """Eigenvalues of A and G, one pair of panels for each kind of layer, lines from early to late.

    Dashed: tolerance; dotted: the largest rank that the samples allow, where that is below the
    dimension.
    """
    layers = scan.layers
    kind_of = kinds(layers)
    if len(set(kind_of.values())) == len(layers) > most:  # nothing repeats: the largest layers
        keep = sorted(layers, key=lambda layer: -layer["parameters"])[:most]
        groups = {layer["name"]: [layer] for layer in layers if layer in keep}
    else:
        groups = {}
        for layer in layers:
            groups.setdefault(kind_of[layer["name"]], []).append(layer)
        size = {k: sum(layer["parameters"] for layer in g) for k, g in groups.items()}
        biggest = set(sorted(groups, key=lambda k: -size[k])[:most])
        groups = {k: spread(g, 8) for k, g in groups.items() if k in biggest}
    pairs = 2 if len(groups) > 1 else 1
    rows = max(1, -(-len(groups) // pairs))
    figure = new_figure(6.0 * pairs, 0.3 + 1.95 * rows)
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    titles = labels(list(groups))
    for i, (title, group) in enumerate(zip(titles, groups.values(), strict=True)):
        row, column = divmod(i, pairs)
        for j, factor in enumerate("AG"):
            ax = axes[row, 2 * column + j]
            _spectrum_panel(ax, scan, group, factor)
            where = f"  {title}" + (f" ×{len(group)}" if len(group) > 1 else "") if j == 0 else ""
            ax.set_title(factor + where)
            if row == rows - 1 or i + pairs >= len(groups):
                ax.set_xlabel("rank of the eigenvalue")
    for ax in axes.flat[2 * len(groups) :]:
        ax.axis("off")
    return figure


# ---------------------------------------------------------------------------------------- orders

Ray = tuple[dict[str, Any], dict[str, Any]]  # layer, direction
_INTEREST = ("singular", "unresolved", "algebraic", "data", "gauge", "live")


def interesting(scan: Scan, most: int) -> list[Ray]:
    """Directions with rays worth a look: by turns one of each class and order, singular first."""
    rays = [
        (layer, direction)
        for layer in scan.layers
        for direction in layer["directions"]
        if any(
            r > 0 and f > 0 for r, f in zip(direction["radii"], direction["fisher"], strict=True)
        )
    ]

    def rank(ray: Ray) -> tuple[int, float]:
        order = ray[1]["order"]
        high = order if order is not None and math.isfinite(order) else 0.0
        return _INTEREST.index(ray[1]["class"]), -high

    rays.sort(key=rank)
    groups: dict[tuple[str, str], list[Ray]] = {}
    for ray in rays:
        groups.setdefault((ray[1]["class"], order_text(ray[1]["order"])), []).append(ray)
    turns = itertools.zip_longest(*groups.values())
    return [ray for turn in turns for ray in turn if ray is not None][:most]


def order_text(value: float | None) -> str:
    """An order in a few letters."""
    if value is None or math.isnan(value):
        return "?"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _ray_panel(ax: Axes, layer: dict[str, Any], direction: dict[str, Any]) -> None:
    log_axis(ax, "x")
    log_axis(ax, "y")
    radii = np.array(direction["radii"])
    shown = []
    for key, errors, colour, marker, exponent in (
        ("fisher", "fisher_stderr", LIVE, "o", lambda k: 2 * (k - 1)),
        ("kl", None, DEAD, "s", lambda k: 2 * k),
    ):
        values = np.array(direction[key] or [math.nan] * len(radii))
        good = (values > 0) & (radii > 0) & np.isfinite(values)
        if not good.any():
            continue
        t, y = radii[good], values[good]
        bars = np.array(direction[errors])[good] if errors and direction[errors] else None
        if bars is not None:
            bars = np.where(np.isfinite(bars), bars, 0.0)
            # a bar down to zero has no end on a logarithmic axis
            ends = np.stack([np.minimum(bars, 0.9 * y), bars])
            ax.errorbar(t, y, ends, fmt="none", ecolor=colour, elinewidth=0.7, zorder=1)
        ax.plot(t, y, marker, ms=3.6, mfc="#ffffff", mec=colour, mew=0.9, zorder=3)
        shown += [float(y.min()), float(y.max())]
        k = direction["order"]
        if finite(k):
            slope = exponent(k)
            level = np.median(np.log(y) - slope * np.log(t))
            ends_t = np.array([t.min(), t.max()])
            ax.plot(ends_t, np.exp(level + slope * np.log(ends_t)), "--", lw=0.9, color=colour)
    ax.set_ylim(min(shown) / 8, max(shown) * 8)
    positive = radii[radii > 0]
    ax.set_xlim(positive.min() / 1.6, positive.max() * 1.6)
    read = f"k = {order_text(direction['order'])}"
    if direction["order"] is None:
        read = "not resolved"
    if direction["predicted"] is not None:
        read += f"  (predicted {order_text(direction['predicted'])})"
    ax.set_title(f"{short(layer['name'], 38)}\n{short(direction['label'], 38)}", fontsize=8.5)
    ax.text(
        0.03, 0.96, f"{direction['class']}: {read}", transform=ax.transAxes, va="top", fontsize=8.5
    )
    # room above the points for that line
    low, high = np.log10(ax.get_ylim())
    ax.set_ylim(10**low, 10 ** (high + 0.16 * (high - low)))


@styled
def rays(scan: Scan, most: int = 8) -> Figure | None:
    """Curvature (blue) and divergence (orange) along the most interesting directions, log-log.

    Dashed: the slope of the fitted order, laid through the points by their median. None where no
    direction has a ray with a positive value.
    """
    found = interesting(scan, most)
    if not found:
        return None
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(max(4.0, 3.0 * columns), 0.45 + 2.35 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, (layer, direction) in enumerate(found):
        ax = axes.flat[i]
        _ray_panel(ax, layer, direction)
        if i + columns >= len(found):
            ax.set_xlabel("distance t")
    for ax in axes.flat[len(found) :]:
        ax.axis("off")
    return figure


def measured(direction: dict[str, Any]) -> float | None:
    """The order read: the fit's, or the exact one of the jet where the fit did not resolve."""
    order: float | None = direction["order"]
    return order if order is not None else direction["jet"]


@styled
def predicted_against_measured(scan: Scan) -> Figure | None:
    """Measured orders over predicted ones; None where no direction has both."""
    both = []
    pairs = []
    for layer in scan.layers:
        for direction in layer["directions"]:
            predicted, read = direction["predicted"], measured(direction)
            if predicted is not None and read is not None:
                both.append(direction)
                pairs.append((predicted, read, direction["class"]))
    if not both:
        return None
    known = [v for p, m, _ in pairs for v in (p, m) if math.isfinite(v)]
    top = max(2.0, math.ceil(max(known, default=2.0)))
    beyond = top + 1.0  # where ∞ is drawn
    at = [(min(p, beyond), min(m, beyond), kind) for p, m, kind in pairs]
    figure = new_figure(5.6, 4.2)
    ax = figure.add_subplot()
    ax.plot([0.5, beyond + 0.4], [0.5, beyond + 0.4], "-", lw=0.7, color=GREY, zorder=0)
    # directions that agree fall on one point: classes stand beside each other, sizes are counts
    present = [kind for kind in _INTEREST if any(kind == k for *_, k in at)]
    counts = Counter((x, round(y, 2), kind) for x, y, kind in at)
    beside: dict[tuple[float, float], list[str]] = {}
    for x, y, kind in sorted(counts, key=lambda place: present.index(place[2])):
        beside.setdefault((x, y), []).append(kind)

    def shift(x: float, y: float, kind: str) -> float:
        mates = beside[x, round(y, 2)]
        return 0.045 * beyond * (mates.index(kind) - (len(mates) - 1) / 2)

    for kind in present:
        places = [place for place in counts if place[2] == kind]
        ax.scatter(
            [x + shift(x, y, kind) for x, y, _ in places],
            [y for _, y, _ in places],
            s=[24 + 14 * math.log2(counts[place]) for place in places],
            marker=MARKER_OF_CLASS[kind],
            color=COLOUR_OF_CLASS[kind],
            label=f"{kind} ({sum(counts[place] for place in places)})",
            linewidths=1,
            zorder=3,
        )
    for direction, (x, y, kind) in zip(both, at, strict=True):
        ends = direction["interval"]
        if direction["order"] is not None and ends and all(map(math.isfinite, ends)):
            where = x + shift(x, y, kind)
            ax.plot([where, where], ends, "-", lw=0.8, color=COLOUR_OF_CLASS[kind], zorder=2)
    whole = [float(k) for k in range(1, int(top) + 1, max(1, int(top) // 8))]
    names = [f"{k:g}" for k in whole]
    if any(v == beyond for x, y, _ in at for v in (x, y)):
        whole, names = [*whole, beyond], [*names, "∞"]
    ax.set_xticks(whole, names)
    ax.set_yticks(whole, names)
    end = beyond + 0.4 if "∞" in names else top + 0.5
    ax.set_xlim(0.5, end)
    ax.set_ylim(0.5, end)
    ax.set_xlabel("order predicted by the rate calculus")
    ax.set_ylabel("order measured")
    legend = ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.3)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([28.0])
    return figure

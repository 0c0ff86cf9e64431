"""A scan as one HTML page that needs nothing else: pictures, layers, their directions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deaddir_fast.scan.page import (
    Html,
    bullets,
    interval,
    name,
    number,
    pairs,
    paragraph,
    picture,
    safe,
    section,
    shell,
    table,
)
from deaddir_fast.scan.positions import short
from deaddir_fast.scan.read_report import CLASSES, Scan, read
from deaddir_fast.scan.report import Staged

NO_PICTURES = (
    "No pictures: matplotlib is not installed here. "
    "pip install 'deaddir_fast[plot]' and write the page again to have them."
)
MEANING = {
    "gauge": "tangent to a symmetry of the model: nothing changes along it, whatever the data",
    "algebraic": "dead by the shape of the model at these weights, whatever the data",
    "data": "dead because these inputs do not reach it; other inputs may wake it",
    "singular": "curvature is zero at this point only and grows along the ray: order above 1",
    "unresolved": "dead at this point; no reading says which of the others it is",
    "live": "not dead: the curvature is positive at this point",
}
MOST_DIRECTIONS = 24  # of a layer on the page; report.json has all of them


def _size(layer: dict[str, Any]) -> str:
    return f"{layer['inputs']}{'+1' if layer['bias'] else ''} × {layer['outputs']}"


def _link(layer: dict[str, Any]) -> Html:
    return Html(f'<a href="#layer-{layer["depth"]}">{name(layer["name"])}</a>')


def _rank(factor: dict[str, Any]) -> str:
    return f"{factor['rank']:,} / {factor['dimension']:,}"


def _header(scan: Scan) -> Html:
    report = scan.report
    totals, model, data = report["totals"], report["model"], report["data"]
    bounds = totals["lambda"]
    resolved = bounds["verdict"] == "resolved"
    settled = sum(layer["verdict"] == "resolved" for layer in report["layers"])
    tokens = "" if data["tokens"] is None else f", {data['tokens']:,} tokens"
    settings = ", ".join(f"{key} = {value}" for key, value in report["settings"].items())
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    seconds = report["cost"]["seconds"]
    rests = bounds.get("rests_on", [])
    rests = "; ".join(map(str, rests)) if isinstance(rests, list) else str(rests)
    limited = Counter(
        factor
        for layer in report["layers"]
        for factor in ("A", "G")
        if layer[factor]["verdict"] != "resolved"
    )
    return Html(
        f"<h1>Scan of {safe(model['source'])}</h1>\n"
        + paragraph(
            f"{model['class']}, {model['parameters']:,} parameters in {model['dtype']}; read on "
            f"{data['samples']:,} samples{tokens} of {data['source']}; {report['created']}.",
            "soft",
        )
        + f'<div class="verdict{"" if resolved else " open"}" id="verdict">'
        + f"<strong>{number(bounds['lower'])} ≤ λ ≤ {number(bounds['upper'])}</strong>: "
        + f"{safe(bounds['verdict'])}<br>"
        + (f"Rests on: {safe(rests)}<br>" if rests else "")
        + f"{settled:,} of {len(report['layers']):,} layers resolved; "
        + (
            "rank not settled for "
            + " and ".join(f"{factor} of {limited[factor]:,}" for factor in sorted(limited))
            + " layers, so that counts there may change with more data. "
            if limited
            else "every rank is settled on these data. "
        )
        + f"{totals['unresolved']:,} of {totals['dead']:,} dead dimensions are without a class."
        + "</div>\n"
        + table(
            ["", "dimensions", "meaning"],
            [
                ["parameters", totals["parameters"], "of the model"],
                ["scanned", totals["scanned"], "of them in layers that were read"],
                [
                    "dead",
                    totals["dead"],
                    "null space of the layers' blocks of the Fisher, together",
                ],
                *([kind, totals[kind], MEANING[kind]] for kind in CLASSES),
            ],
            "What was read, and what was found dead",
            identity="totals",
        )
        + "<details><summary>What was read, how and where</summary>"
        + pairs(
            [
                ("model", f"{model['source']} ({model['class']})"),
                ("fingerprint of the model", model["fingerprint"]),
                ("data", f"{data['source']}, {number(data.get('shards'))} shards"),
                ("fingerprint of the data", data["fingerprint"]),
                ("settings", settings),
                ("device", report["device"]),
                ("versions", versions),
                ("seconds", ", ".join(f"{k} {number(v)}" for k, v in seconds.items())),
                ("peak memory, bytes", report["cost"]["peak_bytes"]),
                ("floating point operations", report["cost"]["flops"]),
            ]
        )
        + "</details>\n"
    )


def _pictures(scan: Scan) -> Iterator[Html]:
    """The sections with pictures."""
    from deaddir_fast.scan import plots_scan as plots

    layers = scan.layers
    dead = sum(layer["dead"]["block"] for layer in layers)
    laid = plots.grid(layers)
    gaps = ""
    if laid.merged > 1:
        gaps += f" A column holds {laid.merged} neighbours."
    if laid.left_out:
        gaps += f" {laid.left_out} layers with fewer dead directions do not fit; see the table."
    count = "" if len(laid.columns) > 16 else " Numbers are dimensions (k: thousands, M: millions)."
    yield section(
        "Where directions are dead",
        picture(
            plots.svg(plots.dead_map(scan)),
            "dead",
            f"Heat map of the dead share of each layer, kind of layer by {laid.axis}; "
            f"{dead} dimensions in all",
            "Dead dimension as a share of the layer's parameters. Rows are kinds of layers, "
            f"columns go with depth.{count}{gaps}",
        ),
        picture(
            plots.svg(plots.class_maps(scan)),
            "classes",
            "Heat maps of the share of each class in the dead dimension of each layer",
            f"What the dead directions are, same layout.{gaps}",
        ),
        picture(
            plots.svg(plots.along_depth(scan)),
            "depth",
            "Stacked bars over depth: gauge and singular dimensions, and shares of every class",
            "Above: dimensions that a symmetry explains against those whose curvature grows along "
            "the ray. Below: every class as a share of the layer's dead dimension.",
        ),
        identity="where",
    )
    yield section(
        "Spectra",
        picture(
            plots.svg(plots.spectra(scan)),
            "spectra",
            "Eigenvalues of A and G in falling order, logarithmic, for each kind of layer",
            "Eigenvalues of A (inputs) and G (gradients), kinds of layers with the most "
            "parameters. Colours go from early (blue) to late (orange). Dashed: tolerance, below "
            "which an eigenvalue counts as zero. Dotted: the largest rank these samples allow, "
            "where that is below the dimension. Values far below the tolerance lie on the bottom "
            "edge.",
        ),
        identity="spectra",
    )
    along = plots.rays(scan)
    against = plots.predicted_against_measured(scan)
    parts = []
    if along is None:
        parts.append(paragraph("No direction of this scan has a ray with a positive curvature."))
    else:
        parts.append(
            picture(
                plots.svg(along),
                "rays",
                "Curvature and divergence along single directions over the distance, log-log",
                "Points: curvature uᵀF(θ₀ + t u)u (blue circles) and divergence K (orange "
                "squares), in nats. Dashed: the slopes 2(k − 1) and 2k of the fitted order k, "
                "laid through the points by their median. By turns one direction of each class "
                "and order, singular first; values that are not positive are not drawn.",
            )
        )
    if against is None:
        parts.append(paragraph("No direction has both a predicted and a measured order."))
    else:
        parts.append(
            picture(
                plots.svg(against),
                "orders",
                "Measured orders against predicted orders, by class",
                "Orders measured (by the fit, or by the exact jet where the fit did not resolve) "
                "over orders predicted from the architecture. The line: both agree. Larger marks "
                "stand for more directions; classes at one place stand beside each other.",
            )
        )
    yield section("Rays and orders", *parts, identity="rays")


def _layer_table(layers: list[dict[str, Any]]) -> Html:
    columns = ["depth", "layer", "block", "type", "size", "parameters", "rank A", "rank G", "dead"]
    rows = (
        [
            layer["depth"],
            _link(layer),
            layer["block"],
            layer["type"],
            _size(layer),
            layer["parameters"],
            _rank(layer["A"]),
            _rank(layer["G"]),
            layer["dead"]["block"],
            *(layer["dead"][kind] for kind in CLASSES),
            layer["verdict"],
        ]
        for layer in layers
    )
    return table(
        [*columns, *CLASSES, "verdict"],
        rows,
        "Layers in order of the forward pass. A header sorts; a name leads to its directions.",
        identity="layers-table",
        sortable=True,
    )


def _factors(scan: Scan, layer: dict[str, Any]) -> Html:
    rows = []
    for key, what in (("A", "A, inputs"), ("G", "G, gradients")):
        factor = layer[key]
        rows.append(
            [
                what,
                factor["form"],
                _rank(factor),
                factor["rank_limit"],
                factor["dead"],
                factor["ambiguous"],
                factor["top"],
                factor["bottom"],
                factor["tolerance"],
                factor["trace"],
                factor["log_pseudo_det"],
                factor["verdict"],
            ]
        )
    columns = ["factor", "form", "rank", "rank limit", "dead", "ambiguous", "top", "bottom"]
    return table(
        [*columns, "tolerance", "trace", "log pseudo-det", "verdict"], rows, "Kronecker factors"
    )


def _directions(layer: dict[str, Any]) -> Html:
    found = layer["directions"]
    if not found:
        return paragraph("No direction of this layer was followed.", "soft")
    rows = [
        [
            d["label"],
            d["class"] + (f" ({d['gauge']})" if d["gauge"] else ""),
            d["curvature"],
            d["stderr"],
            d["kfac"],
            d["order"],
            interval(d["interval"]),
            d["jet"],
            d["predicted"],
            d["contribution"],
            d["verdict"],
            d["why"],
        ]
        for d in found[:MOST_DIRECTIONS]
    ]
    rest = len(found) - len(rows)
    columns = ["direction", "class", "curvature", "± error", "K-FAC", "order k", "interval", "jet"]
    return Html(
        table(
            [*columns, "predicted", "1/(2k)", "verdict", "why"],
            rows,
            "Directions: curvature at the point in nats, orders by fit, by jet and as predicted",
        )
        + (paragraph(f"{rest} more are in report.json.", "soft") if rest else "")
    )


def _odd_spectra(scan: Scan, layer: dict[str, Any]) -> Iterator[str]:
    """Sentences about stored spectra that do not go with the counts of the report."""
    for key in ("A", "G"):
        values, factor = scan.spectrum(layer, key), layer[key]
        if values is None or factor["form"] == "one" or math.isnan(factor["tolerance"]):
            continue
        above = int((values > factor["tolerance"]).sum())
        if len(values) != factor["dimension"]:
            yield (
                f"The stored spectrum of {key} has {len(values):,} values, the report says "
                f"dimension {factor['dimension']:,}."
            )
        elif abs(above - factor["rank"]) > factor["ambiguous"]:
            yield (
                f"{above:,} stored eigenvalues of {key} are above the tolerance, the report says "
                f"rank {factor['rank']:,}."
            )


def _layer(scan: Scan, layer: dict[str, Any]) -> Html:
    dead = ", ".join(f"{layer['dead'][k]:,} {k}" for k in CLASSES if layer["dead"][k])
    shared = layer["shares_inputs_with"]
    notes = [*layer["notes"], *_odd_spectra(scan, layer)]
    facts = [
        ("size", f"{layer['type']}, {_size(layer)}, {layer['parameters']:,} parameters"),
        ("read on", f"{layer['rows']:,} rows of {layer['samples']:,} samples"),
        ("verdict", layer["verdict"]),
    ]
    if shared is not None:
        facts.append(("shares its inputs with", shared))
    return Html(
        f'<details id="layer-{layer["depth"]}"><summary>{safe(layer["name"])} '
        f'<span class="soft">{layer["dead"]["block"]:,} dead'
        f"{': ' if dead else ''}{safe(dead)}</span></summary>\n"
        + pairs(facts)
        + (bullets(notes) if notes else "")
        + _factors(scan, layer)
        + _directions(layer)
        + "</details>\n"
    )


_PROBE = ("quantity", "slope", "stderr", "predicted", "verdict")


def _costs(layers: list[dict[str, Any]]) -> Html:
    return table(
        ["depth", "layer", "route", "flops", "bytes", "seconds", "share of bound"],
        (
            [
                layer["depth"],
                name(layer["name"]),
                layer["cost"]["route"],
                *(layer["cost"][key] for key in ("flops", "bytes", "seconds", "share_of_bound")),
            ]
            for layer in layers
        ),
        "What each layer cost, and how close that is to the bound of the machine (1: at the bound)",
        identity="cost-table",
        sortable=True,
    )


def _rest(scan: Scan) -> Iterator[Html]:
    report = scan.report
    if report["gauges"]:
        yield section(
            "Symmetries",
            table(
                ["symmetry", "group", "dimension", "parameters"],
                (
                    [g["name"], g["group"], g["dimension"], short(", ".join(g["parameters"]), 160)]
                    for g in report["gauges"]
                ),
                "Symmetries of the model that were found and verified",
                identity="gauges-table",
            ),
            identity="gauges",
        )
    else:
        searched = report["settings"].get("gauges", True)
        said = "No symmetry was found." if searched else "The model was not searched."
        yield section("Symmetries", paragraph(said), identity="gauges")
    for probe in report.get("probes", []):
        yield section(
            f"Rates of unit {probe['unit']}: predicted against measured",
            table(
                ["layer", "quantity", "slope", "error", "predicted", "verdict"],
                ([name(r["layer"]), *(r[k] for k in _PROBE)] for r in probe["rows"]),
                "Slopes in t when the weights of the unit are scaled by t, all else frozen",
                identity=f"probe-{probe['unit']}-table",
            ),
            *(paragraph(note) for note in probe["notes"]),
            identity=f"probe-{probe['unit']}",
        )
    if report["skipped"]:
        yield section(
            "Skipped layers",
            table(
                ["layer", "type", "parameters", "why"],
                (
                    [name(s["name"]), s["type"], s["parameters"], s["why"]]
                    for s in report["skipped"]
                ),
                "Parameters that no bound or count above speaks of",
                identity="skipped-table",
            ),
            identity="skipped",
        )
    else:
        yield section(
            "Skipped layers", paragraph("None: every parameter was read."), identity="skipped"
        )
    if report["notes"]:
        yield section("Notes", bullets(report["notes"]), identity="notes")


def render(scan: Scan) -> str:
    """The page of a scan."""
    layers = scan.layers
    try:
        pictures = list(_pictures(scan)) if layers else []
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        pictures = [paragraph(NO_PICTURES, "warn")]
    links = [("layers", "Layers"), ("directions", "Directions"), ("cost", "Cost")]
    links += [("gauges", "Symmetries"), ("skipped", "Skipped layers")]
    if len(pictures) > 1:
        links = [("where", "Where"), ("spectra", "Spectra"), ("rays", "Rays and orders"), *links]
    if scan.report["notes"]:
        links.append(("notes", "Notes"))
    listed = "".join(f'<a href="#{identity}">{title}</a>' for identity, title in links)
    return shell(
        f"Scan of {scan.report['model']['source']}",
        _header(scan),
        f'<nav aria-label="Sections">{listed}</nav>\n',
        *pictures,
        section("Layers", _layer_table(layers), identity="layers"),
        section(
            "Directions of each layer",
            bullets(
                Html(f"<strong>{kind}</strong>: {safe(meaning)}.")
                for kind, meaning in MEANING.items()
            ),
            *(_layer(scan, layer) for layer in layers),
            identity="directions",
        ),
        section("Cost", _costs(layers), identity="cost"),
        *_rest(scan),
    )


def write_html(folder: Path) -> Path:
    """Write report.html into a scan's folder and return its path.

    The page holds its style, script and pictures itself and loads nothing. Without matplotlib it
    has tables only, and says so.

    Raises:
        ReportError: if the folder is not that of a finished scan.
        OSError: if the page cannot be written.
    """
    page = render(read(folder))
    with Staged(Path(folder)) as stage:
        (stage / "report.html").write_bytes(page.encode("utf-8", "replace"))
    return Path(folder) / "report.html"

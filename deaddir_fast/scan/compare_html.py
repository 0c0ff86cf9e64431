"""A comparison of two scans as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deaddir_fast.scan.compare import FACTORS, Comparison, changed_orders, moved
from deaddir_fast.scan.html import NO_PICTURES
from deaddir_fast.scan.page import (
    MISSING,
    Html,
    bullets,
    interval,
    name,
    number,
    paragraph,
    picture,
    safe,
    section,
    shell,
    table,
)
from deaddir_fast.scan.read_report import CLASSES, Scan

MOST_DIRECTIONS = 2000  # on the page; compare.json has all of them


def _header(comparison: Comparison) -> Html:
    sides = "".join(
        f"<li><strong>{side}</strong>: {safe(about['folder'])}, {safe(about['model']['source'])}, "
        f"{safe(about['created'])}</li>"
        for side, about in (("a", comparison.a), ("b", comparison.b))
    )
    bounds = comparison.bounds
    ends = [
        f"{number(bounds[side]['lower'])} ≤ λ ≤ {number(bounds[side]['upper'])}" for side in "ab"
    ]
    return Html(
        f"<h1>Two scans compared</h1>\n<ul>{sides}</ul>\n"
        + (
            '<div class="verdict open" id="cautions"><strong>Read with care</strong>'
            + bullets(comparison.cautions)
            + "</div>\n"
            if comparison.cautions
            else paragraph("Same data, settings, versions, device and layers in both.")
        )
        + "".join(paragraph(remark, "soft") for remark in comparison.remarks)
        + f'<p id="lambda"><strong>{ends[0]} → {ends[1]}</strong>: {safe(bounds["verdict"])}. '
        + f"(a: {safe(bounds['a']['verdict'])}; b: {safe(bounds['b']['verdict'])})</p>\n"
        + table(
            ["dimensions", "a", "b", "change"],
            ([key, *side.values()] for key, side in comparison.totals.items()),
            "Totals; every change is b − a",
            identity="totals",
        )
    )


def _pictures(comparison: Comparison, a: Scan, b: Scan) -> Iterator[Html]:
    from deaddir_fast.scan import plots_compare as plots
    from deaddir_fast.scan.plots_scan import svg

    most = sorted(comparison.layers, key=lambda layer: -moved(layer))[:6]
    yield section(
        "What changed where",
        picture(
            svg(plots.class_totals(comparison)),
            "totals",
            "Bars of the dead dimensions of each class in both scans",
            "Dead dimensions by class, each panel on its own scale.",
        ),
        picture(
            svg(plots.change_maps(comparison)),
            "changes",
            "Heat maps, kind of layer by depth: changes of the dead share and of the ranks of A "
            "and G, distances of their spectra",
            "Changes from a to b and distances between spectra, layers that are in both. Cells "
            "that hold several layers show their mean.",
        ),
        picture(
            svg(plots.volumes(comparison)),
            "volumes",
            "Change of the logarithms of the pseudo-determinants of A and G over depth",
            "Change of the logarithm of the pseudo-determinant (product of the eigenvalues counted "
            "as positive). It jumps where the rank changes.",
        ),
        picture(
            svg(plots.spectra_on_each_other(a, b, [layer["name"] for layer in most])),
            "spectra",
            "Spectra of the layers that changed most, both scans on each other",
            "The layers whose spectra are farthest apart: a solid blue, b dashed orange, "
            "tolerances dotted. Values far below the tolerance lie on the bottom edge.",
        ),
        identity="where",
    )


def _layers(comparison: Comparison) -> Html:
    columns = ["depth", "layer", "dead", *CLASSES]
    for factor in FACTORS:
        columns += [f"{key} {factor}" for key in ("rank", "distance", "ln top", "ln bottom")]
        columns += [f"ln det {factor}"]
    rows = []
    for layer in comparison.layers:
        row = [layer["depth"], name(layer["name"])]
        row += [layer["dead"][key]["change"] for key in ("block", *CLASSES)]
        for factor in FACTORS:
            found = layer[factor]
            row += [found["rank"]["change"], found["distance"]]
            row += [found[key]["change"] for key in ("top", "bottom", "log_pseudo_det")]
        rows.append(row)
    why = [
        Html(f"{name(layer['name'])}, {factor}: {safe(layer[factor]['why'])}")
        for layer in comparison.layers
        for factor in FACTORS
        if layer[factor]["why"] is not None
    ]
    return Html(
        table(
            columns,
            rows,
            "Layers in both scans: changes b − a; of top and bottom eigenvalues the logarithm of "
            "their ratio. Distance: root mean square difference of the logarithms of the spectra, "
            "paired by rank, eigenvalues below the larger tolerance raised to it; in nats.",
            identity="layers-table",
            sortable=True,
        )
        + (paragraph("No distance, and why:") + bullets(why) if why else "")
    )


def _both(side: dict[str, Any], text: Any) -> str:
    """One text where both agree, otherwise both."""
    one, two = (MISSING if side[k] is None else text(side[k]) for k in "ab")
    return str(one) if side["a"] == side["b"] else f"{one} → {two}"


def _directions(comparison: Comparison) -> Html:
    every = [
        (layer["name"], direction)
        for layer in comparison.layers
        for direction in layer["directions"]
    ]
    if not every:
        return paragraph("No direction was followed in a layer that both scans have.")
    changed = changed_orders(comparison)
    first = {id(direction) for _, direction in changed}
    every.sort(key=lambda pair: id(pair[1]) not in first)
    rows = [
        [
            name(layer),
            d["label"],
            {"both": "both", "a": "a only", "b": "b only"}[d["in"]],
            _both(d["class"], str),
            _both(d["order"], number),
            d["order"]["change"],
            _both(d["interval"], interval),
            _both(d["jet"], number),
            _both(d["curvature"], number),
        ]
        for layer, d in every[:MOST_DIRECTIONS]
    ]
    columns = ["layer", "direction", "in", "class", "order k", "change", "interval", "jet"]
    rest = len(every) - len(rows)
    return Html(
        paragraph(
            f"{len(changed):,} of {len(every):,} directions changed their class, order or jet or "
            "are in one scan only; they come first. Fitted orders whose intervals overlap count as "
            "the same. Directions are matched by layer and label."
        )
        + table(
            [*columns, "curvature"],
            rows,
            "Directions, a → b where they differ",
            identity="directions-table",
            sortable=True,
        )
        + (paragraph(f"{rest} more are in compare.json.", "soft") if rest else "")
    )


def render(comparison: Comparison, a: Scan, b: Scan) -> str:
    """The page of a comparison of the scans ``a`` and ``b``."""
    try:
        pictures = list(_pictures(comparison, a, b)) if comparison.layers else []
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        pictures = [paragraph(NO_PICTURES, "warn")]
    alone = [
        (side, names)
        for side, names in (("a", comparison.only_a), ("b", comparison.only_b))
        if names
    ]
    return shell(
        "Two scans compared",
        _header(comparison),
        *pictures,
        section("Layers", _layers(comparison), identity="layers"),
        section("Directions", _directions(comparison), identity="directions"),
        *(
            section(f"Layers only in {side}", bullets(map(name, names)), identity=f"only-{side}")
            for side, names in alone
        ),
    )

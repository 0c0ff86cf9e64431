"""The demo's tables in the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from deaddir_fast.scan.demo_digits import DigitsReading
from deaddir_fast.scan.demo_exact import ExactCase, Ray


def order(value: float) -> str:
    """An order for print."""
    if math.isnan(value):
        return "?"
    return "∞" if math.isinf(value) else f"{value:g}"


def new_table(title: str, *columns: tuple[str, str]) -> Table:
    """An empty table with a title and columns, each a name and "left" or "right"."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left")
    return table


def _tick(good: bool) -> Text:
    return Text("✓", "green") if good else Text("✗", "bold red")


def exact(cases: list[ExactCase]) -> Table:
    """Triples beside closed forms."""
    table = new_table(
        "Triples (λ, m, ν) at true points, and closed forms of λ, m",
        ("network and point", "left"),
        ("read", "left"),
        ("here", "left"),
        ("deepest", "left"),
        ("ν", "right"),
        ("", "left"),
        ("forwards", "right"),
        ("s", "right"),
    )
    for c in cases:
        read = f"{c.rlct}, {c.multiplicity}" if c.resolved else f"{c.lower} … {c.upper}"
        nu = "?" if math.isnan(c.fluctuation) else f"{c.fluctuation:g}"
        table.add_row(
            Group(Text(c.name), Text(c.point, "dim")),
            Text(read, "" if c.resolved else "yellow"),
            f"{c.local.rlct}, {c.local.multiplicity}",
            f"{c.deepest.rlct}, {c.deepest.multiplicity}",
            nu,
            _tick(c.agrees),
            f"{c.forwards:,.0f}",
            f"{c.seconds:.1f}",
        )
    return table


def exact_notes(cases: list[ExactCase]) -> list[Text]:
    """What the table leaves unsaid, in words."""
    notes = [
        Text(
            "here: closed form at this point. deepest: closed form of the model, attained at", "dim"
        )
        + Text(" the deepest points of the fibre; it is never larger.", "dim")
    ]
    for c in cases:
        if not c.resolved:
            notes.append(Text(f"{c.name}, {c.point}: {c.verdict}", "yellow"))
        elif math.isnan(c.fluctuation):
            notes.append(Text(f"ν of {c.name}, {c.point}: {c.fluctuation_verdict}", "yellow"))
    return notes


def rays(curves: list[Ray]) -> Table:
    """Three readings of each order, side by side."""
    table = new_table(
        "Vanishing orders, read three ways",
        ("direction", "left"),
        ("true k", "right"),
        ("jets", "right"),
        ("slope", "right"),
        ("t²F/2K", "right"),
        ("decades", "right"),
        ("verdict", "left"),
        ("", "left"),
    )
    for ray in curves:
        fit = ray.fit
        error = (fit.order_interval[1] - fit.order_interval[0]) / 2
        slope = "?" if not fit.resolved else f"{fit.order:.4f}"
        slope += f" ± {error:.4f}" if error > 5e-5 else ""
        identity = "?" if math.isnan(ray.identity) else f"{ray.identity:.4f}"
        table.add_row(
            ray.name,
            order(ray.expected),
            order(ray.jet),
            slope,
            identity,
            f"{fit.decades:.1f}",
            fit.verdict,
            _tick(ray.agrees),
        )
    return table


def digits(found: DigitsReading, console: Console) -> None:
    """Everything about the digits network."""
    console.print(
        f"64-{found.hidden}-10 ReLU network, {found.parameters} parameters, "
        f"{found.accuracy:.1%} right on {found.held_out} images held out; "
        f"read on {found.samples} training images"
    )
    table = new_table(
        "Why directions are dead (counted from data and activations)",
        ("cause", "left"),
        ("which", "left"),
        ("directions", "right"),
    )
    for cause in found.causes:
        table.add_row(cause.name, cause.detail, str(cause.dimensions))
    table.add_section()
    total = sum(c.dimensions for c in found.causes)
    table.add_row("explained", "", str(total), style="bold")
    table.add_row("read as dead", "null space of the Fisher matrix", str(found.dead), style="bold")
    console.print(table)
    if not found.explained:
        console.print(
            Text(
                f"These causes do not account for the dead space ({total} against {found.dead}): "
                "some other dependence between weights, or one direction counted twice.",
                "yellow",
            )
        )
    table = new_table(
        "How they are classified",
        ("kind", "left"),
        ("order k", "right"),
        ("order on the straight line", "right"),
        ("directions", "right"),
    )
    for kind, k, line, count in found.groups:
        table.add_row(kind, order(k), order(line), str(count))
    console.print(table)
    if any(k == math.inf and line != math.inf for _, k, line, _ in found.groups):
        console.print(
            Text(
                "∞ beside a finite order: the straight line is only tangent to a curved set on "
                "which nothing changes, and leaves it; the order is that of the set.",
                "dim",
            )
        )
    console.print(
        Text(
            f"rank {found.rank} of at most {found.rank_limit} output equations"
            f" (half of the images give {found.rank_half}); smallest live / largest dead singular "
            f"value {found.gap:.1e}, tolerance {found.tolerance:.1e}"
        )
    )
    console.print(
        Text(
            f"curvature of a rescaling tangent {found.gauge_curvature:.1e}, of a random direction "
            f"{found.random_curvature:.1e}"
        )
    )
    if found.verdict == "resolved":
        console.print(
            Text(
                f"λ = {found.rlct}, m = {found.multiplicity}, ν = {found.fluctuation:g}: "
                f"resolved ({found.rule})",
                "bold green",
            )
        )
    else:
        console.print(Text(f"{found.lower} ≤ λ ≤ {found.upper}: {found.verdict}", "bold yellow"))
    console.print(Text("rests on: " + "; ".join(found.rests_on), "dim"))
    if found.rank_half is not None and found.rank_half < found.rank:
        console.print(
            Text(
                "This λ belongs to these images: more images wake more directions, and λ grows.",
                "yellow",
            )
        )

"""Pieces of a self-contained HTML page: text made safe, numbers, tables, pictures, the shell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

MISSING = "–"
NUMERIC = ' class="n"'


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def safe(value: Any) -> str:
    """The value as HTML: escaped, unless it is ``Html``."""
    return str(value) if isinstance(value, Html) else escape(str(value))


def number(value: float | None) -> str:
    """A number for reading: whole numbers in full, others to four digits, ∞ and – as such."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")


def interval(ends: Sequence[float] | None) -> str:
    """An interval for reading, with enough digits to tell its ends apart."""
    if ends is None:
        return MISSING
    low, high = ends
    width = abs(high - low)
    if not math.isfinite(width) or width == 0:
        return f"[{number(low)}, {number(high)}]"
    digits = max(0, min(8, 1 - math.floor(math.log10(width))))
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def _cell(value: Any) -> str:
    """A table cell; numbers carry their full value for sorting and for those who copy."""
    if value is None or isinstance(value, bool):
        return f"<td>{MISSING if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float)):
        full = repr(value)
        title = f' title="{full}"' if isinstance(value, float) and math.isfinite(value) else ""
        return f'<td class="n" data-value="{full}"{title}>{number(value)}</td>'
    mark = "" if isinstance(value, Html) or len(str(value)) > 24 else ' class="s"'
    return f"<td{mark}>{safe(value)}</td>"


def name(value: str) -> Html:
    """A dotted name, escaped, that may be broken after its dots."""
    return Html(escape(value).replace(".", ".<wbr>"))


def table(
    columns: Iterable[str],
    rows: Iterable[Sequence[Any]],
    caption: str,
    *,
    identity: str = "",
    sortable: bool = False,
) -> Html:
    """A table; with ``sortable``, headers are buttons and a filter box stands above it.

    Floats and integers become right-aligned cells whose ``data-value`` is the full number. The
    first cell of a row heads it.
    """
    rows = list(rows)
    heads = []
    for position, column in enumerate(columns):
        text = safe(column)
        if sortable:
            text = f'<button type="button" data-column="{position}">{text}</button>'
        numeric = any(type(row[position]) in (int, float) for row in rows)
        heads.append(f'<th scope="col"{NUMERIC if numeric else ""}>{text}</th>')
    body = []
    for row in rows:
        first, *rest = row
        head = _cell(first).replace("<td", '<th scope="row"', 1)[: -len("</td>")] + "</th>"
        body.append("<tr>" + head + "".join(_cell(value) for value in rest) + "</tr>\n")
    mark = f' id="{escape(identity)}"' if identity else ""
    kind = ' class="sortable"' if sortable else ""
    box = (
        f'<p class="filter"><label>Show rows that contain '
        f'<input type="search" data-filters="{escape(identity)}"></label> '
        f"<output></output></p>"
        if sortable
        else ""
    )
    return Html(
        f'{box}<div class="wide"><table{mark}{kind}><caption>{safe(caption)}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def pairs(items: Iterable[tuple[str, Any]]) -> Html:
    """A list of names and values."""
    rows = (
        f"<dt>{safe(key)}</dt><dd>"
        f"{safe(number(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v)}</dd>"
        for key, v in items
    )
    return Html(f"<dl>{''.join(rows)}</dl>\n")


def bullets(items: Iterable[Any]) -> Html:
    """A list of sentences."""
    return Html("<ul>" + "".join(f"<li>{safe(item)}</li>" for item in items) + "</ul>\n")


def paragraph(text: Any, kind: str = "") -> Html:
    """A paragraph, of class ``kind``."""
    mark = f' class="{escape(kind)}"' if kind else ""
    return Html(f"<p{mark}>{safe(text)}</p>\n")


def section(title: str, *parts: str, identity: str = "") -> Html:
    """A section under a heading."""
    mark = f' id="{escape(identity)}"' if identity else ""
    return Html(f"<section{mark}>\n<h2>{safe(title)}</h2>\n{''.join(parts)}</section>\n")


def picture(svg: str, key: str, title: str, caption: str) -> Html:
    """An SVG document inlined, its ids made unique by ``key``, with a title and a caption.

    The ink of the pictures becomes the colour of the text, so that they read on dark paper too.
    """
    from deaddir_fast.scan.plots import INK, LIVE

    colours = {INK: "currentColor", "#ffffff": "var(--paper)", LIVE.lower(): "var(--blue)"}

    def rewrite(found: re.Match[str]) -> str:
        tag = found[0]
        if tag.startswith("<image"):  # equal colour bars come with equal ids, never referred to
            tag = re.sub(r' id="[^"]*"', "", tag)
        tag = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', tag)
        tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", tag)
        tag = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', tag)
        for colour, variable in colours.items():
            tag = tag.replace(colour, variable)
        return tag

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style[^>]*>\*\{[^<]*</style>\s*</defs>", "", svg)
    svg = re.sub(r"<[^>]*>", rewrite, svg)  # tags only: a name may look like an attribute
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{key}-title" ', 1)
    end = svg.index(">", svg.index("<svg")) + 1
    svg = f'{svg[:end]}<title id="{key}-title">{safe(title)}</title>{svg[end:]}'
    return Html(f"<figure>\n{svg}<figcaption>{safe(caption)}</figcaption>\n</figure>\n")


CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #5c5c5c; --line: #d5d5d5;
  --wash: #f4f5f7; --link: #00598c; --warn: #8a4b00; --blue: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --ink: #e8e8e8; --soft: #a9adb3;
  --line: #3b3f45; --wash: #22262b; --link: #7cc4f0; --warn: #f0b45c;
  --blue: #3b9fdb; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans",
  sans-serif; margin: 0 auto; max-width: 82rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--link); }
p { max-width: 60rem; }
.soft, figcaption, caption { color: var(--soft); }
.warn { color: var(--warn); }
.verdict { background: var(--wash); border-left: 4px solid #0072B2; padding: .6rem 1rem;
  overflow-wrap: anywhere; }
.verdict.open { border-left-color: #D55E00; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .4rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums;
  margin: .6rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .55rem; text-align: left;
  vertical-align: top; }
td { max-width: 34rem; overflow-wrap: break-word; }
thead th { background: var(--wash); white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: normal; }
.n { text-align: right; } .n, .s { white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
details { border-bottom: 1px solid var(--line); padding: .25rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .87rem; max-width: 60rem; }
nav a { margin-right: 1rem; }
@page { size: landscape; margin: 1cm; }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #fff;
  --link: #000; --warn: #000; --blue: #0072B2; }
  body { font-size: 9pt; max-width: none; padding: 0; } nav, .filter { display: none; }
  figure svg { max-height: 15cm; } .wide { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .1rem .3rem; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0], key = (row, i) => {
    const cell = row.cells[i], v = cell.dataset.value;
    if (v === undefined || v === "nan") return cell.textContent;
    return v === "inf" ? Infinity : v === "-inf" ? -Infinity : Number(v);
  };
  table.querySelectorAll("thead button").forEach(button => button.addEventListener("click", () => {
    const head = button.parentElement, i = Number(button.dataset.column);
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("thead th").forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows).map(row => [key(row, i), row]);
    rows.sort(([a], [b]) => {
      if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
      const order = typeof a === "number" ? (a === b ? 0 : a < b ? -1 : 1)
        : a.localeCompare(b, undefined, {numeric: true});
      return down ? -order : order;
    });
    rows.forEach(([, row]) => body.appendChild(row));
  }));
});
document.querySelectorAll("input[data-filters]").forEach(box => {
  const table = document.getElementById(box.dataset.filters);
  const said = box.closest(".filter").querySelector("output");
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase(), rows = Array.from(table.tBodies[0].rows);
    rows.forEach(row => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    said.textContent = wanted
      ? rows.filter(row => !row.hidden).length + " of " + rows.length : "";
  });
});
"""


def shell(title: str, *parts: str) -> str:
    """The whole page. It loads nothing: style and script are inside, and a policy says so."""
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{safe(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{''.join(parts)}<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )

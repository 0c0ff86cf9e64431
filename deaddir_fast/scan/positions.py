"""Where a layer stands in its network: which kind it is within a repeated block, and how deep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

Layer = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Layers laid out as kind within the block x depth; a cell may hold several layers.

    ``left_out`` counts the layers of rows beyond the largest number of rows; ``merged`` is the
    number of neighbouring depths in one column.
    """

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], list[Layer]]
    axis: str
    left_out: int
    merged: int


def _patterns(name: str, block: int) -> list[str]:
    """The name with one of its numbers that equal ``block`` replaced by a star, for each."""
    parts = name.split(".")
    return [
        ".".join([*parts[:i], "*", *parts[i + 1 :]])
        for i, part in enumerate(parts)
        if part.isdecimal() and int(part) == block
    ]


def kinds(layers: list[Layer]) -> dict[str, str]:
    """Layer name -> the same name without its block index ("encoder.layer.*.mlp.up").

    Where several numbers of a name equal the index, the one that most layers agree on is taken.
    Layers outside blocks keep their names.
    """
    votes = Counter(
        pattern
        for layer in layers
        if layer["block"] is not None
        for pattern in _patterns(layer["name"], layer["block"])
    )
    out = {}
    for layer in layers:
        patterns = [] if layer["block"] is None else _patterns(layer["name"], layer["block"])
        out[layer["name"]] = max(patterns, key=votes.__getitem__) if patterns else layer["name"]
    return out


def short(name: str, length: int = 34) -> str:
    """The name on one line, cut in the middle where it is long."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    tail = (length - 1) * 2 // 3
    return name[: length - 1 - tail] + "…" + name[-tail:]


def labels(names: list[str]) -> list[str]:
    """Short names, without the leading parts that all names within blocks have."""
    split = [name.split(".") for name in names]
    inside = [parts[:-1] for parts in split if "*" in parts]
    common = 0
    if len(inside) > 1:
        while len({tuple(parts[: common + 1]) for parts in inside}) == 1 and common < min(
            map(len, inside)
        ):
            common += 1
    return [short(".".join(parts[common:] if "*" in parts else parts)) for parts in split]


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def grid(layers: list[Layer], *, rows: int = 26, columns: int = 100) -> Grid:
    """Lay the layers out, in at most so many rows and columns.

    Columns are blocks, with "before" and "after" for what is outside them; without blocks, one
    column a layer and the layers' kinds ("linear", "conv") as rows.
    """
    if any(layer["block"] is not None for layer in layers):
        axis, names = "block", kinds(layers)
        if len(set(names.values())) > rows:  # experts of one layer, say: one row for all of them
            names = {name: _without_numbers(kind) for name, kind in names.items()}
        blocks = sorted({layer["block"] for layer in layers if layer["block"] is not None})
        inside = [layer["depth"] for layer in layers if layer["block"] is not None]
        first = min(inside)
        step = -(-len(blocks) // columns)
        place = {block: 1 + i // step for i, block in enumerate(blocks)}
        last = 1 + max(place.values())
        at = {
            layer["name"]: place[layer["block"]]
            if layer["block"] is not None
            else (0 if layer["depth"] < first else last)
            for layer in layers
        }
        groups = [blocks[i : i + step] for i in range(0, len(blocks), step)]
        heads = ["before", *(_span(group) for group in groups), "after"]
    else:
        axis, names = "depth", {layer["name"]: layer["kind"] for layer in layers}
        step = -(-len(layers) // columns) if layers else 1
        at = {layer["name"]: i // step for i, layer in enumerate(layers)}
        depths = [layer["depth"] for layer in layers]
        heads = [_span(depths[i : i + step]) for i in range(0, len(depths), step)]
    used = sorted(set(at.values()))
    dead: Counter[str] = Counter()
    for layer in layers:
        dead[names[layer["name"]]] += layer["dead"]["block"]
    order = list(dict.fromkeys(names[layer["name"]] for layer in layers))
    kept = order
    if len(order) > rows:
        most = set(sorted(order, key=lambda name: -dead[name])[:rows])
        kept = [name for name in order if name in most]
    row = {name: i for i, name in enumerate(kept)}
    cells: dict[tuple[int, int], list[Layer]] = {}
    left_out = 0
    for layer in layers:
        name = names[layer["name"]]
        if name in row:
            cells.setdefault((row[name], used.index(at[layer["name"]])), []).append(layer)
        else:
            left_out += 1
    return Grid(labels(kept), [heads[i] for i in used], cells, axis, left_out, step)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def spread(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly taken, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]

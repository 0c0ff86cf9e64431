"""The table of results, in Markdown, from a results file.

    python -m bench.table                  print the table of this machine
    python -m bench.table FILE             print the table of a file
    python -m bench.table --readme         rewrite the tables in README.md
    python -m bench.table --readme FILE    the same, and take the one of this kind from FILE

A table stands in README.md between `<!-- bench: FILE -->` and `<!-- /bench -->`; the figures there
are those of the file that the marker names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import FOLDER, ROOT, cpu_file, read

README = ROOT / "README.md"
MARKED = re.compile(r"<!-- bench: (\S+) -->\n.*?<!-- /bench -->", re.DOTALL)
OURS = "ours"


def milliseconds(seconds: float) -> str:
    """Three digits, without an exponent."""
    value = seconds * 1e3
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows grouped by case, in order."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def split(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Our row, and that of the fastest other implementation, if one was timed."""
    ours = next(row for row in rows if row["implementation"] == OURS)
    others = [row for row in rows if row is not ours and "p50" in row]
    return ours, min(others, key=lambda row: row["p50"], default=None)


def _error(row: dict[str, Any]) -> str:
    if row["error"] is None:
        return "∞"
    if row["dtype"] == "fp64" and row["error"] < 1e-15:  # the truth is rounded as well
        return "<1e-15"
    return f"{row['error']:.0e}"


def _time(row: dict[str, Any]) -> str:
    low, middle, high = (milliseconds(row[q]) for q in ("p20", "p50", "p80"))
    return f"{middle} ({low}–{high})"


def _memory(rows: list[dict[str, Any]], ours: dict[str, Any]) -> str:
    """Peak extra memory of ours and of the fastest formulation."""
    _, best = split(rows)
    if best is None or "extra_bytes" not in ours or "extra_bytes" not in best:
        return ""
    return f"; {ours['extra_bytes'] / 1e6:.1f} MB against {best['extra_bytes'] / 1e6:.0f} MB"


def line(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The cells of one case."""
    ours, best = split(rows)
    shape = " ".join(f"{k}={v}" for k, v in ours["shape"].items())
    name = f"`{ours['problem']}` {shape} {ours['dtype']}"
    other = "—" if best is None else f"{_time(best)}, `{best['implementation']}`"
    error = _error(ours) if best is None else f"{_error(ours)} / {_error(best)}"
    if ours["gate"] != "ok":  # no speed-up is reported on a red gate
        return name, ours["route"], f"wrong: {ours['gate']}", other, "—", "—", error
    ratio = "—" if best is None else f"{best['p50'] / ours['p50']:.2f}"
    share = f"{100 * ours['share']:.0f} % of {ours['bound']}" if "share" in ours else "—"
    return name, ours["route"], _time(ours), other, ratio + _memory(rows, ours), share, error


HEADER = (
    "case",
    "ours is",
    "ours, ms",
    "fastest in torch, ms",
    "×",
    "of the bound",
    "error, ours / torch",
)


def caption(content: dict[str, Any]) -> str:
    """What the rows were measured with."""
    m = content["machine"]
    threads = {row["threads"] for row in content["rows"] if "threads" in row}
    parts = [f"{m['device']}"]
    if threads:
        parts.append(f"{'/'.join(map(str, sorted(threads)))} threads, {m['isa'] or 'no extension'}")
    parts += [f"torch {m['torch']}", f"revision {m['revision']}", m["date"]]
    text = "; ".join(parts) + "."
    if content.get("note"):
        text += f" {content['note']}"
    if m.get("load", 0) > 0.5:
        text += f" Other work ran on the machine (load {m['load']:.1f} before the run)."
    return f"{text} {ceilings(content)}"


def ceilings(content: dict[str, Any]) -> str:
    """The measured ceilings that shares refer to."""
    peaks = content["peaks"]
    if "matmul" in peaks:  # a GPU
        rates = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in peaks["matmul"].items())
        return f"Measured: copy {peaks['copy'] / 1e12:.2f} TB/s; matmul, TFLOP/s: {rates}."
    threads = max((row["threads"] for row in content["rows"]), default=1)
    at = peaks[f"{threads} threads" if threads > 1 else "1 thread"]
    flops = " and ".join(f"{v / 1e9:.0f} in {k}" for k, v in at["flops"].items())
    return (
        f"Measured: {flops} GFLOP/s ({peaks['source']}), "
        f"{max(at['bytes'].values()) / 1e9:.1f} GB/s."
    )


def markdown(content: dict[str, Any]) -> str:
    """The whole table, with its caption."""
    cells = [HEADER, *(line(rows) for rows in by_case(content["rows"]).values())]
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEADER))]

    def padded(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    lines = [padded(cells[0]), rule, *map(padded, cells[1:])]
    return caption(content) + "\n\n" + "\n".join(lines)


def notes(content: dict[str, Any]) -> Iterator[str]:
    """What a reader of the table should know: red gates, targets missed, rows not run."""
    for case, rows in by_case(content["rows"]).items():
        ours, best = split(rows)
        for row in rows:
            if row["gate"] != "ok":
                yield f"RED  {case}: {row['implementation']}: {row['gate']}"
        if ours["gate"] != "ok":
            continue
        if best is not None and ours.get("target"):
            ratio = best["p50"] / ours["p50"]
            if ratio < ours["target"]:
                yield f"below target  {case}: {ratio:.2f}, aimed at {ours['target']:g}"
        if ours.get("share", 1) < ours.get("share_target", 0):
            yield (
                f"below target  {case}: {100 * ours['share']:.0f} % of the bound, "
                f"aimed at {100 * ours['share_target']:.0f} %"
            )
        if ours.get("memory") and best is not None and "extra_bytes" in best:
            part = ours.get("extra_bytes", 0) / max(1, best["extra_bytes"])
            if part > ours["memory"]:
                yield f"below target  {case}: {part:.3f} of the memory, aimed at {ours['memory']:g}"
    for case in content.get("not_run", []):
        yield f"not run  {case}"


def rewritten(text: str, replacement: Path | None = None) -> str:
    """README with each marked table as its file gives it."""
    kind = None if replacement is None else replacement.name.partition("-")[0]

    def table(match: re.Match[str]) -> str:
        path = ROOT / match.group(1)
        if replacement is not None and path.name.partition("-")[0] == kind:
            path = replacement.resolve()
        name = path.relative_to(ROOT).as_posix()
        return f"<!-- bench: {name} -->\n{markdown(read(path))}\n<!-- /bench -->"

    return MARKED.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or rewrite those of README.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help=f"a results file in {FOLDER.name}/")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    chosen = parser.parse_args(arguments)
    if chosen.readme:
        text = rewritten(README.read_text(), chosen.file)
        if chosen.file is not None and f"bench/results/{chosen.file.name} -->" not in text:
            print(f"README.md has no marked table of the kind of {chosen.file}", file=sys.stderr)
            return 1
        README.write_text(text)
        return 0
    path = chosen.file or cpu_file()
    if not path.exists():
        print(f"{path} is not there: `make bench` measures", file=sys.stderr)
        return 1
    content = read(path)
    print(markdown(content))
    for note in notes(content):
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())

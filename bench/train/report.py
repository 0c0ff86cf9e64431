"""The report of a comparison: verdicts, a table in Markdown, a figure.

    python -m bench.train.report FILE          print the table of a results file
    python -m bench.train.report --readme      rewrite the tables in README.md

A table stands in README.md between `<!-- train: FILE -->` and `<!-- /train -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench import results
from deaddir_fast.scan.plots import CHAIN_COLOURS, STYLE

README = results.ROOT / "README.md"
MARKED = re.compile(r"<!-- train: (\S+) -->\n.*?<!-- /train -->", re.DOTALL)
HEADER = (
    "problem",
    "optimizer",
    "best lr",
    "training loss",
    "held-out loss",
    "from a moved start",
    "step",
    "state",
    "drift",
    "readable layers",
)


def path_of() -> Path:
    """Where results of this machine's processor go."""
    return results.FOLDER / f"train-{results.cpu_file().name}"


def row_of(content: dict[str, Any], problem: str, optimizer: str) -> dict[str, Any] | None:
    """The row of a problem and an optimizer."""
    rows = content["rows"]
    return next((r for r in rows if (r["problem"], r["optimizer"]) == (problem, optimizer)), None)


def mean(values: list[float | None]) -> float | None:
    """The mean, None if one is missing (a training that diverged)."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def verdict(adamw: dict[str, Any], ours: dict[str, Any]) -> str:
    """Whether DDCAdam reached AdamW's training loss, each at its best learning rate.

    It did if its mean over the seeds is no larger; same seeds share starts and batches.
    """
    base, found = mean(adamw["train"]), mean(ours["train"])
    if found is None:
        return "does not reach AdamW's training loss: it diverged"
    if base is None:
        return "reaches a training loss where AdamW diverged"
    lower = sum(a >= b for a, b in zip(adamw["train"], ours["train"], strict=True))
    seeds = f"no higher in {lower} of {len(ours['train'])} seeds"
    figures = f"{found:.4g} against {base:.4g}, {100 * (found / base - 1):+.1f} %, {seeds}"
    if found <= base:
        return f"reaches AdamW's training loss: {figures}"
    spread = max(adamw["train"]) - min(adamw["train"])
    near = ", by less than AdamW's own seeds differ" if found - base <= spread else ""
    return f"does not reach AdamW's training loss{near}: {figures}"


def verdicts(content: dict[str, Any]) -> list[str]:
    """One sentence for each problem that both were run on."""
    found = []
    for problem in content["problems"]:
        adamw = row_of(content, problem["name"], "AdamW")
        ours = row_of(content, problem["name"], "DDCAdam")
        if adamw is not None and ours is not None:
            found.append(f"`{problem['name']}`: DDCAdam {verdict(adamw, ours)}.")
    return found


def _loss(values: list[float | None]) -> str:
    average = mean(values)
    if average is None:
        return "diverged"
    known = [v for v in values if v is not None]
    return f"{average:.4f} ({min(known):.4f}–{max(known):.4f})"


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row."""
    scan, moved = row["scan"], row["moved"]
    first = row["train"][0]
    change = "diverged"
    if moved is not None and first is not None:
        change = f"{moved:.4f} ({moved - first:+.1e})"
    step = f"{row['seconds'][1] * 1e3:.2f} ms"
    if row["ratio"] is not None:
        step = f"{row['ratio']:.2f} ({row['optimizer_ratio']:.2f})"
    drift = row["drift"]
    return (
        f"`{row['problem']}`",
        row["optimizer"],
        f"{row['lr']:g}{' (edge)' if row['edge'] else ''}",
        _loss(row["train"]),
        _loss(row["held"]),
        change,
        step,
        f"{row['state_bytes'] / row['parameter_bytes']:.2f}",
        "—" if drift is None else f"{drift['median']:.1e} ({drift['largest']:.1e})",
        "—" if scan is None else f"{scan['readable']} of {scan['layers']}",
    )


def markdown(content: dict[str, Any]) -> str:
    """Verdicts and the table, with a caption."""
    m = content["machine"]
    cells = [HEADER, *map(line, content["rows"])]
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEADER))]

    def padded(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    table = [padded(cells[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|"]
    table += [padded(row) for row in cells[1:]]
    caption = (
        f"{m['device']}, one thread a training; torch {m['torch']}; revision {m['revision']}; "
        f"{m['date']}."
    )
    about = [
        f"- `{p['name']}`: {p['about']}; {p['parameters']:,} parameters, {p['steps']} steps of "
        f"{p['batch']} samples."
        for p in content["problems"]
    ]
    said = [f"- {text}" for text in verdicts(content)]
    return "\n".join([caption, "", *about, "", *said, "", *table])


# ---------------------------------------------------------------------------------- the figure


def _curves(ax: Axes, content: dict[str, Any], problem: str) -> None:
    rows = [row for row in content["rows"] if row["problem"] == problem]
    for row, colour in zip(rows, CHAIN_COLOURS, strict=False):
        for k, curve in enumerate(row["curves"]):
            steps = [p["step"] for p in curve]
            label = f"{row['optimizer']}, {row['lr']:g}" if k == 0 else None
            ax.plot(steps, _plottable(curve, "train"), color=colour, lw=1.2, label=label)
            ax.plot(steps, _plottable(curve, "held"), color=colour, lw=0.8, ls=":")
    ax.set(title=problem, xlabel="step", ylabel="loss (dotted: held out)", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=8)


def _plottable(curve: list[dict[str, Any]], part: str) -> list[float]:
    # From JSON: what was not finite is None, or a string in a run's own file.
    return [float("nan") if p[part] is None else float(p[part]) for p in curve]


def _bars(ax: Axes, content: dict[str, Any], title: str, value: Any) -> None:
    names = [p["name"] for p in content["problems"]]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in content["rows"]))
    width = 0.8 / len(optimizers)
    for k, (optimizer, colour) in enumerate(zip(optimizers, CHAIN_COLOURS, strict=False)):
        rows = [row_of(content, name, optimizer) for name in names]
        heights = [float("nan") if r is None else value(r) for r in rows]
        places = [i + (k - (len(optimizers) - 1) / 2) * width for i in range(len(names))]
        ax.bar(places, heights, width * 0.9, color=colour, label=optimizer)
    ax.set_title(title)
    ax.set_xticks(range(len(names)), names)


def figure(content: dict[str, Any]) -> Figure:
    """Loss curves above; step time, state, drift and readable layers below."""
    nan = float("nan")
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(13, 7), layout="constrained")
        grid = made.add_gridspec(2, 4)
        for k, problem in enumerate(content["problems"]):
            _curves(made.add_subplot(grid[0, k]), content, problem["name"])
        panels = [made.add_subplot(grid[1, k]) for k in range(4)]
        _bars(panels[0], content, "step, over AdamW's", lambda r: r["ratio"] or nan)
        _bars(
            panels[1],
            content,
            "state, over the parameters",
            lambda r: r["state_bytes"] / r["parameter_bytes"],
        )
        _bars(panels[2], content, "drift, median", lambda r: (r["drift"] or {}).get("median", nan))
        panels[2].set_yscale("log")
        _bars(
            panels[3],
            content,
            "readable layers, share",
            lambda r: r["scan"]["readable"] / r["scan"]["layers"] if r["scan"] else nan,
        )
        # Over the bars, in room made for it.
        panels[0].set_ylim(top=1.5 * panels[0].get_ylim()[1])
        panels[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
        made.canvas.draw()
    return made


def draw(content: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure(content).savefig(path, dpi=150)


# ------------------------------------------------------------------------------------ README.md


def rewritten(text: str) -> str:
    """README with each marked table as its file gives it."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        content = results.read(results.ROOT / name)
        return f"<!-- train: {name} -->\n{markdown(content)}\n<!-- /train -->"

    return MARKED.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Print a report, or rewrite those of README.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.train.report", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="a results file")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    chosen = parser.parse_args(arguments)
    if chosen.readme:
        README.write_text(rewritten(README.read_text()))
        return 0
    path = chosen.file or path_of()
    if not path.exists():
        print(f"{path} is not there: `python -m bench.train` measures", file=sys.stderr)
        return 1
    print(markdown(results.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

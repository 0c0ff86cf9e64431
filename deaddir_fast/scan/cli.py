"""The command line: ``deaddir demo``, ``predict``, ``compare``, ``doctor``.

Heavy imports wait for a command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

app = typer.Typer(
    name="deaddir",
    help="Read singular geometry off neural networks: dead directions, orders, (λ, m, ν).",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"deaddir_fast {version('deaddir_fast')}")
        except PackageNotFoundError:
            from deaddir_fast import __version__

            typer.echo(f"deaddir_fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Read singular geometry off neural networks."""


@app.command()
def demo(
    out: Path = typer.Option(Path("demo-report"), "--out", "-o", help="Folder for the report."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of every random draw."),
    quick: bool = typer.Option(False, "--quick", help="Fewer and smaller cases, for a first look."),
) -> None:
    """Read networks whose answers are known, then one trained on handwritten digits.

    Prints tables; writes report.json, curvature.png and curvature.svg to the folder.
    """
    from deaddir_fast.scan.demo import disagreements, run

    try:
        wrong = disagreements(run(out, seed=seed, quick=quick))
    except OSError as error:
        where = error.filename or out
        typer.echo(f"error: cannot write {where}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing half-written is left behind", err=True)
        raise typer.Exit(130) from None
    if wrong:
        typer.echo(f"error: not as mathematics says: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


@app.command()
def predict(
    spec: str = typer.Argument(
        ...,
        metavar="SPEC",
        help="Primitives, e.g. 'residual(layer_norm, attention)*2, linear', or module:callable "
        "for a function that returns an nn.Module.",
    ),
    unit: int = typer.Option(0, "--unit", "-u", min=0, help="Index of the channel turned down."),
    bias: str = typer.Option("scale", "--bias", help="The unit's biases: scale, zero or keep."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Rates of every layer when the weights of one unit are scaled by t.

    Slopes of A = E[a²], G = E[g²] and their product, as t → 0, from the rate calculus.
    Primitives: linear, conv, mlp:ACT, swiglu, geglu, reglu, glu, bilinear, attention, layer_norm,
    rms_norm, moe:ACT, residual(…) and activations; "+bias" adds biases, "*3" repeats.
    """
    from deaddir_fast.scan import predicted

    try:
        rates = predicted.rates(spec, unit, bias)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(predicted.as_json(rates), indent=2, allow_nan=False))
        return
    from rich.console import Console

    predicted.show(rates, Console())


@app.command()
def compare(
    a: Path = typer.Argument(..., metavar="A", help="Folder of the first scan."),
    b: Path = typer.Argument(..., metavar="B", help="Folder of the second scan."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="Folder for compare.json and compare.html."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Lay two scans side by side: ranks, dead directions, spectra, orders and bounds on λ.

    Changes are from A to B. What makes the two hard to compare (other data, other settings) is
    said first.
    """
    from deaddir_fast.scan import compare as comparing
    from deaddir_fast.scan import report
    from deaddir_fast.scan.read_report import ReportError

    try:
        found = comparing.compare(a, b, out=out)
    except ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or out}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(report.to_json(found.as_json()), nl=False)
        return
    from rich.console import Console

    comparing.show(found, Console())
    if out is not None:
        typer.echo(f"written: {out / 'compare.html'}, {out / 'compare.json'}")


@app.command()
def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Say which routes (torch reference, C++, Triton) work here, and why the others do not."""
    from deaddir_fast.scan import doctor as checks

    found = checks.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    from rich.console import Console

    checks.show(found, Console())


def main() -> None:
    """Entry point of the ``deaddir`` script."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)

"""The command line: ``deaddir demo``, ``scan``, ``predict``, ``compare``, ``doctor``.

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
def scan(
    model: str = typer.Argument(
        ...,
        metavar="MODEL",
        help="A Hugging Face folder or id (safetensors only), or module:callable or "
        "file.py:callable for a function that returns an nn.Module.",
    ),
    data: Path = typer.Option(
        ..., "--data", "-d", help="Text, .jsonl, or token ids or features as .npy or .safetensors."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="Folder of the scan; run again to go on."),
    likelihood: str | None = typer.Option(
        None, "--likelihood", help="categorical, gaussian, bernoulli or poisson; by its head."
    ),
    fisher: str = typer.Option("mc", "--fisher", help="exact, mc or empirical."),
    layers: list[str] | None = typer.Option(
        None, "--layers", "-l", help="Name or pattern of layers, e.g. '*.mlp.*'; repeatable."
    ),
    directions: int = typer.Option(3, "--directions", "-k", min=0, help="Rays in each layer."),
    batch: int = typer.Option(16, "--batch", "-b", min=1, help="Samples of a batch."),
    length: int | None = typer.Option(None, "--length", min=1, help="Most tokens of a sample."),
    samples: int | None = typer.Option(None, "--samples", "-n", min=1, help="Draw this many."),
    draws: int = typer.Option(1, "--draws", min=1, help="Labels drawn for each output (mc)."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of every random draw."),
    ray_samples: int = typer.Option(4, "--ray-samples", min=1, help="Samples rays are read on."),
    shards: int | None = typer.Option(
        None, "--shards", min=1, help="Parts kept on disk one by one."
    ),
    units: list[int] | None = typer.Option(
        None, "--unit", "-u", min=0, help="Read the rates of this channel too; repeatable."
    ),
    device: str | None = typer.Option(
        None, "--device", help="cpu, cuda, cuda:1; cuda if there is."
    ),
    dtype: str | None = typer.Option(None, "--dtype", help="Load weights as float32, bfloat16 …"),
    offline: bool = typer.Option(False, "--offline", help="Download nothing."),
    strict: bool = typer.Option(False, "--strict", help="Fail where a parameter has no rule."),
    fresh: bool = typer.Option(False, "--fresh", help="Remove an old scan in the folder first."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print time and memory, load nothing."),
    explain: bool = typer.Option(False, "--explain", help="Print what each layer's factors took."),
) -> None:
    """Read every layer of a model: spectra, dead directions, orders, a bound on λ.

    Writes report.html, report.json and spectra.safetensors to the folder. Interrupted, the same
    command goes on where it stopped. "torchrun --nproc-per-node 4 --no-python deaddir scan …"
    shares the work among processes, one GPU each, on a folder that all see.
    """
    from rich.console import Console

    from deaddir_fast.scan import command
    from deaddir_fast.scan.ranks import RankError, is_first

    console = Console(quiet=not is_first())
    request = command.Request(
        model, data, out, likelihood, fisher, layers or None, directions, batch, length, samples,
        draws, seed, ray_samples, shards, units or None, device, dtype, offline, strict, fresh,
    )  # fmt: skip
    try:
        if dry_run:
            command.dry(request, console)
            return
        report = command.run(request, console)
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command to go on", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        typer.echo(f"error: {error.strerror or error}: {error.filename or out}", err=True)
        typer.echo("what was done is kept; run the same command to go on", err=True)
        raise typer.Exit(1) from None
    except RankError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if explain:
        report.explain(console)


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

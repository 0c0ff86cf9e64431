"""Check and time every Triton kernel, and the step of DDCAdam, on a GPU in under ten minutes.

    python bench/gpu.py                          results in bench/results/gpu-<device>.json
    TRITON_INTERPRET=1 python bench/gpu.py --check      the same steps on a CPU, tiny, untimed

Rows run in order of importance. Before the first row of an operation its kernel is checked against
fp64 over shapes and types; every row is checked again at its own size. A red check marks the rows
of the operation, stops nothing, and makes the exit status 1. What does not fit in the budget is
listed as not run. The results file is written after each step, so that a kill loses nothing. The
work is done in a process of its own: one that a kernel brings down (a fault on the device outlives
its step) is replaced by a new one, which goes on with the next step.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: bench is a package of the repository's root
    sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from bench.cases import Case
    from bench.gpu_device import Device
    from bench.problems import Problem

#: Seconds below which a step is not begun.
LEAST = {"checks": 15.0, "row": 10.0, "step": 60.0, "tests": 20.0}
#: Seconds after which the checks of one problem end: every shape and type may mean a compilation.
CHECKS = 25.0


#: Exit status of a worker whose device no longer answers: go on in a new process.
RESTART = 75
#: Deaths of the worker after which the rest is given up.
RESTARTS = 12


class OutOfTime(BaseException):
    """The budget is spent; no `except Exception` may swallow it."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default 540)")
    parser.add_argument("--check", action="store_true", help="tiny sizes; also in the interpreter")
    parser.add_argument("--only", default="", help="only problems whose name has this in it")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--no-tests", action="store_true", help="leave out pytest -m gpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--install", action="store_true", help="(re)install the package first")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def installed() -> bool:
    """Whether the package can be imported with its kernels."""
    try:
        return importlib.util.find_spec("deaddir_fast.kernels") is not None
    except ImportError:
        return False


def install() -> None:
    """Install the checkout in place, without network."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    print("installing the package in place", flush=True)
    done = subprocess.run([*command, "-e", str(ROOT)], check=False)
    if done.returncode != 0:
        print("not built; installing without the C++ kernels", flush=True)
        subprocess.run(
            [*command, "-e", str(ROOT)], env={**os.environ, "DDF_NO_EXT": "true"}, check=True
        )


def find_device(check: bool) -> Device:
    """The GPU, or with ``check`` the interpreter; exits with a message where there is neither."""
    import torch

    from bench.gpu_device import Gpu, Interpreter
    from deaddir_fast.kernels import interpreted

    if interpreted():
        if check:
            return Interpreter()
        sys.exit("TRITON_INTERPRET is set: unset it to measure a GPU, or add --check")
    if torch.cuda.is_available():
        return Gpu()
    hint = "set TRITON_INTERPRET=1 to run --check" if check else "--check runs on a CPU"
    sys.exit(f"torch sees no GPU here ({hint} in Triton's interpreter)")


# --- the run --------------------------------------------------------------------------------------


class Run:
    """The state of one run: what was found, and what is written after each step."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        from bench import results

        self.options, self.device = options, device
        self.content: dict[str, Any] = {
            "machine": {**results.machine(""), **device.describe()},
            "note": device.note,
            "complete": False,
            "peaks": {},
            "tests": {},
            "done": [],
            "begun": None,
            "failures": [],
            "checks": [],
            "not_run": [],
            "rows": [],
        }
        name = f"gpu-{results.slug(self.content['machine']['device'])}.json"
        self.path = options.out or (
            ROOT / "out" / f"check-{name}" if options.check else results.FOLDER / name
        )
        if options.resume and self.path.exists():
            self.content |= results.read(self.path)
            if self.content["begun"] is not None:  # the process died in it
                self.failed(self.content["begun"], "the process died")

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.options.budget - (time.time() - self.options.started)

    def save(self) -> None:
        """Write what is known so far."""
        from bench import results

        results.write(self.path, self.content)

    def step(self, what: str, least: float, act: Callable[[], None]) -> None:
        """Do one step if there is time for it; note it as not run if not, or if it ran out."""
        before = time.time()
        if what in self.content["done"]:
            return
        if what in self.content["not_run"]:  # by an earlier process
            self.content["not_run"].remove(what)
        if self.left < least:
            self.content["not_run"].append(what)
            return
        self.content["begun"] = what
        self.save()
        try:
            with alarm(self.left):
                act()
        except OutOfTime:
            self.content["not_run"].append(f"{what} (began, ran out of time)")
        except Exception as error:  # whatever it raises must not stop the others
            self.failed(what, f"{type(error).__name__}: {error}")
        self.content["done"].append(what)
        self.content["begun"] = None
        alive = self.device.alive()
        if not alive:
            self.failed(what, "the device no longer answers after it")
        self.mark()
        self.save()
        print(f"{time.time() - before:6.1f} s  {what}", flush=True)
        if not alive:
            print("the device no longer answers: going on in a new process", flush=True)
            sys.exit(RESTART)

    def failed(self, what: str, why: str) -> None:
        """Note a step that broke."""
        self.content["failures"].append({"step": what, "message": " ".join(why.split())[:300]})
        self.content["done"].append(what)
        self.content["begun"] = None

    # -- steps

    def ceilings(self) -> None:
        """Measure what the device reaches on plain work."""
        from bench.gpu_device import ceilings

        self.content["peaks"] = ceilings(self.device, self.options.check)

    def check(self, problem: Problem) -> None:
        """Check one kernel over shapes and types, as far as its share of the time goes."""
        from bench.gpu_checks import checks

        end = time.time() + CHECKS
        planned = checks(problem, self.device.name, tiny=self.options.check)
        for k, check in enumerate(planned):
            if time.time() > end:
                self.content["not_run"].append(f"{len(planned) - k} checks of {problem.name}")
                return
            record = check()
            self.content["checks"].append(record)
            if record["verdict"] != "ok":
                where = f"{record['problem']} {record['shape']} {record['dtype']}"
                print(f"{record['verdict']}: {where}, {record['what']}: {record['message']}")
                if not self.device.alive():
                    return

    def row(self, case: Case) -> None:
        """Gate and time one case."""
        from bench.gpu_row import rows

        # compiling takes long: not in the last third, which is for further rows
        compiled = case.compile and not self.options.no_compile
        compiled = compiled and self.left > self.options.budget / 3
        self.content["rows"] += rows(case, self.device, self.content["peaks"], compiled)

    def optimizer(self, captured: bool) -> None:
        """Gate and time the whole step of DDCAdam."""
        from bench.gpu_step import rows

        self.content["rows"] += rows(
            self.device, self.content["peaks"], captured=captured, tiny=self.options.check
        )

    def pytest(self) -> None:
        """Run the tests that need a GPU."""
        if importlib.util.find_spec("pytest") is None:
            self.content["tests"] = {"verdict": "not run", "summary": "pytest is not installed"}
            return
        limit = max(LEAST["tests"], min(150, self.left / 2))
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        try:
            done = subprocess.run(
                [*command, "-p", "no:cacheprovider"],
                cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.content["tests"] = {"verdict": "not run", "summary": f"not done in {limit:.0f} s"}
            return
        verdict = "ok" if done.returncode in (0, 5) else "red"
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
        self.content["tests"] = {"verdict": verdict, "summary": lines[-1]}
        if verdict == "red":
            print("\n".join(lines[-40:]))

    # -- verdict

    def mark(self) -> None:
        """Mark the rows of operations with a red check: no speed-up is reported for them."""
        red = {c["op"]: c for c in self.content["checks"] if c["verdict"] == "red"}
        for row in self.content["rows"]:
            found = red.get(row["op"])
            if found is not None and row["implementation"] == "ours" and row["gate"] == "ok":
                row["gate"] = f"{found['what']} {found['dtype']} {found['shape']} is red"

    def red(self) -> bool:
        """Whether anything is wrong."""
        ours = (row for row in self.content["rows"] if row["implementation"] == "ours")
        return (
            any(check["verdict"] == "red" for check in self.content["checks"])
            or any(row["gate"] != "ok" for row in ours)
            or self.content["tests"].get("verdict") == "red"
            or bool(self.content["failures"])
        )


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The steps in order of importance: ("checks", problem), ("row", case), ...."""
    from bench.cases import GPU, TINY
    from bench.gpu_checks import has_kernel
    from bench.problems import PROBLEMS

    checked: set[str] = set()

    def wanted(problem: Problem) -> bool:
        return has_kernel(problem) and options.only in problem.name

    def rows(cases: list[Case]) -> Iterator[tuple[str, Any]]:
        for case in cases:
            if wanted(case.of):
                if case.problem not in checked:
                    checked.add(case.problem)
                    yield "checks", case.of
                yield "row", case

    cases = TINY if options.check else GPU
    yield from rows([case for case in cases if case.compile])
    if options.only in "ddcadam_step":
        yield from (("step", captured) for captured in (False, True))
    if not options.no_tests:
        yield "tests", None
    for problem in PROBLEMS.values():  # those that are only checked
        if wanted(problem) and problem.name not in {c.problem for c in cases}:
            yield "checks", problem
    yield from rows([case for case in cases if not case.compile])


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 1 if a check was red."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.worker:
        return work(options)
    if options.install or not installed():
        install()
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    command += ["--worker", f"--started={options.started}"]
    for _ in range(RESTARTS + 1):
        left = options.budget - (time.time() - options.started)
        try:
            status = subprocess.run(command, check=False, timeout=max(60, left + 60)).returncode
        except subprocess.TimeoutExpired:
            print("the device hangs; the results file holds what was done before", file=sys.stderr)
            return 1
        if status in (0, 1, 2):
            return status
        print(f"the worker ended with status {status}", file=sys.stderr)
        command += ["--resume"] * ("--resume" not in command)
    print(f"given up after {RESTARTS} restarts", file=sys.stderr)
    return 1


def work(options: argparse.Namespace) -> int:
    """Take the steps one by one, but for those that an earlier process has done."""
    device = find_device(options.check)
    if device.name == "cpu" and (ROOT / "tests").is_dir():
        sys.path.append(str(ROOT / "tests"))
        import interpreter_fidelity

        interpreter_fidelity.install()  # bf16 products are wrong without it
    run = Run(options, device)
    least = {name: 1.0 for name in LEAST} if options.check else LEAST
    run.step("ceilings", least["row"], run.ceilings)
    for kind, what in plan(options):
        if kind == "checks":
            run.step(f"checks of {what.name}", least[kind], lambda p=what: run.check(p))
        elif kind == "row":
            run.step(what.name, least[kind], lambda c=what: run.row(c))
        elif kind == "step":
            name = f"the step of DDCAdam{', captured' * what}"
            run.step(name, least[kind], lambda c=what: run.optimizer(c))
        else:
            run.step("pytest -m gpu tests/kernels", least[kind], run.pytest)
    run.content["complete"] = not run.content["not_run"]
    run.content["seconds"] = time.time() - options.started
    run.save()
    show(run)
    return int(run.red())


def show(run: Run) -> None:
    """Print the table, what is wrong, and what was not run."""
    from rich.console import Console
    from rich.table import Table

    from bench.gpu_row import cells
    from bench.table import by_case, ceilings, notes

    console = Console()
    console = console if console.is_terminal else Console(width=190)
    title = f"{run.content['machine']['device']}. {run.device.note}".strip()
    table = Table(title=title, title_justify="left")
    for name, side in (
        ("case", "left"), ("ours, ms (p20–p80)", "right"), ("fastest torch, ms", "left"),
        ("×", "right"), ("rate", "right"), ("of bound", "right"), ("memory", "right"),
        ("error", "right"), ("verdict", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for group in by_case(run.content["rows"]).values():
        table.add_row(*cells(group))
    console.print(table, markup=False)
    if run.content["peaks"]:
        print(ceilings(run.content))
    verdicts = [c["verdict"] for c in run.content["checks"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("ok", "refused", "red"))
    print(f"checks: {counts}; tests: {run.content['tests'].get('summary', 'not run')}")
    for check in run.content["checks"]:
        if check["verdict"] != "ok":
            print(
                f"{check['verdict'].upper()}  {check['problem']} {check['shape']} "
                f"{check['dtype']}, {check['what']}: {check['message']}"
            )
    for failure in run.content["failures"]:
        print(f"FAILED  {failure['step']}: {failure['message']}")
    for note in notes(run.content):
        print(note)
    print(f"{run.content['seconds']:.0f} s; written: {run.path}")


if __name__ == "__main__":
    sys.exit(main())

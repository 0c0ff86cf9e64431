"""Compile every kernel of every manifest ahead of time, without a GPU, and check what came out.

    python -m deaddir_fast.kernels.aot

A manifest is the function ``aot()`` of a kernel file: the configurations that a launch can choose.
For each target the registers, shared memory, spills and matrix instructions are printed. The exit
status is 1 if a case fails to compile, spills, needs more shared memory than the target has, or
lacks the instruction that should multiply its type (an empty kernel compiles too), or has one that
rounds the operands first.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import deaddir_fast.kernels
from deaddir_fast.kernels._case import Case


@dataclass(frozen=True)
class Unit:
    """The instruction that must multiply operands of a type, and code that must not."""

    required: str
    forbidden: str = r"(?!)"


@dataclass(frozen=True)
class Target:
    """A device to compile for: Triton's target, its shared memory, its instruction per type."""

    name: str
    backend: str
    arch: int | str
    lanes: int
    shared_limit: int
    units: dict[str, Unit]


def _nvidia(name: str, arch: int, shared_limit: int, bf16: str, fp16: str) -> Target:
    units = {
        "bf16": Unit(bf16),
        "fp16": Unit(fp16),
        # "ieee" products of fp32 have no matrix unit: a matrix instruction means tf32
        "fp32": Unit(r"fma\.rn\.f32", r"mma\.sync|wgmma|tcgen05|tf32"),
        "fp64": Unit(r"mma\.sync\S*\.f64|fma\.rn\.f64", r"wgmma|tcgen05|tf32"),
        # no products of matrices: exponentials and sums
        "elementwise": Unit(r"ex2\.approx|fma\.rn\.f64", r"mma\.sync|wgmma|tcgen05"),
        # bound by memory: loads of 16 bytes a lane; or sums of a few numbers
        "vectors": Unit(r"ld\.global\S*\.v(4\.b32|2\.b64)", r"mma\.sync|wgmma|tcgen05"),
        "sums": Unit(r"add(\.rn)?\.f(32|64)", r"mma\.sync|wgmma|tcgen05"),
    }
    return Target(name, "cuda", arch, 32, shared_limit, units)


TARGETS = (
    _nvidia("sm_80", 80, 163 * 1024, r"mma\.sync\S*\.bf16\.", r"mma\.sync\S*\.f16\."),
    _nvidia("sm_90", 90, 227 * 1024, r"wgmma\.mma_async\S*\.bf16", r"wgmma\.mma_async\S*\.f16"),
    # one instruction for both; a descriptor at run time says bf16 or fp16
    _nvidia("sm_100", 100, 227 * 1024, r"tcgen05\.mma\S*kind::f16", r"tcgen05\.mma\S*kind::f16"),
    Target(
        "gfx942",
        "hip",
        "gfx942",
        64,
        64 * 1024,
        {
            "bf16": Unit(r"v_mfma_f32_\d+x\d+x\d+_?bf16"),
            "fp16": Unit(r"v_mfma_f32_\d+x\d+x\d+_?f16"),
            "fp32": Unit(r"v_mfma_f32_\d+x\d+x\d+_?f32", r"v_mfma\w*(xf32|bf16|_f16)"),
            "fp64": Unit(r"v_mfma_f64_\d+x\d+x\d+_?f64", r"v_mfma_f32"),
            "elementwise": Unit(r"v_exp_f32|v_fma\w*_f64", r"v_mfma"),
            "vectors": Unit(r"(global|buffer)_load_dwordx4", r"v_mfma"),
            "sums": Unit(r"v_(pk_)?add_f(32|64)", r"v_mfma"),
        },
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What one compilation produced. ``problems`` is empty where it is fit to ship."""

    case: Case
    target: Target
    registers: int
    shared: int
    spilled: int
    instructions: int
    problems: tuple[str, ...]


def modules() -> Iterator[ModuleType]:
    """Every module of the kernel package but this one."""
    for found in pkgutil.walk_packages(
        deaddir_fast.kernels.__path__, deaddir_fast.kernels.__name__ + "."
    ):
        if found.name != __spec__.name:
            yield importlib.import_module(found.name)


def manifest() -> list[Case]:
    """Every case of every kernel file."""
    return [case for module in modules() if hasattr(module, "aot") for case in module.aot()]


def unlisted() -> list[str]:
    """Name the jit functions that no case compiles."""
    from triton.runtime.jit import JITFunction

    listed = {id(f) for case in manifest() for f in (case.kernel, *case.helpers)}
    return sorted(
        {
            f"{module.__name__}.{name}"
            for module in modules()
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and id(value) not in listed
        }
    )


def compile_case(case: Case, target: Target) -> Outcome:
    """Compile one case for one target and inspect the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, signature, dict(case.constants), aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    options["enable_fp_fusion"] = case.fusion
    try:
        compiled = triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.lanes), options=options
        )
    except Exception as error:  # whatever the compiler raises is the finding
        text = " ".join(str(error).split())[:200]
        return Outcome(case, target, 0, 0, 0, 0, (f"{type(error).__name__}: {text}",))
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spilled = _cubin_resources(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _sum(r"\.vgpr_count:\s+(\d+)", text)
        spilled = _sum(r"\.[vs]gpr_spill_count:\s+(\d+)", text)
    unit = target.units[case.unit]
    instructions = len(re.findall(unit.required, text))
    wrong = re.search(unit.forbidden, text)
    shared = compiled.metadata.shared
    problems = []
    if spilled:
        problems.append("spills registers")
    if case.shared_bound and shared > case.shared_bound + _BARRIERS:
        problems.append(f"needs more shared memory than the {case.shared_bound} bytes promised")
    if shared > target.shared_limit:
        problems.append(f"needs more than {target.shared_limit} bytes of shared memory")
    if not instructions:
        problems.append(f"has no {unit.required}")
    if wrong is not None:
        problems.append(f"multiplies {case.unit} by {wrong.group()}")
    return Outcome(case, target, registers, shared, spilled, instructions, tuple(problems))


#: Bytes of shared memory that the compiler adds for its own bookkeeping.
_BARRIERS = 1024


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory (stack or spills) a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {done.stdout}{done.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _sum(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the outcomes as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Triton kernels, compiled ahead of time")
    for column in ("case", "target"):
        table.add_column(column, no_wrap=True)
    for column in ("registers", "shared B", "spilled", "matrix instr."):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for o in outcomes:
        verdict = f"[red]{'; '.join(o.problems)}[/red]" if o.problems else "[green]ok[/green]"
        numbers = (str(x) for x in (o.registers, o.shared, o.spilled, o.instructions))
        table.add_row(o.case.name, o.target.name, *numbers, verdict)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def main() -> int:
    """Compile everything, print the table, return the exit status."""
    if deaddir_fast.kernels.interpreted():
        print("unset TRITON_INTERPRET: the interpreter does not compile", file=sys.stderr)
        return 2
    outcomes = [compile_case(case, target) for case in manifest() for target in TARGETS]
    show(outcomes)
    missing = unlisted()
    for name in missing:
        print(f"{name}: in no manifest", file=sys.stderr)
    return int(bool(missing) or any(o.problems for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())

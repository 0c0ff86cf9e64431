"""Every Triton kernel against fp64 on the device: shapes, types, strides, repeats, opcheck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import accuracy
from bench.cases import NAMES
from bench.problems import Problem
from bench.problems._problem import Draw, Sizes, in_fp64
from deaddir_fast._backend import backend
from deaddir_fast.ops._dispatch import OPS


def has_kernel(problem: Problem) -> bool:
    """Whether the operation has a Triton kernel."""
    return any(kernel.route == "triton" for kernel in OPS[problem.op].kernels)


def refused(error: BaseException) -> bool:
    """Whether the launcher declined the arguments, as it may, rather than failed on them."""
    return isinstance(error, RuntimeError) and "is forced, but" in str(error)


def message(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def checks(problem: Problem, device: str, *, tiny: bool) -> list[Callable[[], dict[str, Any]]]:
    """List the checks of a problem; each, called, gives a record with its verdict.

    The most telling come first: each shape and type may have to be compiled.
    """
    return [partial(_checked, problem, *each, device) for each in _planned(problem, tiny)]


def _planned(problem: Problem, tiny: bool) -> Iterator[tuple[str, Sizes, torch.dtype]]:
    first, *others, largest = problem.small
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)[: 3 if tiny else 4]
    if not tiny:
        for dtype in dtypes[:2]:
            yield "values", largest, dtype
    for dtype in dtypes:
        yield "values", first, dtype
    if not problem.contiguous:
        yield "strided inputs", first, torch.float32
    yield "opcheck", first, torch.float32
    for dtype in dtypes:
        for size in others:
            yield "values", size, dtype
    if not tiny:
        for dtype in dtypes[2:]:
            yield "values", largest, dtype


def _checked(
    problem: Problem, what: str, sizes: Sizes, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "problem": problem.name,
        "op": problem.op,
        "what": what,
        "shape": dict(sizes),
        "dtype": NAMES[dtype],
        "verdict": "ok",
    }
    try:
        args = problem.build(sizes, Draw(dtype, device))
        if what == "opcheck":
            operator = getattr(torch.ops.deaddir, problem.op).default
            with backend("triton"):
                torch.library.opcheck(operator, problem.registered(*args))
        else:
            if what == "strided inputs":
                args = tuple(_transposed_in_memory(x) for x in args)
            _values(problem, args, dtype, record)
    except Exception as error:  # whatever it raises is the finding
        record["verdict"] = "refused" if refused(error) else "red"
        record["message"] = message(error)
    return record


def _transposed_in_memory(x: Any) -> Any:
    """The same values with the last two dimensions swapped in memory."""
    return x.mT.contiguous().mT if isinstance(x, Tensor) and x.ndim > 1 else x


def _values(
    problem: Problem, args: tuple[Any, ...], dtype: torch.dtype, record: dict[str, Any]
) -> None:
    kept = [x.clone() if isinstance(x, Tensor) else x for x in args]
    with backend("triton"):
        result, again = problem.result(problem.ours, args), problem.result(problem.ours, args)
    truth = problem.result(problem.truth, in_fp64(args))
    record["error"] = accuracy.error(result, truth, by_element=problem.by_element)
    problems = []
    limit = accuracy.limit(dtype, ours=True, stored=problem.written is not None)
    if record["error"] > limit:
        problems.append(f"error {record['error']:.1e} above {limit:.0e}")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    if result.dtype != expected:
        problems.append(f"result in {result.dtype}")
    if not torch.equal(result, again):
        problems.append("two runs differ")
    pairs = ((x, y) for x, y in zip(args, kept, strict=True) if isinstance(x, Tensor))
    if not all(torch.equal(x, y) for x, y in pairs):
        problems.append("an input was written")
    if problems:
        record["verdict"], record["message"] = "red", "; ".join(problems)

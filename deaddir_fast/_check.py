"""Argument checks whose messages name the argument, what was given and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """Say briefly what ``value`` is, for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def fail(argument: str, given: Any, expected: str, kind: type[Exception] = ValueError) -> Exception:
    """Build (not raise) the error for a bad argument."""
    return kind(f"{argument}: expected {expected}, got {describe(given)}")


def tensor(
    argument: str,
    value: Any,
    *,
    ndim: int | Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
) -> Tensor:
    """Check that ``value`` is a tensor of one of ``dtypes`` with one of the allowed ranks."""
    if not isinstance(value, Tensor):
        raise fail(argument, value, f"a tensor ({_names(dtypes)})", TypeError)
    if value.dtype not in dtypes:
        raise fail(argument, value, f"dtype {_names(dtypes)}", TypeError)
    if value.layout != torch.strided:
        raise fail(argument, value, "a dense (strided) tensor", TypeError)
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        if value.ndim not in allowed:
            ranks = " or ".join(str(r) for r in allowed)
            raise fail(argument, value, f"{ranks} dimensions")
    return value


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def size(argument: str, value: Tensor, dim: int, expected: int, why: str) -> None:
    """Check one extent of a tensor; ``why`` says what it has to agree with."""
    if value.shape[dim] != expected:
        raise fail(argument, value, f"size {expected} in dimension {dim} ({why})")


def positive(argument: str, value: Any, *, allow_zero: bool = False) -> float:
    """Check a finite positive (or non-negative) real number."""
    if isinstance(value, (str, bool)):
        raise fail(argument, value, "a real number", TypeError)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise fail(argument, value, "a real number", TypeError) from None
    if not (number >= 0 if allow_zero else number > 0) or number == float("inf"):
        raise fail(argument, value, "a finite number " + (">= 0" if allow_zero else "> 0"))
    return number


def real(argument: str, value: Any) -> float:
    """Check a finite real number of either sign."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise fail(argument, value, "a real number", TypeError) from None
    if not (-float("inf") < number < float("inf")):
        raise fail(argument, value, "a finite number")
    return number


def same_device(**tensors: Tensor | None) -> None:
    """Check that all given tensors live on the device of the first one."""
    first: tuple[str, torch.device] | None = None
    for argument, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first = (argument, value.device)
        elif value.device != first[1]:
            raise fail(argument, value, f"a tensor on {first[1]}, where {first[0]} is")


def no_gradient(**tensors: Tensor | None) -> None:
    """Refuse tensors that require grad where no gradient is defined."""
    if not torch.is_grad_enabled():
        return
    for argument, value in tensors.items():
        if value is not None and value.requires_grad:
            raise RuntimeError(
                f"{argument}: requires grad, but this operation defines no gradient; "
                f"pass {argument}.detach() or call it under torch.no_grad()"
            )


def choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """Check that a string is one of a few."""
    if value not in allowed:
        raise fail(argument, value, "one of " + ", ".join(repr(a) for a in allowed))
    return value


def integer(argument: str, value: Any, minimum: int | None = None) -> int:
    """Check a whole number (bool and float are refused), optionally with a lower bound."""
    expected = "an integer" if minimum is None else f"an integer >= {minimum}"
    if isinstance(value, bool):
        raise fail(argument, value, expected, TypeError)
    try:
        number = operator.index(value)
    except TypeError:
        raise fail(argument, value, expected, TypeError) from None
    if minimum is not None and number < minimum:
        raise fail(argument, value, expected)
    return number

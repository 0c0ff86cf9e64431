"""Make Triton's interpreter compute what the hardware computes.

As shipped, the interpreter multiplies bfloat16 operands as bit patterns, truncates where it
should round to nearest even, and takes every ``input_precision`` of a dot for exact float32. The
first two make right kernels look wrong, the last makes imprecise ones look right. ``install``
replaces the two functions at fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns (uint16)."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16 bit patterns (uint16), to nearest even."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to a 10-bit mantissa, to nearest, ties away from zero (cvt.rna.tf32)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _split(x: np.ndarray, pieces: int, rounding: Any) -> list[np.ndarray]:
    out = []
    for _ in range(pieces):
        head = rounding(x)
        out.append(head)
        with np.errstate(invalid="ignore"):  # inf - inf: an infinity has no remainder
            x = np.where(np.isfinite(x), x - head, np.float32(0))
    return out


def _round_bf16(x: np.ndarray) -> np.ndarray:
    return bf16_to_f32(f32_to_bf16(x))


def dot_f32(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """``a @ b`` of float32 operands in one of Triton's input precisions, float32 sums."""
    if precision == "TF32":
        return to_tf32(a) @ to_tf32(b)
    if precision not in ("TF32x3", "BF16x3", "BF16x6"):
        return a @ b
    pieces = 3 if precision == "BF16x6" else 2
    rounding = to_tf32 if precision == "TF32x3" else _round_bf16
    left, right = _split(a, pieces, rounding), _split(b, pieces, rounding)
    # products of pieces i and j with i + j below the number of pieces, smallest first
    pairs = sorted(
        ((i, j) for i in range(pieces) for j in range(pieces) if i + j < pieces),
        key=lambda pair: -sum(pair),
    )
    total = left[pairs[0][0]] @ right[pairs[0][1]]
    for i, j in pairs[1:]:
        total = total + left[i] @ right[j]
    return total


def install() -> None:
    """Patch ``triton.runtime.interpreter``; harmless if called twice."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_fidelity_installed", False):
        return
    original_dot = interpreter.InterpreterBuilder.create_dot
    original_convert = interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(bf16_to_f32(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        low = a.dtype.scalar == tl.bfloat16 or b.dtype.scalar == tl.bfloat16
        a, b = widened(a), widened(b)
        if low or a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return original_dot(self, a, b, d, precision, imprecise)
        product = dot_f32(a.data, b.data, precision.name)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def to_zero(rounding: Any) -> bool:
        return getattr(rounding, "name", "") == "RTZ"

    def convert(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source.scalar == tl.float32 and target.scalar == tl.bfloat16 and not to_zero(rounding):
            return f32_to_bf16(x)
        if source.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return bf16_to_f32(x)
        return original_convert(x, source, target, rounding)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert
    # the hardware has these; the interpreter's list leaves them out
    allowed = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        allowed_dot_input_precisions=allowed
    )
    interpreter._fidelity_installed = True

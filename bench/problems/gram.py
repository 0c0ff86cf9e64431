"""Gram matrices: full, packed, and as a running average in place."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.problems._problem import Draw, Form, Problem, Sizes, wide
from deaddir_fast import ops


def _build(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    return (draw.normal(s["n"], s["i"]),)


def _triangle(s: Sizes) -> float:
    return s["n"] * s["i"] * (s["i"] + 1)


SMALL: tuple[Sizes, ...] = (
    {"n": 33, "i": 37},
    {"n": 1, "i": 1},
    {"n": 0, "i": 5},
    {"n": 1000, "i": 384},
)

# ------------------------------------------------------------------------------------------ full


def _own_dtype(x: Tensor) -> Tensor:
    return x.mT @ x


def _widened(x: Tensor) -> Tensor:
    y = wide(x)
    return y.mT @ y


def _copied(x: Tensor) -> Tensor:
    y = wide(x)
    return y.mT.contiguous() @ y


def _wide_result(x: Tensor) -> Tensor:
    if x.dtype.itemsize > 2 or not x.is_cuda:
        raise NotImplementedError("a wide result of 16-bit operands is for CUDA")
    return torch.mm(x.mT, x, out_dtype=torch.float32)


FORMS = (
    Form("x.T @ x", "what everyone writes; in the type of x, result included", _own_dtype),
    Form("x.float().T @ x.float()", "the same with fp32 products and sums", _widened),
    Form("x.T.contiguous() @ x", "both operands row-major, which some BLAS prefer", _copied),
    Form("mm(x.T, x, out_dtype=fp32)", "16-bit operands, fp32 result", _wide_result),
)

# ---------------------------------------------------------------------------------------- packed


@cache
def _index(i: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.tril_indices(i, i, device=device)
    return row, column


@cache
def _flat_index(i: int, device: torch.device) -> Tensor:
    row, column = _index(i, device)
    return row * i + column


def _gathered(x: Tensor) -> Tensor:
    return _widened(x)[_index(x.shape[1], x.device)]


def _taken(x: Tensor) -> Tensor:
    return _own_dtype(x).take(_flat_index(x.shape[1], x.device))


PACKED_FORMS = (
    Form("(x.T @ x)[tril_indices]", "the product in fp32, then the triangle", _gathered),
    Form("(x.T @ x).take(index)", "in the type of x; a flat index is quicker to read", _taken),
)


def _packed_truth(x: Tensor) -> Tensor:
    return (x.mT @ x)[_index(x.shape[1], x.device)]


# --------------------------------------------------------------------------------------- running

ALPHA, BETA = 0.25, 0.75  # exact in binary


def _build_update(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    x = draw.normal(s["n"], s["i"])
    out = draw.factor(s["i"]).to(torch.float64 if draw.dtype == torch.float64 else torch.float32)
    return x, draw.normal(s["n"]).abs(), out


def _update(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return ops.gram(x, weight=weight, out=out.clone(), alpha=ALPHA, beta=BETA)


def _addmm(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    y = wide(x)
    return torch.addmm(out, (y * wide(weight)[:, None]).mT, y, alpha=ALPHA, beta=BETA)


PROBLEMS = (
    Problem(
        name="gram",
        op="gram",
        build=_build,
        ours=ops.gram,
        truth=_own_dtype,
        flops=_triangle,
        small=SMALL,
        by_element=False,
        forms=FORMS,
        registered=lambda x: (x, None, 0.5),
    ),
    Problem(
        name="gram_packed",
        op="gram_packed",
        build=_build,
        ours=ops.gram_packed,
        truth=_packed_truth,
        flops=_triangle,
        small=SMALL,
        by_element=False,
        forms=PACKED_FORMS,
        registered=lambda x: (x, None, 0.5),
    ),
    Problem(
        name="gram_update",
        op="gram_",
        build=_build_update,
        ours=_update,
        truth=_addmm,
        flops=_triangle,
        small=SMALL,
        by_element=False,
        forms=(Form("addmm(out, x.T * w, x)", "one product, added in place", _addmm),),
        registered=lambda x, weight, out: (out.clone(), x, weight, 0.5, 0.9),
    ),
)

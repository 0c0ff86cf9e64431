"""Kronecker factors: products, quadratic forms, damped systems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.problems._problem import Draw, Form, Problem, Sizes, wide
from deaddir_fast import ops

SMALL: tuple[Sizes, ...] = (
    {"p": 3, "o": 17, "i": 29},
    {"p": 1, "o": 1, "i": 1},
    {"p": 0, "o": 3, "i": 4},
    {"p": 2, "o": 128, "i": 200},
)


def _build(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    U = draw.normal(s["p"], s["o"], s["i"])
    return draw.factor(s["i"]), draw.factor(s["o"]), U


def _products(s: Sizes) -> float:
    return 2 * s["p"] * s["o"] * s["i"] * (s["o"] + s["i"])


def _half_products(s: Sizes) -> float:
    """What the quadratic form needs by Cholesky factors, whose zeros halve the products.

    The factorisations are not counted: they are done once for all directions.
    """
    return _products(s) / 2


def _from_the_right(U: Tensor, A: Tensor) -> Tensor:
    """U A for all directions in one product."""
    p, o, i = U.shape
    return (U.reshape(p * o, i) @ A).view(p, o, i)


def _from_the_left(G: Tensor, U: Tensor) -> Tensor:
    """G U, with the directions side by side: one product of a (o, p i) matrix."""
    p, o, i = U.shape
    return (G @ U.transpose(0, 1).reshape(o, p * i)).view(o, p, i).transpose(0, 1)


# ---------------------------------------------------------------------------------------- matvec


def _matvec(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return G @ U @ A


def _matvec_stacked(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return _from_the_left(G, _from_the_right(U, A)).contiguous()


def _matvec_mixed(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return G @ _from_the_right(U, A)


def _matvec_einsum(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return torch.einsum("oj,pji,ik->pok", G, U, A)


MATVEC_FORMS = (
    Form("G @ U @ A", "what everyone writes", _matvec),
    Form("G @ (stacked U @ A)", "all directions in one product on the right", _matvec_mixed),
    Form("stacked products", "one product on each side, with copies between", _matvec_stacked),
    Form("einsum oj,pji,ik->pok", "the index form", _matvec_einsum),
)

# ------------------------------------------------------------------------------------- quadratic


def _two_products(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return (wide(G @ U) * wide(U @ A)).sum((1, 2))


def _two_stacked(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return (wide(_from_the_left(G, U)) * wide(_from_the_right(U, A))).sum((1, 2))


def _one_product_then_dot(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    p = U.shape[0]
    mapped = G @ _from_the_right(U, A)
    return torch.linalg.vecdot(wide(mapped).reshape(p, -1), wide(U).reshape(p, -1))


def _trace_einsum(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return wide(torch.einsum("poi,oj,pjk,ki->p", U, G, U, A))


def _cholesky(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    right = torch.linalg.cholesky(wide(A)).to(U.dtype)
    left = torch.linalg.cholesky(wide(G)).to(U.dtype)
    return wide(left.mT @ _from_the_right(U, right)).square().sum((1, 2))


QUADRATIC_FORMS = (
    Form("((G @ U) * (U @ A)).sum()", "two products, no third", _two_products),
    Form("the same, stacked", "each product as one large matrix product", _two_stacked),
    Form("dot(U, G @ (U @ A))", "the product, then a dot with U", _one_product_then_dot),
    Form("einsum poi,oj,pjk,ki->p", "the trace as an index form", _trace_einsum),
    Form("|L_G^T U L_A|^2, Cholesky", "a sum of squares: cannot be negative", _cholesky),
)


def _quadratic_truth(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    values = [((G @ u) * (u @ A)).sum() for u in U]
    return torch.stack(values) if values else U.new_zeros(0)


# -------------------------------------------------------------------------------------- rank one


def _build_rank1(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    v, w = draw.normal(s["p"], s["o"]), draw.normal(s["p"], s["i"])
    return draw.factor(s["i"]), draw.factor(s["o"]), v, w


def _rank1(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    left = (wide(v @ G) * wide(v)).sum(1)
    return left * (wide(w @ A) * wide(w)).sum(1)


def _rank1_einsum(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return wide(torch.einsum("po,oj,pj->p", v, G, v)) * wide(torch.einsum("pi,ij,pj->p", w, A, w))


RANK1_FORMS = (
    Form("((v @ G) * v).sum(1) ...", "a thin product and a dot for each factor", _rank1),
    Form("einsum po,oj,pj->p ...", "the index form of each factor", _rank1_einsum),
)

# ----------------------------------------------------------------------------------------- solve

DAMPING = 0.0625  # exact in binary


def _solve(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return ops.kron_solve(A, G, U, DAMPING)


def _eigh(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    m, P = torch.linalg.eigh(wide(A))
    l, Q = torch.linalg.eigh(wide(G))
    rotated = (Q.mT @ wide(U) @ P) / (l[:, None] * m + DAMPING)
    return Q @ rotated @ P.mT


def _eigh_fp64(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return _eigh(A.double(), G.double(), U.double()).to(wide(U).dtype)


SOLVE_FORMS = (
    Form("eigh, rotate, divide", "the textbook, in the type of the inputs", _eigh),
    Form("eigh in fp64", "the textbook at the precision that we use", _eigh_fp64),
)


def _solve_truth(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Solve with the assembled matrix where it is small, else in the eigenbasis."""
    p, o, i = U.shape
    if o * i > 4096:
        return _eigh(A, G, U)
    matrix = torch.kron(G, A) + DAMPING * torch.eye(o * i, dtype=A.dtype, device=A.device)
    return torch.linalg.solve(matrix, U.reshape(p, o * i).mT).mT.reshape(p, o, i)


def _solve_flops(s: Sizes) -> float:
    return 9 * (s["o"] ** 3 + s["i"] ** 3) + 2 * _products(s)


PROBLEMS = (
    Problem(
        name="kron_matvec",
        op="kron_matvec",
        build=_build,
        ours=ops.kron_matvec,
        truth=_matvec,
        flops=_products,
        small=SMALL,
        by_element=False,
        forms=MATVEC_FORMS,
    ),
    Problem(
        name="kron_quadratic",
        op="kron_quadratic",
        build=_build,
        ours=ops.kron_quadratic,
        truth=_quadratic_truth,
        flops=_half_products,
        small=SMALL,
        by_element=True,
        forms=QUADRATIC_FORMS,
    ),
    Problem(
        name="kron_quadratic_rank1",
        op="kron_quadratic_rank1",
        build=_build_rank1,
        ours=ops.kron_quadratic_rank1,
        truth=_rank1,
        flops=lambda s: 2 * s["p"] * (s["o"] ** 2 + s["i"] ** 2),
        small=SMALL,
        by_element=True,
        forms=RANK1_FORMS,
    ),
    Problem(
        name="kron_solve",
        op="kron_solve",
        build=_build,
        ours=_solve,
        truth=_solve_truth,
        flops=_solve_flops,
        small=SMALL,
        by_element=False,
        forms=SOLVE_FORMS,
        registered=lambda A, G, U: (A, G, U, DAMPING),
    ),
)

"""Scores of the samples of a layer and their mean squares, along full-rank and rank-one directions.

The formulations give scores (n, p); an operation wants them by direction, or their mean squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.problems._problem import Draw, Form, Problem, Sizes, chunks, wide
from deaddir_fast import ops


def _samples(s: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    rows = (s["n"], s["t"]) if "t" in s else (s["n"],)
    return draw.normal(*rows, s["i"]), draw.normal(*rows, s["o"])


def _mean_square(scores: Tensor) -> Tensor:
    """Scores (n, p) to curvatures (p,)."""
    return wide(scores).square().mean(0)


def _by_direction(scores: Tensor) -> Tensor:
    """Scores (n, p) to (p, n)."""
    return wide(scores).mT


# ------------------------------------------------------------------------------------- full rank


def _build(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    a, g = _samples(s, draw)
    return a, g, draw.normal(s["p"], s["o"], s["i"], scale=s["i"] ** -0.5)


def _flops(s: Sizes) -> float:
    n, t, p, cells = s["n"], s.get("t", 1), s["p"], s["o"] * s["i"]
    return min(2 * n * t * p * cells, 2 * n * cells * (t + p))


def _one_matmul(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    p, o, i = U.shape
    n = a.shape[0]
    mapped = (a.reshape(-1, i) @ U.reshape(p * o, i).mT).view(-1, p, o)
    scores = (mapped * g.reshape(-1, 1, o)).sum(-1, dtype=wide(g).dtype)
    return scores.view(n, -1, p).sum(1)


def _matmul_then_bmm(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    p, o, i = U.shape
    mapped = (a @ U.reshape(p * o, i).mT).view(-1, p, o)
    return torch.bmm(mapped, g[:, :, None])[..., 0]


def _bmm(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    mapped = torch.bmm(a.expand(U.shape[0], *a.shape), U.mT)
    return (mapped * g).sum(-1, dtype=wide(g).dtype).mT


def _loop(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    scores = []
    for u in U:
        product = (a @ u.mT) * g
        scores.append(product.flatten(1).sum(1, dtype=wide(g).dtype))
    return torch.stack(scores, 1)


def _einsum(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    return torch.einsum("no,poi,ni->np", g, U, a)


def _outer(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    directions = U.flatten(1).mT
    scores = [
        (g[some, :, None] * a[some, None, :]).flatten(1) @ directions
        for some in chunks(a.shape[0], 64)
    ]
    return torch.cat(scores)


FORMS = (
    Form("a @ U.T stacked, dot with g", "one large product, rows dotted after", _one_matmul),
    Form("a @ U.T stacked, bmm with g", "the same, the dot as a product", _matmul_then_bmm),
    Form("einsum no,poi,ni->np", "the index form", _einsum),
    Form("loop over directions", "no large intermediate: it stays in the cache", _loop),
    Form("bmm over directions", "a batch of products", _bmm),
    Form("outer products @ U", "gradients of 64 samples at a time, one product each", _outer),
)


def _tokens_first(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    gradient = torch.einsum("nto,nti->noi", g, a)
    return gradient.flatten(1) @ U.flatten(1).mT


def _tokens_first_in_chunks(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    directions = U.flatten(1).mT
    scores = [
        torch.bmm(g[some].mT, a[some]).flatten(1) @ directions for some in chunks(a.shape[0], 4)
    ]
    return torch.cat(scores)


def _token_einsum(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    return torch.einsum("nto,poi,nti->np", g, U, a)


TOKEN_FORMS = (
    Form("einsum nto,nti->noi, then @ U", "contract tokens first: least work", _tokens_first),
    Form("the same, 4 samples each time", "gradients stay in the cache", _tokens_first_in_chunks),
    Form("a @ U.T stacked, dot with g", "one large product, rows dotted after", _one_matmul),
    Form("einsum nto,poi,nti->np", "the index form", _token_einsum),
    Form("loop over directions", "no large intermediate", _loop),
)


def _truth(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Direction by direction, or with tokens from the gradient of each sample."""
    if a.ndim == 2:
        scores = [((a @ u.mT) * g).sum(1) for u in U]
        return torch.stack(scores, 1) if scores else a.new_zeros(a.shape[0], 0)
    directions = U.flatten(1).mT
    step = 2**28 // max(1, U[0].numel() if len(U) else 1)
    scores = [
        torch.einsum("nto,nti->noi", g[some], a[some]).flatten(1) @ directions
        for some in chunks(a.shape[0], step)
    ]
    return torch.cat(scores)


# -------------------------------------------------------------------------------------- rank one


def _build_rank1(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    a, g = _samples(s, draw)
    v = draw.normal(s["p"], s["o"], scale=s["o"] ** -0.5)
    return a, g, v, draw.normal(s["p"], s["i"], scale=s["i"] ** -0.5)


def _over_tokens(score: Tensor) -> Tensor:
    return score.sum(1) if score.ndim == 3 else score


def _two_matmuls(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return _over_tokens(wide(g @ v.mT) * wide(a @ w.mT))


def _transposed(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    n, p = a.shape[0], v.shape[0]
    left, right = v @ g.reshape(-1, g.shape[-1]).mT, w @ a.reshape(-1, a.shape[-1]).mT
    return (wide(left) * wide(right)).view(p, n, -1).sum(-1).mT


def _bmm_over_tokens(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    left, right = g @ v.mT, a @ w.mT
    return torch.einsum("ntp,ntp->np", left, right)


RANK1_FORMS = (
    Form("(g @ v.T) * (a @ w.T)", "what everyone writes", _two_matmuls),
    Form("(v @ g.T) * (w @ a.T)", "the same transposed, which some BLAS prefer", _transposed),
)
RANK1_TOKEN_FORMS = (
    *RANK1_FORMS,
    Form("einsum ntp,ntp->np", "the sum over tokens as a contraction", _bmm_over_tokens),
)


def _rank1_truth(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    a, g = (x[:, None] if x.ndim == 2 else x for x in (a, g))
    return ((g @ v.mT) * (a @ w.mT)).sum(1)


def _rank1_flops(s: Sizes) -> float:
    return 2 * s["n"] * s.get("t", 1) * s["p"] * (s["i"] + s["o"])


SMALL: tuple[Sizes, ...] = (
    {"n": 13, "i": 29, "o": 17, "p": 3},
    {"n": 1, "i": 1, "o": 1, "p": 1},
    {"n": 5, "i": 3, "o": 2, "p": 0},
    {"n": 300, "i": 200, "o": 130, "p": 20},
)
SMALL_TOKENS: tuple[Sizes, ...] = (
    {"n": 5, "t": 7, "i": 29, "o": 17, "p": 3},
    {"n": 1, "t": 1, "i": 1, "o": 1, "p": 1},
    {"n": 5, "t": 0, "i": 3, "o": 2, "p": 4},
    {"n": 9, "t": 65, "i": 200, "o": 130, "p": 20},
)


def _pair(
    op: str,
    finish: Callable[[Tensor], Tensor],
    build: Callable[[Sizes, Draw], tuple[Any, ...]],
    truth: Callable[..., Tensor],
    flops: Callable[[Sizes], float],
    forms: tuple[Form, ...],
    token_forms: tuple[Form, ...],
) -> tuple[Problem, Problem]:
    """An operation without and with a token dimension; ``finish`` makes its result of scores."""

    def finished(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: finish(scores(*args))

    def problem(name: str, small: tuple[Sizes, ...], forms: tuple[Form, ...]) -> Problem:
        return Problem(
            name,
            op,
            build,
            getattr(ops, op),
            finished(truth),
            flops,
            small,
            finish is _mean_square,
            tuple(replace(form, run=finished(form.run)) for form in forms),
        )

    return problem(op, SMALL, forms), problem(f"{op}_tokens", SMALL_TOKENS, token_forms)


_FULL = (_build, _truth, _flops, FORMS, TOKEN_FORMS)
_RANK1 = (_build_rank1, _rank1_truth, _rank1_flops, RANK1_FORMS, RANK1_TOKEN_FORMS)

PROBLEMS = (
    *_pair("directional_curvature", _mean_square, *_FULL),
    *_pair("directional_curvature_rank1", _mean_square, *_RANK1),
    *_pair("directional_scores", _by_direction, *_FULL),
    *_pair("directional_scores_rank1", _by_direction, *_RANK1),
)

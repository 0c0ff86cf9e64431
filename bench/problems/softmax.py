"""Categorical outputs: variance of tangents, divergence, and the variance without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.problems._problem import Draw, Form, Problem, Sizes, chunks, wide
from deaddir_fast import ops

# ---------------------------------------------------------------------------------------- fisher


def _build_fisher(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    return draw.normal(s["n"], s["c"]), draw.normal(s["p"], s["n"], s["c"])


def _moments(logits: Tensor, tangent: Tensor) -> Tensor:
    probability, t = torch.softmax(wide(logits), -1), wide(tangent)
    mean = (probability * t).sum(-1)
    return (probability * t.square()).sum(-1) - mean.square()


def _centred(logits: Tensor, tangent: Tensor) -> Tensor:
    probability, t = torch.softmax(wide(logits), -1), wide(tangent)
    mean = (probability * t).sum(-1, keepdim=True)
    return (probability * (t - mean).square()).sum(-1)


def _einsum_moments(logits: Tensor, tangent: Tensor) -> Tensor:
    probability, t = torch.softmax(wide(logits), -1), wide(tangent)
    mean = torch.einsum("nc,pnc->pn", probability, t)
    return torch.einsum("nc,pnc->pn", probability, t.square()) - mean.square()


def _baddbmm_moments(logits: Tensor, tangent: Tensor) -> Tensor:
    column = torch.softmax(wide(logits), -1)[:, :, None]  # (n, c, 1)
    t = wide(tangent).transpose(0, 1)  # (n, p, c)
    mean = torch.bmm(t, column)
    return torch.baddbmm(mean.square(), t.square(), column, beta=-1)[..., 0].mT


def _loop_centred(logits: Tensor, tangent: Tensor) -> Tensor:
    probability = torch.softmax(wide(logits), -1)
    rows = []
    for t in tangent:
        x = wide(t) - torch.linalg.vecdot(probability, wide(t))[:, None]
        rows.append(torch.linalg.vecdot(probability, x.square()))
    return torch.stack(rows)


FISHER_FORMS = (
    Form("E[t²] − E[t]²", "the textbook; loses digits where the mean is large", _moments),
    Form("E[(t − E t)²]", "two passes: no cancellation", _centred),
    Form("einsum nc,pnc->pn", "the moments as contractions", _einsum_moments),
    Form("baddbmm", "the moments as batched products", _baddbmm_moments),
    Form("loop, E[(t − E t)²]", "a smaller working set", _loop_centred),
)


def _fisher_truth(logits: Tensor, tangent: Tensor) -> Tensor:
    """Centred, a few samples at a time."""
    p, n, c = tangent.shape
    parts = [_centred(logits[s], tangent[:, s]) for s in chunks(n, 2**27 // max(1, p * c))]
    return torch.cat(parts, 1) if parts else tangent.new_zeros(p, 0)


# -------------------------------------------------------------------------------------------- KL


def _build_kl(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    logits = draw.normal(s["n"], s["c"])
    step = draw.normal(s["q"], s["n"], s["c"], scale=0.5)
    return logits, (wide(logits) + wide(step)).to(draw.dtype)


def _log_target(logits: Tensor, logits_t: Tensor) -> Tensor:
    z, moved = F.log_softmax(wide(logits), -1), F.log_softmax(wide(logits_t), -1)
    return F.kl_div(moved, z.expand_as(moved), log_target=True, reduction="none").sum(-1)


def _probability_target(logits: Tensor, logits_t: Tensor) -> Tensor:
    probability, moved = torch.softmax(wide(logits), -1), F.log_softmax(wide(logits_t), -1)
    return F.kl_div(moved, probability.expand_as(moved), reduction="none").sum(-1)


def _log_ratio(logits: Tensor, logits_t: Tensor) -> Tensor:
    z, moved = F.log_softmax(wide(logits), -1), F.log_softmax(wide(logits_t), -1)
    return (z.exp() * (z - moved)).sum(-1)


def _normalisers(logits: Tensor, logits_t: Tensor) -> Tensor:
    z, moved = wide(logits), wide(logits_t)
    shift = torch.linalg.vecdot(torch.softmax(z, -1), z - moved)
    return shift + torch.logsumexp(moved, -1) - torch.logsumexp(z, -1)


KL_FORMS = (
    Form("kl_div(log_target=True)", "the library function on log-probabilities", _log_target),
    Form("kl_div of softmax", "the library function on probabilities", _probability_target),
    Form("Σ p (log p − log q)", "the definition", _log_ratio),
    Form("Σ p (z − z_t) + Δ logsumexp", "no second log_softmax", _normalisers),
)


def _kl_truth(logits: Tensor, logits_t: Tensor) -> Tensor:
    """log E[e^x] with x the centred change: no difference of nearly equal numbers."""
    q, n, c = logits_t.shape
    parts = []
    for some in chunks(n, 2**27 // max(1, q * c)):
        probability = torch.softmax(logits[some], -1)
        change = logits_t[:, some] - logits[some]
        x = change - (probability * change).sum(-1, keepdim=True)
        parts.append((probability * (torch.expm1(x) - x)).sum(-1).log1p())
    return torch.cat(parts, 1) if parts else logits_t.new_zeros(q, 0)


# ------------------------------------------------------------------------------- linear read-out


def _build_linear(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    h, dh = draw.normal(s["n"], s["d"]), draw.normal(s["p"], s["n"], s["d"])
    return h, dh, draw.normal(s["c"], s["d"], scale=s["d"] ** -0.5), None, None


def _build_linear_moved(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    h, dh, W, _, _ = _build_linear(s, draw)
    return h, dh, W, draw.normal(s["c"]), draw.normal(s["p"], *W.shape, scale=s["d"] ** -0.5)


def _linear(h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None) -> Tensor:
    return ops.linear_softmax_fisher(h, dh, W, bias=bias, dW=dW)


def _maps(
    h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits, tangent = F.linear(h, W, bias), dh @ W.mT
    return logits, tangent if dW is None else tangent + h @ dW.mT


def _linear_moments(h: Tensor, dh: Tensor, W: Tensor, *rest: Tensor | None) -> Tensor:
    return _moments(*_maps(h, dh, W, *rest))


def _linear_centred(h: Tensor, dh: Tensor, W: Tensor, *rest: Tensor | None) -> Tensor:
    return _centred(*_maps(h, dh, W, *rest))


def _linear_chunks(h: Tensor, dh: Tensor, W: Tensor, *rest: Tensor | None) -> Tensor:
    parts = [
        _centred(*_maps(h[some], dh[:, some], W, *rest))
        for some in chunks(h.shape[0], max(32, h.shape[0] // 8))
    ]
    return torch.cat(parts, 1)


LINEAR_FORMS = (
    Form("logits, E[(t − E t)²]", "the read-out, then two passes", _linear_centred),
    Form("logits, E[t²] − E[t]²", "the read-out, then the textbook", _linear_moments),
    Form(
        "the first, in chunks", "eight chunks of samples: an eighth of the memory", _linear_chunks
    ),
)


def _linear_truth(h: Tensor, dh: Tensor, W: Tensor, *rest: Tensor | None) -> Tensor:
    n, step = h.shape[0], 2**27 // (W.shape[0] * max(1, dh.shape[0]))
    parts = [_centred(*_maps(h[s], dh[:, s], W, *rest)) for s in chunks(n, step)]
    return torch.cat(parts, 1) if parts else dh.new_zeros(dh.shape[0], 0)


SMALL: tuple[Sizes, ...] = (
    {"n": 5, "c": 37, "p": 2},
    {"n": 1, "c": 1, "p": 1},
    {"n": 0, "c": 7, "p": 2},
    {"n": 65, "c": 5003, "p": 3},
)
SMALL_KL: tuple[Sizes, ...] = tuple({"n": s["n"], "c": s["c"], "q": s["p"]} for s in SMALL)
SMALL_LINEAR: tuple[Sizes, ...] = (
    {"n": 5, "d": 17, "c": 37, "p": 2},
    {"n": 1, "d": 1, "c": 2, "p": 1},
    {"n": 0, "d": 3, "c": 7, "p": 2},
    {"n": 65, "d": 130, "c": 2503, "p": 3},
)

PROBLEMS = (
    Problem(
        name="softmax_fisher",
        op="softmax_fisher",
        build=_build_fisher,
        ours=ops.softmax_fisher,
        truth=_fisher_truth,
        flops=lambda s: 6 * s["p"] * s["n"] * s["c"],
        small=SMALL,
        by_element=True,
        forms=FISHER_FORMS,
    ),
    Problem(
        name="softmax_kl",
        op="softmax_kl",
        build=_build_kl,
        ours=ops.softmax_kl,
        truth=_kl_truth,
        flops=lambda s: 40 * s["q"] * s["n"] * s["c"],
        small=SMALL_KL,
        by_element=True,
        forms=KL_FORMS,
    ),
    Problem(
        name="linear_softmax_fisher",
        op="linear_softmax_fisher",
        build=_build_linear,
        ours=_linear,
        truth=_linear_truth,
        flops=lambda s: 2 * s["n"] * s["c"] * s["d"] * (1 + s["p"]),
        small=SMALL_LINEAR,
        by_element=True,
        forms=LINEAR_FORMS,
    ),
    Problem(
        name="linear_softmax_fisher_moved",
        op="linear_softmax_fisher",
        build=_build_linear_moved,
        ours=_linear,
        truth=_linear_truth,
        flops=lambda s: 2 * s["n"] * s["c"] * s["d"] * (1 + 2 * s["p"]),
        small=SMALL_LINEAR,
        by_element=True,
        forms=LINEAR_FORMS,
    ),
)

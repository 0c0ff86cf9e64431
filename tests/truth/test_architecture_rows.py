"""Exact statements about primitives that the rates of networks rest on, each by computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dgejsv
from torch import nn


def _singular_values(rows):
    """Singular values with small relative errors (one-sided Jacobi), largest first."""
    sva, _, _, work, _, info = dgejsv(rows.numpy(), joba=0, jobu=3, jobv=3)
    assert info == 0
    return torch.from_numpy(sva * work[0] / work[1])


def _slope(values, t):
    return math.log(values[1] / values[0]) / math.log(t[1] / t[0])


@pytest.mark.parametrize("depth", [2, 4])
def test_bottom_of_the_kronecker_block(depth):
    """λ_min(A⊗G) of a linear chain: 2(l-1) from A, 2(L-l) from G, 2(L-1) in all."""
    torch.manual_seed(0)
    d, t = 5, (1e-3, 1e-2)
    x = torch.randn(200, d, dtype=torch.float64)
    live = [torch.randn(d - 1, d - 1, dtype=torch.float64) / d**0.5 for _ in range(depth)]
    bottoms = []
    for scale in t:
        weights = []
        for w in live:
            full = torch.zeros(d, d, dtype=torch.float64)
            full[1:, 1:], full[0, 0] = w, scale
            weights.append(full)
        forward, backward, a = [], [], x
        for w in weights:
            forward.append(_singular_values(a / len(a) ** 0.5)[-1] ** 2)
            a = a @ w.T
        g = torch.eye(d, dtype=torch.float64)
        for w in reversed(weights):
            backward.append(_singular_values(g)[-1] ** 2)
            g = g @ w
        bottoms.append((forward, backward[::-1]))
    for k in range(depth):
        a = _slope([float(b[0][k]) for b in bottoms], t)
        g = _slope([float(b[1][k]) for b in bottoms], t)
        assert a == pytest.approx(2 * k, abs=0.05)
        assert g == pytest.approx(2 * (depth - 1 - k), abs=0.05)
        assert a + g == pytest.approx(2 * (depth - 1), abs=0.1)


@pytest.mark.parametrize(("phi", "c"), [(F.gelu, 0.5), (F.silu, 0.5), (torch.tanh, 1.0)])
def test_moment_of_a_smooth_chain(phi, c):
    """E[a²] -> c^{2L} t^{2L} under N(0,1)."""
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean().sqrt()
    t, depth = 1e-4, 3
    a = x
    for _ in range(depth):
        a = phi(t * a)
    assert float(a.square().mean()) == pytest.approx((c * t) ** (2 * depth), rel=1e-3)


def test_moment_of_a_relu_chain_has_one_gate():
    """Half of the signal passes the first ReLU and all of that the others: t^{2L}/2."""
    x = torch.linspace(-4, 4, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    t, depth, a = 0.3, 4, x
    for _ in range(depth):
        a = (t * a).relu()
    moment = float(torch.trapezoid(a.square() * density, x)) / float(
        torch.trapezoid(x.square() * density, x)
    )
    assert moment == pytest.approx(t ** (2 * depth) / 2, rel=1e-9)


def test_swiglu_remainder():
    """t³x²σ(tx) = ½t³x² + R with |R| <= t⁴|x|³/4, inside the stated t⁴|x|³/2."""
    t = torch.logspace(-4, 0, 30, dtype=torch.float64)[:, None]
    x = torch.linspace(-50, 50, 401, dtype=torch.float64)
    value = t * (t * x) * F.silu(t * x)
    rest = (value - 0.5 * t**3 * x**2).abs()
    assert bool((rest <= 0.25 * t**4 * x.abs() ** 3 + 1e-18).all())


def test_cross_entropy_null_vector():
    """G of hidden layers under a dead class: (t^p, …, t^p, 1) is null, and its entry has a floor.

    With W = diag(1, …, 1, t) p times below the logits, G = D S D, D = diag(1, …, 1, t^p), and S
    has the null vector of ones; G_dd = t^{2p} E[π_d(1-π_d)].
    """
    torch.manual_seed(0)
    classes, p, t = 5, 2, 0.05
    logits = torch.randn(300, classes, dtype=torch.float64)
    pi = logits.softmax(-1)
    s = torch.diag(pi.mean(0)) - pi.T @ pi / len(pi)
    d = torch.diag(torch.tensor([1.0] * (classes - 1) + [t**p], dtype=torch.float64))
    g = d @ s @ d
    null = torch.tensor([t**p] * (classes - 1) + [1.0], dtype=torch.float64)
    assert float((g @ null).abs().max()) < 1e-16
    floor = float((pi[:, -1] * (1 - pi[:, -1])).mean()) * t ** (2 * p)
    assert float(g[-1, -1]) == pytest.approx(floor, rel=1e-12)
    inside = torch.linalg.qr(null[:, None], mode="complete").Q[:, 1:]
    bottom = torch.linalg.eigvalsh(inside.T @ g @ inside)
    assert float(bottom[0]) > 1e-2  # what is left after deflation is live


@pytest.mark.parametrize("zero", [False, True])
def test_layer_norm_kernel(zero):
    """Cov(LN(X)) γ⁻¹ = 0 for any X; a zero γ_i leaves e_i instead."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(7).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(7).double())
        norm.bias.copy_(torch.randn(7).double())
        if zero:
            norm.weight[2] = 0.0
    y = norm(3 + torch.randn(500, 7, dtype=torch.float64) @ torch.randn(7, 7).double()).detach()
    y = y - y.mean(0)
    u = torch.eye(7, dtype=torch.float64)[2] if zero else 1 / norm.weight.detach()
    assert float((y @ (u / u.norm())).abs().max()) < 1e-13
    values = torch.linalg.svdvals(y)
    assert int((values > 1e-10 * values[0]).sum()) == 6


def test_rms_norm_has_no_kernel():
    torch.manual_seed(0)
    y = nn.RMSNorm(7).double()(torch.randn(500, 7, dtype=torch.float64)).detach()
    values = torch.linalg.svdvals(y - y.mean(0))
    assert float(values[-1] / values[0]) > 0.1


def test_residual_branches_need_a_pairing_to_keep_the_bottom():
    """σ_min(X + B(X)) >= σ_min(X) where ⟨Xu, B(X)u⟩ >= 0 for all u; a negative branch breaks it."""
    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64)
    m = torch.randn(5, 5, dtype=torch.float64)
    bottom = float(torch.linalg.svdvals(x)[-1])
    kept = x
    for _ in range(3):
        w = torch.linalg.solve(kept.T @ kept, m @ m.T)  # xᵀ(xW) = m mᵀ is positive
        kept = kept + kept @ w
        assert float(torch.linalg.svdvals(kept)[-1]) >= bottom * (1 - 1e-12)
    assert float(torch.linalg.svdvals(x - 0.9 * x)[-1]) < bottom

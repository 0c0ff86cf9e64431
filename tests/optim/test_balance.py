"""The constants of the frame: minimal norm, independent of the gauge, AdamW at a balanced start."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from deaddir_fast.optim.balance import balanced
from deaddir_fast.optim.ddcadam import DDCAdam
from optim.trajectories import load, scales, state_of


def test_two_layers_by_hand() -> None:
    """N1 e^{-2x} + N2 e^{2x} is least at e^{4x} = N1 / N2."""
    x = balanced({(1,): 7.0, (-1,): 3.0, (0,): 5.0}, [True])
    assert x[0] == pytest.approx(math.log(7 / 3) / 4, abs=1e-8)


def test_random_chains_against_scipy() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        sums = {
            (1, 0, 0): draw.lognormal(0, 3),
            (-1, 1, 0): draw.lognormal(0, 3),
            (0, -1, 1): draw.lognormal(0, 3),
            (0, 0, -1): draw.lognormal(0, 3),
            (1, 0, -1): draw.lognormal(0, 3),
        }
        e = -2.0 * np.array(list(sums))
        w = np.log(list(sums.values()))
        w = w - w.max()
        truth = minimize(
            lambda x, e=e, w=w: np.logaddexp.reduce(w + e @ x), np.zeros(3), tol=1e-14
        ).x
        assert balanced(sums, [True] * 3) == pytest.approx(truth, abs=1e-4)


def test_sides_without_weight_are_not_balanced() -> None:
    assert (balanced({(1, 0): 2.0, (-1, 1): 3.0, (0, -1): 0.0}, [True, True])[1]) == 0
    assert not balanced({(1,): 2.0, (-1,): 0.0}, [True]).any()
    assert not balanced({(1,): 2.0, (-1,): float("nan")}, [True]).any()
    assert not balanced({}, [True, False]).any()
    assert not balanced({(1,): 2.0, (-1,): 1.0}, [False]).any()


def hidden(widths: tuple[int, ...] = (8, 8, 8, 8)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def test_first_step_at_a_balanced_start_is_that_of_adamw() -> None:
    """Rows and columns of norm 1 everywhere: the frame is 1, and so is every factor."""
    torch.manual_seed(0)
    model = hidden()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linalg.qr(torch.randn_like(p))[0])
    x, y = torch.randn(32, 8).double(), torch.randn(32, 8).double()
    ours, theirs = load(model, state_of(model)), load(model, state_of(model))
    a = DDCAdam(ours, lr=1e-3, likelihood="gaussian")
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0)
    for m, o in ((ours, a), (theirs, b)):
        F.mse_loss(m(x), y).backward()
        o.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [0.02, 1.0, 5.0])
def test_factors_are_of_order_one_at_usual_starts(size: float) -> None:
    """Equal norms of neighbouring layers, whatever they are: the step is close to AdamW's."""
    torch.manual_seed(0)
    model = hidden((64, 64, 64, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, size)
    optimizer = DDCAdam(model, likelihood="gaussian")
    start = state_of(model)
    model(torch.randn(4, 64).double()).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p.detach() - start[name]).abs()
        assert 0.5e-3 < float(moved.max()) < 2e-3


def test_constants_do_not_depend_on_the_gauge() -> None:
    torch.manual_seed(0)
    model = hidden((6, 10, 7, 3))
    probe = DDCAdam(model)
    draw = torch.Generator().manual_seed(1)
    state = state_of(model)
    for claim in probe.claims:
        if claim.gauge.dimension and claim.gauge.likelihood is None:
            state = claim.gauge.act(state, scales(claim.gauge.shape, draw))
        elif claim.gauge.dimension:
            state = claim.gauge.act(state, claim.gauge.random_element(draw))
    found = []
    for at in (state_of(model), state):
        m = load(model, at)
        optimizer = DDCAdam(m, gauges=probe.gauges)
        m(torch.randn(4, 6).double()).square().sum().backward()
        optimizer.step()
        kept = [s["frame_constants"] for s in optimizer.state.values() if "frame_constants" in s]
        assert len(kept) == 1
        found.append(kept[0])
    assert torch.allclose(found[0], found[1], rtol=1e-14, atol=0)
    assert not torch.allclose(found[0], torch.ones_like(found[0]), rtol=1e-2)

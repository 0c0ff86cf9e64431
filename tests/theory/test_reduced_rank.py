"""Reduced-rank regression against strata, depth two of the deep formula, and dense Jacobians."""

from fractions import Fraction

import pytest
import torch

from deaddir_fast.theory.deep_linear import deep_linear
from deaddir_fast.theory.reduced_rank import reduced_rank_local, reduced_rank_regression

CASES = [
    (m, n, h, r)
    for m in range(1, 7)
    for n in range(1, 7)
    for h in range(1, 7)
    for r in range(min(m, n, h) + 1)
]


def _components(m, n, h, r):
    """Ranks (r+a, r+b) at the generic points of the components of {B A = C}."""
    pairs = [
        (a, b) for a in range(min(m, h) - r + 1) for b in range(min(n, h) - r + 1) if a + b <= h - r
    ]
    return [
        (a, b)
        for a, b in pairs
        if not any((c, d) != (a, b) and c >= a and d >= b for c, d in pairs)
    ]


def test_minimum_over_components():
    """Half the smallest codimension of a component, and the number of components attaining it."""
    for m, n, h, r in CASES:
        codimension = [
            (r + a) * n + (r + b) * m - (r + a) * (r + b) for a, b in _components(m, n, h, r)
        ]
        expected = (Fraction(min(codimension), 2), codimension.count(min(codimension)))
        assert reduced_rank_regression(m, n, h, r) == expected, (m, n, h, r)


def test_depth_two_of_the_deep_formula():
    for m, n, h, r in CASES:
        assert reduced_rank_regression(m, n, h, r) == deep_linear((m, h, n), r), (m, n, h, r)


def test_local_values_fall_towards_deeper_points():
    for m, n, h, r in CASES:
        deepest = reduced_rank_local(m, n, h, r, r, r)
        assert deepest == reduced_rank_regression(m, n, h, r), (m, n, h, r)
        for p in range(r, min(m, h) + 1):
            for q in range(r, min(n, h, h + r - p) + 1):
                here = reduced_rank_local(m, n, h, r, p, q)
                if p < min(m, h) and p + 1 + q - h <= r:
                    assert reduced_rank_local(m, n, h, r, p + 1, q).rlct >= here.rlct
                if q < min(n, h) and p + q + 1 - h <= r:
                    assert reduced_rank_local(m, n, h, r, p, q + 1).rlct >= here.rlct


def test_global_value_is_the_minimum_over_the_strata():
    """Of the local values at every (rank A, rank B); attained at the deepest points."""
    for m, n, h, r in CASES:
        local = {
            (p, q): reduced_rank_local(m, n, h, r, p, q)
            for p in range(r, min(m, h) + 1)
            for q in range(r, min(n, h, h + r - p) + 1)
        }
        smallest = min(found.rlct for found in local.values())
        assert smallest == reduced_rank_regression(m, n, h, r).rlct == local[r, r].rlct


@pytest.mark.parametrize(("m", "n", "h", "r"), [(4, 3, 3, 1), (2, 5, 4, 0), (3, 3, 5, 2)])
def test_smooth_strata_have_half_the_rank_of_the_jacobian(m, n, h, r):
    generator = torch.Generator().manual_seed(0)
    for p in range(r, min(m, h) + 1):
        q = min(n, h + r - p)
        if q + p - h != r and p != m and q != n:
            continue
        # A = diag(1_r, 1_(p-r), 0), B = diag(1_r, 0, 1_(q-r)): ranks p and q, product of rank r.
        a, b = torch.zeros(h, m, dtype=torch.float64), torch.zeros(n, h, dtype=torch.float64)
        a[:p, :p] = torch.eye(p)
        b[:r, :r] = torch.eye(r)
        b[r:q, p : p + q - r] = torch.eye(q - r)
        mix, _ = torch.linalg.qr(torch.randn(h, h, generator=generator, dtype=torch.float64))
        a, b = mix @ a, b @ mix.T
        assert torch.linalg.matrix_rank(b @ a, atol=1e-12) == r
        jacobian = torch.cat(
            [
                j.reshape(n * m, -1)
                for j in torch.func.jacrev(lambda a, b: b @ a, argnums=(0, 1))(a, b)
            ],
            1,
        )
        codimension = int(torch.linalg.matrix_rank(jacobian, atol=1e-12))
        assert reduced_rank_local(m, n, h, r, p, q) == (Fraction(codimension, 2), 1)


def test_known_values():
    assert reduced_rank_regression(2, 2, 2, 0) == (Fraction(3, 2), 1)
    assert reduced_rank_regression(1, 1, 1, 0) == (Fraction(1, 2), 2)
    assert reduced_rank_regression(3, 4, 2, 2) == (Fraction(2 * (3 + 4) - 4, 2), 1)  # regular


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: reduced_rank_regression(2, 2, 2, 3), ValueError, "rank: "),
        (lambda: reduced_rank_regression(-1, 2, 2, 0), ValueError, "inputs: "),
        (lambda: reduced_rank_regression(2, 2.0, 2, 0), TypeError, "outputs: "),
        (lambda: reduced_rank_regression(2, 2, "2", 0), TypeError, "hidden: "),
        (lambda: reduced_rank_local(2, 2, 2, 1, 0, 1), ValueError, "rank_a: "),
        (lambda: reduced_rank_local(2, 2, 2, 1, 3, 1), ValueError, "rank_a: "),
        (lambda: reduced_rank_local(2, 2, 2, 1, 1, 3), ValueError, "rank_b: "),
        (lambda: reduced_rank_local(2, 2, 2, 0, 1, 2), ValueError, "rank_b: "),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()

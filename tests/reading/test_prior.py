"""Exponents of priors given as functions, and λ under them, against direct integrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd
from reading.functions import ONE, Function, turn
from reading.test_networks import data, linear_chain, stratum

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
D = torch.float64
Q = Fraction
LogPrior = Callable[[dict[str, Tensor]], Any]


def on(f: Callable[[Tensor], Tensor]) -> LogPrior:
    """A prior of the vector w from its density."""
    return lambda p: f(p["w"]).log()


def exponents(
    f: Callable[[Tensor], Tensor], *lines: list[float], at: list[float] | None = None
) -> dd.PriorExponents:
    model = Function(lambda w: w, at or [0.0] * len(lines[0]))
    return dd.prior_exponents(model, on(f), {"w": torch.tensor(lines, dtype=D)})


POWERS: list[tuple[str, Callable[[Tensor], Tensor], Fraction]] = [
    ("positive", lambda w: 1 + w[0], Q(0)),
    ("Gaussian", lambda w: torch.exp(-50 * (w[0] - 1) ** 2), Q(0)),
    ("|x|", lambda w: w[0].abs(), Q(1)),
    ("x² with a bend", lambda w: w[0] ** 2 * (1 + 3 * w[0]).exp(), Q(2)),
    ("sqrt", lambda w: w[0].abs().sqrt(), Q(1, 2)),
    ("integrable pole", lambda w: w[0].abs() ** (-1 / 3), Q(-1, 3)),
    ("a pole", lambda w: w[0].abs() ** -2, Q(-2)),
    ("Jeffreys of x³", lambda w: (9 * w[0] ** 4).sqrt(), Q(2)),
    ("sides of other sizes", lambda w: torch.where(w[0] > 0, 5 * w[0], -w[0]), Q(1)),
]


@pytest.mark.parametrize(("name", "f", "h"), POWERS, ids=[p[0] for p in POWERS])
def test_powers(name: str, f: Callable[[Tensor], Tensor], h: Fraction) -> None:
    found = exponents(f, [-3.0])
    assert found.verdicts == ("resolved",)
    assert found.fractions == (h,)
    assert float(found.exponents[0]) == pytest.approx(float(h), abs=1e-5)
    assert float(found.errors[0]) < 1e-4


def test_away_from_zero_and_several_parameters() -> None:
    """θ0 of order one: the distances are relative to it."""
    model = nn.Linear(2, 1).double()
    model.weight.data = torch.tensor([[2.0, -1.0]], dtype=D)

    def log_prior(p: dict[str, Tensor]) -> Tensor:
        assert p["weight"].shape == (1, 2) and p["bias"].dtype == D
        return 3 * (p["weight"][0, 0] - 2).abs().log() - p["bias"].square().sum()

    lines = {"weight": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]], dtype=D)}
    found = dd.prior_exponents(model, log_prior, lines)
    assert found.fractions[0] == 3 and found.fractions[2] == 3
    assert found.verdicts[1].startswith("unresolved: not finite")  # the prior is zero on that line


REFUSED: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("log", lambda w: w[0].abs() * -w[0].abs().log(), "not a power"),
    ("essential", lambda w: torch.exp(-1 / w[0].abs()), "not"),
    ("oscillating", lambda w: w[0].abs() * (2 + torch.sin(1 / w[0])), "not a power"),
    ("half a line", lambda w: (w[0] > 0).double() * w[0], "t < 0: not finite"),
    ("zero", lambda w: 0 * w[0], "not finite"),
    ("other sides", lambda w: torch.where(w[0] > 0, w[0], w[0] ** 2), "both sides differ: 1"),
    ("irrational", lambda w: w[0].abs() ** math.sqrt(2), "no fraction"),
    ("single precision", lambda w: (w[0] + 1).float().sub(1).abs(), "not"),
]


@pytest.mark.parametrize(("name", "f", "said"), REFUSED, ids=[p[0] for p in REFUSED])
def test_what_is_no_power_is_refused(name: str, f: Callable[[Tensor], Tensor], said: str) -> None:
    found = exponents(f, [1.0])
    assert found.verdicts[0].startswith("unresolved: ")
    assert said in found.verdicts[0]
    assert found.fractions == (None,)


def test_arguments() -> None:
    model = Function(lambda w: w, [0.0])
    line = {"w": torch.ones(1, 1, dtype=D)}

    def flat(p: dict[str, Tensor]) -> float:
        return 0.0

    assert dd.prior_exponents(model, flat, line).fractions == (0,)
    with pytest.raises(TypeError, match="model"):
        dd.prior_exponents("model", flat, line)  # type: ignore[arg-type]
    for bad in (3.0, None):
        with pytest.raises(TypeError, match="log_prior"):
            dd.prior_exponents(model, bad, line)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_prior"):
        dd.prior_exponents(model, lambda p: torch.zeros(2), line)
    with pytest.raises(TypeError, match="log_prior"):
        dd.prior_exponents(model, lambda p: "0", line)
    with pytest.raises(ValueError, match="directions"):
        dd.prior_exponents(model, flat, {"v": line["w"]})
    for radii in ([0.1, 0.01], [0.1] * 9, [-0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0, 1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="radii"):
            dd.prior_exponents(model, flat, line, radii=radii)


def triple(f: Callable[[Tensor], Tensor], d: int, density: Callable[[Tensor], Tensor]) -> dd.Triple:
    return dd.read_triple(
        Function(f, [0.0] * d), ONE, likelihood="gaussian", prior_exponent=on(density)
    )


def test_integer_and_function_agree() -> None:
    for k, h in ((2, 0), (2, 1), (3, 2), (3, 4)):
        model = Function(lambda w, k=k: w[0] ** k, [0.0])
        number = dd.read_triple(model, ONE, likelihood="gaussian", prior_exponent=h)
        function = triple(lambda w, k=k: w[0] ** k, 1, lambda w, h=h: w[0].abs() ** h)
        assert function.resolved
        assert (function.rlct, function.multiplicity) == (number.rlct, 1) == (Q(h + 1, 2 * k), 1)
        assert function.fluctuation == pytest.approx(number.fluctuation, rel=1e-12)
        assert any(text.startswith("prior: ") for text in function.rests_on)


# Means f, prior φ and λ = Σ (h_i + 1)/(2 k_i), or by hand where φ is no product.
USED: list[tuple[str, Callable[[Tensor], Tensor], int, Callable[[Tensor], Tensor], Fraction]] = [
    ("x³, |x|^½", lambda w: w[0] ** 3, 1, lambda w: w[0].abs().sqrt(), Q(1, 4)),
    ("x², pole", lambda w: w[0] ** 2, 1, lambda w: w[0].abs() ** -0.5, Q(1, 8)),
    ("y, x²", lambda w: torch.stack([w[1], w[0] ** 2]), 2, lambda w: w[0] ** 2, Q(1, 2) + Q(3, 4)),
    (
        "x², y³",
        lambda w: torch.stack([w[0] ** 2, w[1] ** 3]),
        2,
        lambda w: w[0].abs() * w[1] ** 2,
        Q(2, 4) + Q(3, 6),
    ),
    (
        "x², y³, one factor",
        lambda w: torch.stack([w[0] ** 2, w[1] ** 3]),
        2,
        lambda w: w[1] ** 2,
        Q(1, 4) + Q(3, 6),
    ),
    (
        "x², y³, a sum",  # x ~ τ^(1/2), y ~ τ^(1/3): x² + y² is y² to leading order
        lambda w: torch.stack([w[0] ** 2, w[1] ** 3]),
        2,
        lambda w: w[0] ** 2 + w[1] ** 2,
        Q(1, 4) + Q(3, 6),
    ),
    ("a ball", lambda w: w.square().sum(), 3, lambda w: w.norm() ** 5, Q(3 + 5, 4)),
    ("regular", lambda w: w, 3, lambda w: w[0].abs() * (w[1] - w[2]).abs(), Q(3 + 2, 2)),
    (
        "y - x², x³",  # on the relaxed curve y = x² the prior |y| is x²
        lambda w: torch.stack([w[1] - w[0] ** 2, w[0] ** 3]),
        2,
        lambda w: w[1].abs(),
        Q(1, 2) + Q(3, 6),
    ),
]


@pytest.mark.parametrize(("name", "f", "d", "density", "rlct"), USED, ids=[u[0] for u in USED])
def test_priors_that_vanish(
    name: str,
    f: Callable[[Tensor], Tensor],
    d: int,
    density: Callable[[Tensor], Tensor],
    rlct: Fraction,
) -> None:
    found = triple(f, d, density)
    assert found.resolved, found.verdict
    assert (found.rlct, found.multiplicity) == (rlct, 1)
    assert found.lower == found.upper == rlct


@pytest.mark.slow
@pytest.mark.parametrize("case", [u for u in USED if u[2] == 2], ids=lambda u: u[0])
def test_those_values_by_integration(case: Any) -> None:
    """-d log Z/d log n of Z = ∫ φ exp(-n K) tends to λ; nodes w = ±|s|^5."""
    _, f, _, density, rlct = case
    s = torch.linspace(-1, 1, 2400, dtype=D)
    s = s[s != 0]

    def evidence(n: float) -> float:
        # Nodes crowd at 0 where the posterior is.
        axis, jacobian = s.sign() * s.abs() ** 5, 5 * s.abs() ** 4
        w = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
        k = 0.5 * f(w).square().reshape(-1, *w.shape[1:]).sum(0)
        weight = density(w) * jacobian[:, None] * jacobian[None]
        return float((weight * torch.exp(-n * k)).sum())

    low, high = 1e7, 1e9
    slope = -math.log(evidence(high) / evidence(low)) / math.log(high / low)
    assert slope == pytest.approx(float(rlct), abs=0.03)


def test_rotated_product() -> None:
    """The factors need not lie along coordinate axes."""
    frame = turn(2, 3)
    found = triple(
        lambda w: torch.stack([(frame @ w)[0] ** 2, (frame @ w)[1] ** 3]),
        2,
        lambda w: (frame @ w)[0].abs() * (frame @ w)[1] ** 2,
    )
    assert found.resolved and found.rlct == 1


def test_a_positive_prior_changes_nothing() -> None:
    """Gaussian, Laplace and heavy-tailed priors on a network with gauge and singular directions."""
    model, x = stratum(2, 2, 2, 1, 1, 1), data(20, 2)
    plain = dd.read_triple(model, x, likelihood="gaussian")
    priors: list[LogPrior] = [
        lambda p: -sum(v.square().sum() for v in p.values()) / 2,
        lambda p: -sum(v.abs().sum() for v in p.values()),
        lambda p: -sum((1 + v.square()).log().sum() for v in p.values()),
    ]
    for log_prior in priors:
        found = dd.read_triple(model, x, likelihood="gaussian", prior_exponent=log_prior)
        assert (found.rlct, found.multiplicity) == (plain.rlct, plain.multiplicity)
        assert found.fluctuation_verdict == plain.fluctuation_verdict
        assert any("continuous and positive" in text for text in found.rests_on)


# Means f, prior and true λ where the rules cannot take the prior.
FLAGGED: list[
    tuple[str, Callable[[Tensor], Tensor], int, Callable[[Tensor], Tensor], Fraction | None, str]
] = [
    ("crossing", lambda w: w[0] * w[1], 2, lambda w: w[0].abs(), Q(1, 2), "sum of powers"),
    ("fibre", lambda w: w[0] ** 2 + 0 * w[1], 2, lambda w: w[0].abs(), Q(1, 2), "fibre"),
    (
        "pole along a fibre",  # ∫∫ |y|^(-1/2) |x| exp(-n y²) = n^(-1/4)
        lambda w: w[1] + 0 * w[0],
        2,
        lambda w: w[1].abs() ** -0.5 * w[0].abs(),
        Q(1, 4),
        "fibre",
    ),
    (
        "along a live direction",  # ∫ |y| exp(-n y²) · n^(-1/4)
        lambda w: torch.stack([w[1], w[0] ** 2]),
        2,
        lambda w: w[1].abs(),
        Q(1) + Q(1, 4),
        "live directions",
    ),
    (
        "sides",
        lambda w: w[0] ** 2,
        1,
        lambda w: torch.where(w[0] > 0, w[0], w[0] ** 2),
        Q(1, 2),
        "",
    ),
    ("irrational", lambda w: w[0] ** 2, 1, lambda w: w[0].abs() ** math.sqrt(2), None, "fraction"),
    ("log", lambda w: w[0] ** 2, 1, lambda w: -w[0].abs() * w[0].abs().log(), Q(1, 2), "power"),
    ("essential", lambda w: w[0] ** 2, 1, lambda w: torch.exp(-1 / w[0].abs()), None, "not"),
    ("improper", lambda w: w[0] ** 2, 1, lambda w: w[0].abs() ** -1.5, None, "not integrable"),
    ("improper live", lambda w: w[0], 1, lambda w: w[0].abs() ** -1, None, "not integrable"),
    ("poles", lambda w: w, 2, lambda w: (w[0] * w[1]).abs() ** -0.5, Q(1, 2), "diverges"),
]


@pytest.mark.parametrize(
    ("name", "f", "d", "density", "rlct", "said"), FLAGGED, ids=[u[0] for u in FLAGGED]
)
def test_priors_the_rules_cannot_take(
    name: str,
    f: Callable[[Tensor], Tensor],
    d: int,
    density: Callable[[Tensor], Tensor],
    rlct: Fraction | None,
    said: str,
) -> None:
    found = triple(f, d, density)
    assert not found.resolved and found.rlct != found.rlct and found.multiplicity == 0
    assert "prior not positive at the parameters" in found.verdict and said in found.verdict
    assert found.fluctuation_verdict.startswith("unresolved")
    if rlct is not None:
        assert found.lower <= rlct <= found.upper


def test_sides_of_other_sizes_matter_to_nu_of_odd_orders_only() -> None:
    """|x| times 1 on the left and 3 on the right: λ is the same; ν is universal for even k."""

    def lopsided(w: Tensor) -> Tensor:
        return w[0].abs() * torch.where(w[0] > 0, 3.0, 1.0)

    odd = triple(lambda w: w[0] ** 3, 1, lopsided)
    assert odd.resolved and odd.rlct == Q(1, 3)
    assert odd.fluctuation != odd.fluctuation and "sides" in odd.fluctuation_verdict
    even = triple(lambda w: w[0] ** 2, 1, lopsided)
    assert even.fluctuation == pytest.approx(dd.theory.singular_fluctuation(2, h=1))
    assert even.singular == ((2, 1),)


def test_a_doubtful_reading_claims_no_flat_bound() -> None:
    """Flat-prior bounds do not hold for a prior that vanishes: x^10 beyond the highest order."""
    found = triple(lambda w: w[0] ** 10, 1, lambda w: w[0] ** 40)
    assert not found.resolved
    assert found.lower <= Q(41, 20) <= found.upper
    number = dd.read_triple(
        Function(lambda w: w[0] ** 10, [0.0]), ONE, likelihood="gaussian", prior_exponent=40
    )
    assert not number.resolved
    assert number.lower <= Q(41, 20) <= number.upper


def test_integer_bounds_of_doubtful_ranks() -> None:
    """Sample-limited: h raises the upper bound as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    flat, bent = (
        dd.read_triple(model, data(4, 5), likelihood="gaussian", prior_exponent=h) for h in (0, 6)
    )
    assert not bent.resolved and bent.upper == flat.upper + 3


def test_bad_functions() -> None:
    model, x = linear_chain(2, 1), data(5, 2)
    with pytest.raises(ValueError, match="log_prior"):
        dd.read_triple(model, x, likelihood="gaussian", prior_exponent=lambda p: torch.zeros(2))
    assert np.isnan(
        dd.prior_exponents(
            model, lambda p: math.nan, {"0.weight": torch.ones(1, 1, 2, dtype=D)}
        ).exponents.numpy()
    ).all()

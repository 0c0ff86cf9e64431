"""Odd two-layer networks against a blow-up of the output weights' fibre."""

from fractions import Fraction

import pytest

from deaddir_fast.theory.monomial import monomial_ideal
from deaddir_fast.theory.odd_two_layer import odd_two_layer


def _by_blow_up(hidden):
    """λ at (a, 0) for generic a, after b = t b' with b' on the unit sphere.

    Level n of the outputs is t^(2n+1) x_n, where x_n = Σ a_j b'_j^(2n+1) are coordinates around a
    point where the first hidden - 1 of them vanish together; the next one does not. The Jacobian
    of the blow-up is t^(hidden-1).
    """
    levels = hidden - 1
    dim = 1 + levels
    ideal = [
        tuple(2 * n + 1 if i == 0 else int(i == n + 1) for i in range(dim)) for n in range(levels)
    ]
    ideal.append((2 * levels + 1, *(0,) * levels))
    return monomial_ideal(ideal, [hidden - 1, *(0,) * levels])


@pytest.mark.parametrize("hidden", range(2, 20))
def test_blow_up(hidden):
    assert odd_two_layer(hidden) == _by_blow_up(hidden)


def test_known_values():
    assert odd_two_layer(1) == monomial_ideal([(1, 1)])  # one unit: a b
    assert odd_two_layer(2) == (Fraction(2, 3), 1)
    assert odd_two_layer(4) == (Fraction(1), 2)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_errors_name_the_argument(value, error):
    with pytest.raises(error, match=r"^hidden: "):
        odd_two_layer(value)

"""Aoyagi's formula against her subset rule, quiver strata and small exact cases."""

import itertools
import random
from fractions import Fraction
from math import ceil

import pytest

from deaddir_fast.theory.deep_linear import deep_linear
from deaddir_fast.theory.normal_crossing import normal_crossing


def _by_all_subsets(widths, rank):
    """Every subset of layers that meets the three conditions, tried one by one."""
    m = [w - rank for w in widths]
    found = set()
    for size in range(2, len(m) + 1):
        for subset in itertools.combinations(range(len(m)), size):
            inside = [m[j] for j in subset]
            outside = [m[j] for j in range(len(m)) if j not in subset]
            q, total = size - 1, sum(inside)
            if outside and (max(inside) >= min(outside) or total >= q * min(outside)):
                continue
            if total < q * max(inside):
                continue
            ratio = Fraction(total, q)
            a = total - (ceil(ratio) - 1) * q
            value = Fraction(rank * (widths[0] + widths[-1]) - rank**2, 2)
            value += Fraction(a * (q - a), 4 * q) - Fraction(q * (q - 1), 4) * ratio**2
            value += sum(
                (Fraction(u * v, 2) for u, v in itertools.combinations(inside, 2)), Fraction(0)
            )
            found.add((value, a * (q - a) + 1))
    return found


def _random_network(rng, widest=9, deepest=6):
    widths = [rng.randint(1, widest) for _ in range(rng.randint(1, deepest) + 1)]
    return widths, rng.randint(0, min(widths))


def test_against_the_subset_rule():
    rng = random.Random(0)
    shapes, largest = set(), 0
    for _ in range(1000):
        widths, rank = _random_network(rng)
        result = deep_linear(widths, rank)
        assert _by_all_subsets(widths, rank) == {tuple(result)}, (widths, rank)
        shapes.add(len(widths))
        largest = max(largest, result.multiplicity)
    assert shapes == set(range(2, 8)) and largest >= 3


def _orbit_codimensions(widths, rank):
    """Codimension of every stratum of the fibre {W_L ... W_1 = C}.

    The strata are orbits of representations of the linear quiver: a multiplicity for every
    interval [i, j] of layers, with the widths as dimension vector and the full interval occurring
    ``rank`` times. An orbit has codimension dim Ext(M, M); Ext of two intervals is one-dimensional
    exactly when they can be joined end to end, possibly overlapping without nesting.
    """
    last = len(widths) - 1
    intervals = [(i, j) for i in range(last + 1) for j in range(i, last + 1)]

    def extension(first, second):
        (i, j), (k, n) = first, second
        return i + 1 <= k <= j + 1 <= n

    def orbits(index, left):
        if index == len(intervals):
            if not any(left):
                yield ()
            return
        i, j = intervals[index]
        choices = range(min(left[i : j + 1]) + 1)
        if (i, j) == (0, last):
            choices = [rank] if rank in choices else []
        for count in choices:
            rest = [v - count * (i <= t <= j) for t, v in enumerate(left)]
            for tail in orbits(index + 1, rest):
                yield (count, *tail)

    fixed = rank * (widths[0] + widths[-1]) - rank**2  # W_L ... W_1 is one matrix of that rank
    for counts in orbits(0, list(widths)):
        pairs = itertools.product(zip(intervals, counts, strict=True), repeat=2)
        yield fixed + sum(c * d for (u, c), (v, d) in pairs if c and d and extension(u, v))


def test_against_codimensions_of_quiver_strata():
    """λ is half the smallest codimension in the fibre (an upper bound for any analytic K)."""
    for depth, widest in ((1, 4), (2, 4), (3, 3), (4, 2)):
        for widths in itertools.product(range(1, widest + 1), repeat=depth + 1):
            for rank in range(min(widths) + 1):
                smallest = min(_orbit_codimensions(widths, rank))
                assert deep_linear(widths, rank).rlct == Fraction(smallest, 2), (widths, rank)


def _smallest_codimension(widths, rank):
    """The same minimum by dynamic programming over the layers, for wide and deep networks.

    The state at a layer is how many intervals that reach it start at each earlier layer. Those
    that end there extend only intervals that go on and start later, so the codimension is a sum
    over layers. The ``rank`` full intervals extend nothing.
    """
    w = [v - rank for v in widths]
    states = {(w[0],): 0}
    for width in w[1:]:
        following = {}
        for state, cost in states.items():
            for kept in itertools.product(*(range(c + 1) for c in state)):
                new = width - sum(kept)
                if new < 0:
                    continue
                alive, total = new, cost
                for c, d in zip(reversed(state), reversed(kept), strict=True):
                    total += (c - d) * alive
                    alive += d
                key = (*kept, new)
                if total < following.get(key, total + 1):
                    following[key] = total
        states = following
    fixed = rank * (widths[0] + widths[-1]) - rank**2
    return fixed + min(cost for state, cost in states.items() if state[0] == 0)


def test_both_codimensions_agree():
    for widths in itertools.product(range(1, 4), repeat=4):
        for rank in range(min(widths) + 1):
            assert _smallest_codimension(widths, rank) == min(_orbit_codimensions(widths, rank))


@pytest.mark.slow
def test_a_thousand_networks_against_codimensions():
    """Width up to 9, depth up to 6, drawn at random."""
    rng = random.Random(2)
    for _ in range(1000):
        widths, rank = _random_network(rng)
        smallest = Fraction(_smallest_codimension(widths, rank), 2)
        assert deep_linear(widths, rank).rlct == smallest, (widths, rank)


def test_width_one_chain_is_a_normal_crossing():
    for depth in range(1, 9):
        assert deep_linear([1] * (depth + 1), 0) == normal_crossing([1] * depth)


def test_one_layer_is_regular():
    for m, n in itertools.product(range(1, 8), repeat=2):
        for rank in range(min(m, n) + 1):
            assert deep_linear((m, n), rank) == (Fraction(m * n, 2), 1)


def test_invariances_and_bounds():
    rng = random.Random(1)
    for _ in range(500):
        widths, rank = _random_network(rng)
        result = deep_linear(widths, rank)
        hidden = widths[1:-1]
        assert (
            deep_linear([widths[0], *rng.sample(hidden, len(hidden)), widths[-1]], rank) == result
        )
        assert deep_linear(widths[::-1], rank) == result
        parameters = sum(a * b for a, b in itertools.pairwise(widths))
        assert Fraction(rank * (widths[0] + widths[-1] - rank), 2) <= result.rlct
        assert result.rlct <= Fraction(min(parameters, widths[0] * widths[-1]), 2)
        # A layer more can only lower λ; a unit more, or a larger rank, can only raise it.
        where = rng.randint(1, len(widths) - 1)
        deeper = [*widths[:where], rng.randint(max(rank, 1), 9), *widths[where:]]
        assert deep_linear(deeper, rank).rlct <= result.rlct
        wider = list(widths)
        wider[rng.randrange(len(widths))] += 1
        assert deep_linear(wider, rank).rlct >= result.rlct
        if rank < min(widths):
            assert deep_linear(widths, rank + 1).rlct >= result.rlct


@pytest.mark.parametrize(
    ("widths", "rank", "error", "name"),
    [
        ([3], 0, ValueError, "widths: "),
        ([3, -1, 2], 0, ValueError, r"widths\[1\]"),
        ([3, 2.5], 0, TypeError, r"widths\[1\]"),
        ([3, 2, 4], 3, ValueError, "rank: "),
        ([3, 2], -1, ValueError, "rank: "),
    ],
)
def test_errors_name_the_argument(widths, rank, error, name):
    with pytest.raises(error, match=f"^{name}"):
        deep_linear(widths, rank)

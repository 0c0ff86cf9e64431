"""Random numbers by counting: reference values, independence of cutting, and quality."""

from __future__ import annotations

import math

import pytest
import torch

from deaddir_fast.nets import counter

torch.set_num_threads(1)

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The reference algorithm on Python's integers: one step from a state."""
    x = (state + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def at(seed: int, draw: int, sample: int, token: int, element: int) -> int:
    word = splitmix64(0)
    for index in (seed, draw, sample, token, element):
        word = splitmix64((word + index * GOLDEN) & MASK)
    return word


def grid(n: int, t: int, elements: int | None, seed: int = 0, draw: int = 0, first: int = 0):
    samples, tokens = torch.arange(first, first + n), torch.arange(t).expand(n, t)
    return counter.words(seed, draw, samples, tokens, elements)


def test_published_values_of_splitmix64():
    """First outputs for seed 1234567, as in the reference implementation's test vectors."""
    state, found = 1234567, []
    for _ in range(5):
        found.append(splitmix64(state))
        state = (state + GOLDEN) & MASK
    assert found == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1, 1 << 70])
def test_words_are_those_of_the_algorithm(seed):
    found = grid(3, 2, 4, seed=seed, draw=5, first=1 << 40)
    for s in range(3):
        for t in range(2):
            for e in range(4):
                assert int(found[s, t, e]) & MASK == at(seed, 5, (1 << 40) + s, t, e)
    assert torch.equal(grid(3, 2, None, seed=seed, draw=5, first=1 << 40), found[..., 0])


def test_large_blocks_are_cut_without_a_trace():
    """More numbers than are hashed at once."""
    assert torch.equal(grid(300, 3, 1000)[250:], grid(50, 3, 1000, first=250))
    assert torch.equal(grid(1, 2, 300_000)[:, 1, -1], torch.tensor(
        [at(0, 0, 0, 1, 299_999) - (1 << 64) * (at(0, 0, 0, 1, 299_999) >> 63)]
    ))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 3, None)])
def test_empty(shape):
    assert grid(*shape).numel() == 0


def test_uniform_numbers_are_inside_the_interval():
    ends = counter.uniform(torch.tensor([0, -1, (1 << 63) - 1, -(1 << 63)]))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53, 0.5 - 2.0**-53, 0.5 + 2.0**-53]
    normal = counter.normal(torch.tensor([0, -1]))
    # Φ⁻¹(2^-53) = -8.2095 (Abramowitz & Stegun 26.2.23 to 4 digits; symmetric).
    assert abs(float(normal[0]) + 8.2095) < 1e-3 and float(normal.sum()) == 0


#: The streams whose statistics are tested: many elements, many tokens, many samples, many draws.
STREAMS = {
    "elements": lambda: grid(1, 1, 1 << 18),
    "tokens": lambda: grid(1, 1 << 18, None),
    "samples": lambda: grid(1 << 18, 1, None),
    "blocks": lambda: grid(64, 64, 64),
    "seeds": lambda: torch.stack([grid(1, 1, 64, seed=s) for s in range(4096)]),
    "draws": lambda: torch.stack([grid(1, 1, 64, draw=s) for s in range(4096)]),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_moments(stream):
    """Five standard errors; the fourth moment of a normal has variance 96."""
    word = STREAMS[stream]().flatten()
    u, g, n = counter.uniform(word), counter.normal(word), word.numel()
    for found, mean, variance in [
        (u, 1 / 2, 1 / 12),
        (u.square(), 1 / 3, 4 / 45),
        (g, 0, 1),
        (g.square(), 1, 2),
        (g**3, 0, 15),
        (g**4, 3, 96),
    ]:
        assert abs(float(found.mean()) - mean) < 5 * math.sqrt(variance / n)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("low", [False, True], ids=["high bits", "low bits"])
def test_chi_square(stream, low):
    """1024 cells and pairs of neighbours in 32 x 32; within five standard deviations."""
    word = STREAMS[stream]().flatten()
    k = word & 1023 if low else (counter.uniform(word) * 1024).long()
    first = (word & 31) if low else (counter.uniform(word) * 32).long()
    for cell in (k, first[:-1:2] * 32 + first[1::2]):
        expected = cell.numel() / 1024
        statistic = float((torch.bincount(cell, minlength=1024) - expected).square().sum())
        assert abs(statistic / expected - 1023) < 5 * math.sqrt(2 * 1023)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096])
def test_neighbours_are_not_correlated(stream, lag):
    g = counter.normal(STREAMS[stream]().flatten())
    a, b, n = g[:-lag], g[lag:], g.numel() - lag
    assert abs(float((a * b).mean())) < 5 / math.sqrt(n)
    # E[(g² - 1)(h² - 1)] has variance 4.
    assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) < 5 * 2 / math.sqrt(n)


def test_every_bit_is_fair_and_changes_with_every_index():
    bits = torch.arange(64)
    n = 1 << 14
    word = grid(n, 1, None)
    ones = ((word >> bits) & 1).double().mean(0)
    assert ((ones - 0.5).abs() < 5 * 0.5 / math.sqrt(n)).all()
    for other in (
        grid(n, 1, None, seed=1), grid(n, 1, None, draw=1), grid(n, 1, None, first=1),
        grid(n, 2, None)[:, 1:], grid(n, 1, 2)[..., 1],
    ):  # fmt: skip
        flipped = (((word ^ other) >> bits) & 1).double().mean(0)
        assert ((flipped - 0.5).abs() < 5 * 0.5 / math.sqrt(n)).all()


def test_no_position_shares_a_number_with_another():
    """2^21 words of 64 bits: two alike have a chance of 2^-23."""
    some = [grid(256, 16, 128, seed=s, draw=d) for s in range(2) for d in range(2)]
    word = torch.cat([w.flatten() for w in some])
    assert len(word.unique()) == word.numel()

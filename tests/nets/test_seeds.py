"""Seeds: squares that add up to the Fisher of the outputs, exactly or on average."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_rms, max_relative

from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets import seeds

torch.set_num_threads(1)

LIKELIHOODS = {
    "categorical": likelihoods.Categorical(),
    "gaussian": likelihoods.Gaussian(torch.tensor([0.5, 2.0, 3.0, 1.0])),
    "bernoulli": likelihoods.Bernoulli(),
    "poisson": likelihoods.Poisson(),
}


def fisher(z: torch.Tensor, name: str) -> torch.Tensor:
    """(c, c) closed form."""
    if name == "categorical":
        p = torch.softmax(z, -1)
        h = -torch.outer(p, p)
        # 1 - p as the sum of the others.
        h[range(len(p)), range(len(p))] = p * (p.sum() - p)
        others = torch.stack([torch.cat([p[:k], p[k + 1 :]]).sum() for k in range(len(p))])
        h[range(len(p)), range(len(p))] = p * others
        return h
    if name == "gaussian":
        return torch.diag(1 / LIKELIHOODS[name].variance.double())
    if name == "bernoulli":
        return torch.diag(torch.sigmoid(z) * torch.sigmoid(-z))
    return torch.diag(torch.exp(z))


def squares(z: torch.Tensor, name: str) -> torch.Tensor:
    """(n, c, c) sums over the exact seeds."""
    found = [v.double() for v in seeds.exact(z, LIKELIHOODS[name])]
    assert len(found) == seeds.exact_count(z, LIKELIHOODS[name])
    return sum(v.unsqueeze(-1) * v.unsqueeze(-2) for v in found)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_seeds_are_a_root_of_the_fisher(name):
    z = 2 * torch.randn(5, 4).double()
    for row, h in zip(z, squares(z, name), strict=True):
        assert max_relative(h + 0.0, fisher(row, name)) < 1e-12


@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0, 300.0, 600.0])
def test_saturated_softmax(top, gap):
    """Every entry of H to 1e-12, with the likeliest class first, in the middle and last."""
    z = torch.randn(1, 4).double()
    z[0, top] += gap
    h = fisher(z[0], "categorical")
    found = squares(z, "categorical")[0]
    # Products of two rare classes may leave the range of fp64.
    normal = h.abs() > 1e-290
    assert max_relative(found[normal], h[normal]) < 1e-12
    assert (found[~normal].abs() <= 1e-290).all()


def test_saturated_softmax_in_fp32():
    """Rare classes of 1e-26: products of tails would leave the range of fp32."""
    z = torch.tensor([[0.0, -60.0, -60.5, -59.0]])
    for order in ([0, 1, 2, 3], [1, 2, 3, 0], [1, 0, 2, 3]):
        row = z[:, order]
        diagonal = sum(v.double().square() for v in seeds.exact(row, LIKELIHOODS["categorical"]))
        truth = fisher(row[0].double(), "categorical").diagonal()
        assert max_relative(diagonal[0], truth) < 1e-5


def test_classes_that_cannot_happen():
    z = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [-math.inf, -math.inf, 0.0, -math.inf]])
    found = squares(z.double(), "categorical")
    for row, h in zip(z.double(), found, strict=True):
        assert_rms(h, fisher(row, "categorical"), 1e-14)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_seeds_of_sequences_have_one_position_each(name):
    z = torch.randn(3, 5, 4).double()
    mask = torch.rand(3, 5) < 0.7
    mask[:, 2] = False
    count, total = 0, torch.zeros(3, 5, 4, 5, 4).double()
    for v in seeds.exact(z, LIKELIHOODS[name], mask):
        assert v.shape == z.shape
        count += 1
        total += torch.einsum("nsc,ntd->nsctd", v, v)
    live = int(mask.any(0).sum())
    assert count == live * (3 if name == "categorical" else 4)
    for n in range(3):
        for s in range(5):
            h = fisher(z[n, s], name) if mask[n, s] else torch.zeros(4, 4)
            assert_rms(total[n, s, :, s], h, 1e-13)
            total[n, s, :, s] = 0
    assert float(total.abs().max()) == 0


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_scores_have_the_fisher_as_their_covariance(name):
    """40 000 labels: each entry within five standard errors, and so is the mean, zero."""
    n, lik = 40_000, LIKELIHOODS[name]
    row = torch.tensor([0.3, -1.0, 0.8, 0.1]).double()
    z = row.expand(n, 4).contiguous()
    v = seeds.sampled(z, lik, seeds.noise(z, lik, 0, 0, 0, None), None)
    outer = v.unsqueeze(-1) * v.unsqueeze(-2)
    error = outer.std(0) / math.sqrt(n)
    assert ((outer.mean(0) - fisher(row, name)).abs() <= 5 * error + 1e-12).all()
    assert (v.mean(0).abs() <= 5 * v.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_empirical_scores_are_gradients_of_the_log_likelihood(name):
    z = torch.randn(6, 4).double().requires_grad_()
    y = {
        "categorical": torch.randint(0, 4, (6,)),
        "gaussian": torch.randn(6, 4).double(),
        "bernoulli": torch.randint(0, 2, (6, 4)).double(),
        "poisson": torch.randint(0, 5, (6, 4)).double(),
    }[name]
    log_p = {
        "categorical": lambda: -F.cross_entropy(z, y, reduction="sum"),
        "gaussian": lambda: -((y - z).square() / LIKELIHOODS[name].variance / 2).sum(),
        "bernoulli": lambda: -F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
        "poisson": lambda: (y * z - z.exp()).sum(),
    }[name]()
    (truth,) = torch.autograd.grad(log_p, z)
    assert_rms(seeds.empirical(z, LIKELIHOODS[name], y, None), truth, 1e-13)


def test_score_of_a_saturated_class_keeps_its_digits():
    z = torch.tensor([[60.0, 0.0, 1.0]]).double()
    v = seeds.empirical(z, LIKELIHOODS["categorical"], torch.tensor([0]), None)
    truth = (1 + math.e) / (math.exp(60) + 1 + math.e)
    assert abs(float(v[0, 0]) / truth - 1) < 1e-14


def test_labels_that_are_ignored_and_masks_add_up():
    z, y = torch.randn(2, 3, 4), torch.tensor([[0, -100, 2], [3, 1, -100]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    v = seeds.empirical(z, LIKELIHOODS["categorical"], y, mask)
    live = (v != 0).any(-1)
    assert live.tolist() == [[True, False, False], [True, True, False]]
    nothing = seeds.empirical(z, LIKELIHOODS["categorical"], torch.full((2, 3), -100), None)
    assert float(nothing.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integer_labels_of_any_width(dtype):
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    lik = LIKELIHOODS["categorical"]
    assert torch.equal(seeds.empirical(z, lik, y.to(dtype), None), seeds.empirical(z, lik, y, None))


@pytest.mark.parametrize(("targets", "error", "match"), [
    (torch.zeros(4).long(), ValueError, r"targets: expected shape \(3,\)"),
    (torch.tensor([0, 4, 1]), ValueError, r"targets: expected class indices in 0\.\.3 .* 0\.\.4"),
    (torch.tensor([0, -1, 1]), ValueError, r"got -1\.\.1"),
    (torch.zeros(3), TypeError, "targets: expected integer class indices"),
    (torch.zeros(3).bool(), TypeError, "targets: expected integer class indices"),
])  # fmt: skip
def test_wrong_labels(targets, error, match):
    with pytest.raises(error, match=match):
        seeds.empirical(torch.randn(3, 4), LIKELIHOODS["categorical"], targets, None)


# -------------------------------------------------------------------------------------- noise


class Own(likelihoods.Gaussian):
    """With noise of its own, from a generator."""

    def noise(self, z, generator=None):
        return torch.randn(z.shape, dtype=z.dtype, generator=generator)


ALL = {**LIKELIHOODS, "own": Own()}


@pytest.mark.parametrize("name", ALL)
def test_noise_of_a_sample_does_not_depend_on_its_batch(name):
    z, lik = torch.zeros(10, 3, 4), ALL[name]
    whole = seeds.noise(z, lik, 100, 1, 5, None)
    assert whole.shape == ((10, 3) if name == "categorical" else (10, 3, 4))
    parts = [seeds.noise(z[k : k + 1], lik, 100 + k, 1, 5, None) for k in range(10)]
    assert torch.equal(torch.cat(parts), whole)
    for other in [(101, 1, 5), (100, 0, 5), (100, 1, 6)]:
        assert not (seeds.noise(z, lik, *other, None) == whole).any()


@pytest.mark.parametrize("name", ALL)
def test_noise_goes_to_tokens_that_count_in_order(name):
    lik = ALL[name]
    short = seeds.noise(torch.zeros(1, 3, 4), lik, 7, 0, 0, None)[0]
    mask = torch.tensor([[False, True, True, False, True, False]])
    long = seeds.noise(torch.zeros(1, 6, 4), lik, 7, 0, 0, mask)[0]
    assert torch.equal(long[mask[0]], short)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_noise_does_not_depend_on_the_precision_of_outputs(name):
    lik = LIKELIHOODS[name]
    wide = seeds.noise(torch.zeros(4, 4).double(), lik, 0, 0, 0, None)
    narrow = seeds.noise(torch.zeros(4, 4), lik, 0, 0, 0, None)
    assert_rms(narrow, wide, 1e-7)


def test_labels_come_with_their_probabilities():
    """Classes, counts and signs against their distributions by chi-square, 20 000 each."""
    n = 20_000
    row = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    z = row.expand(n, 4).contiguous()
    lik = LIKELIHOODS["categorical"]
    label = lik.label(z, seeds.noise(z, lik, 0, 0, 0, None))
    expected = n * torch.softmax(row, -1)
    statistic = float(((torch.bincount(label, minlength=4) - expected) ** 2 / expected).sum())
    assert abs(statistic - 3) < 5 * math.sqrt(6)
    lik = LIKELIHOODS["bernoulli"]
    mean = lik.label(z, seeds.noise(z, lik, 0, 0, 0, None)).mean(0)
    p = torch.sigmoid(row)
    assert ((mean - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    lik = LIKELIHOODS["poisson"]
    y = lik.label(z, seeds.noise(z, lik, 0, 0, 0, None))
    assert ((y.mean(0) - row.exp()).abs() < 5 * (row.exp() / n).sqrt()).all()


def test_a_label_is_never_impossible():
    z = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    lik = LIKELIHOODS["categorical"]
    for u in (2.0**-53, 0.25, 0.5, 0.5 + 2.0**-53, 1 - 2.0**-53):
        assert int(lik.label(z, torch.tensor([u]).double())) in (1, 3)
    assert int(lik.label(torch.full((1, 3), math.nan), torch.tensor([0.5]).double())) < 3


def test_blocks_of_many_outputs(monkeypatch):
    z, lik = torch.randn(50, 4).double(), LIKELIHOODS["categorical"]
    noise = seeds.noise(z, lik, 0, 0, 0, None)
    whole = seeds.sampled(z, lik, noise, None)
    monkeypatch.setattr(seeds, "_AT_ONCE", 12)
    assert torch.equal(seeds.sampled(z, lik, noise, None), whole)


def test_no_samples_no_tokens():
    lik = LIKELIHOODS["categorical"]
    for shape in [(0, 4), (0, 3, 4), (3, 0, 4)]:
        z = torch.zeros(shape)
        noise = seeds.noise(z, lik, 0, 0, 0, None)
        assert seeds.sampled(z, lik, noise, None).shape == shape
        labels = torch.zeros(shape[:-1]).long()
        assert seeds.empirical(z, lik, labels, None).shape == shape
        list(seeds.exact(z, lik))

"""Kronecker factors against their dense definition, exact cases and invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_rms, max_relative, relative_rms
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.fisher.factors import KronFactors
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets import seeds
from fisher.dense_factors import MaskedTransformer, dense, mlp

torch.set_num_threads(1)

LIKELIHOODS = ["categorical", "gaussian", "bernoulli", "poisson"]


def assert_same(one: KronFactors, other: KronFactors, tolerance: float = 1e-12) -> None:
    assert list(one) == list(other)
    largest = max(float(f.G.abs().max()) for f in other.values())
    for name in one:
        assert one[name].samples == other[name].samples
        assert one[name].rows == other[name].rows
        assert_rms(one[name].A, other[name].A, tolerance)
        # A symmetry can make G zero in theory (shifts of keys, summed over tokens).
        if float(other[name].G.abs().max()) > 1e-20 * largest:
            assert_rms(one[name].G, other[name].G, tolerance)
        else:
            assert float(one[name].G.abs().max()) < 1e-20 * largest


def tokens(n: int, t: int) -> Tensor:
    return torch.randint(0, 7, (n, t))


# ---------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_factors_of_an_mlp(likelihood):
    model, x = mlp(4, 5, 6, 3), torch.randn(9, 4).double()
    found = dd.kron_factors(model, [x[:4], x[4:]], likelihood=likelihood)
    truth = dense(model, [row[None] for row in x], likelihood)
    assert list(found) == list(truth)
    for name, (a, g) in truth.items():
        assert_rms(found[name].A, a, 1e-13)
        assert_rms(found[name].G, g, 1e-12)


def test_variance_of_a_gaussian():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    one = dd.kron_factors(model, x, likelihood="gaussian")
    four = dd.kron_factors(model, x, likelihood=likelihoods.Gaussian(4.0))
    for name in one:
        assert_rms(four[name].G * 4, one[name].G, 1e-13)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_factors_of_a_sequence_model(likelihood):
    model, ids = MaskedTransformer().double().eval(), tokens(4, 3)
    found = dd.kron_factors(model, {"input_ids": ids}, likelihood=likelihood)
    truth = dense(model, [row[None] for row in ids], likelihood)
    for name, (a, g) in truth.items():
        assert_rms(found[name].A, a, 1e-13)
        assert_rms(found[name].G, g, 1e-11)
    assert_rms(
        found["embed"].A, torch.bincount(ids.flatten(), minlength=7).double() / ids.numel(), 1e-15
    )


def test_exact_block_of_a_norm():
    """G of a norm is the Fisher block of its scale and shift, from per-sample Jacobians."""
    model, ids = MaskedTransformer().double().eval(), tokens(3, 4)
    found = dd.kron_factors(model, {"input_ids": ids})["norm"]
    block = 0
    for row in ids:
        z = model(row[None])[0]
        j = [
            torch.cat([
                g.flatten()
                for g in torch.autograd.grad(v, list(model.norm.parameters()), retain_graph=True)
            ])
            for v in z.flatten()
        ]  # fmt: skip
        p = torch.softmax(z.detach(), -1)
        h = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p])
        jacobian = torch.stack(j)
        block = block + jacobian.mT @ h @ jacobian / len(ids)
    assert_rms(found.G, block, 1e-11)
    assert torch.equal(found.A, torch.ones(1, 1, dtype=torch.float64))


def test_empirical_factors_are_gradients_of_the_loss():
    model, x, y = mlp(4, 5, 3), torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    found = dd.kron_factors(model, [(x[:3], y[:3]), (x[3:], y[3:])], fisher="empirical")
    for name in found:
        layer, g = model.get_submodule(name), []
        for k in range(7):
            held = {}
            stop = layer.register_forward_hook(lambda m, a, z, held=held: held.update(z=z))
            loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
            stop.remove()
            g.append(torch.autograd.grad(loss, held["z"])[0][0])
        g = torch.stack(g)
        assert_rms(found[name].G, g.mT @ g / 7, 1e-12)


def test_empirical_labels_that_are_ignored():
    model, ids = MaskedTransformer().double().eval(), tokens(3, 4)
    labels = torch.randint(0, 3, (3, 4))
    labels[0, 1:] = -100
    found = dd.kron_factors(model, {"input_ids": ids, "labels": labels}, fisher="empirical")
    total = 0
    for k in range(3):
        z = model(ids[k : k + 1])
        g = torch.autograd.grad(F.cross_entropy(z[0], labels[k], reduction="sum"), z)[0][0]
        total = total + g.mT @ g / 3
    assert_rms(found["head"].G, total, 1e-12)


def test_mc_agrees_with_exact_within_its_error():
    """Every entry of G within five standard errors, from the spread over independent seeds."""
    model, x = mlp(3, 4, 3), torch.randn(16, 3).double()
    exact = dd.kron_factors(model, x)
    runs = [dd.kron_factors(model, x, fisher="mc", draws=8, seed=s) for s in range(60)]
    for name in exact:
        g = torch.stack([run[name].G for run in runs])
        error = g.std(0) / math.sqrt(len(runs))
        assert ((g.mean(0) - exact[name].G).abs() < 5 * error).all()
        assert relative_rms(g.mean(0), exact[name].G) < 0.05
        assert torch.equal(runs[0][name].A, exact[name].A)


def test_draws_are_averaged():
    model, x = mlp(3, 4, 3), torch.randn(5, 3).double()
    factors = dd.kron_factors(model, x, fisher="mc", draws=3)
    lik, z = likelihoods.Categorical(), model(x).detach()
    total = 0
    for draw in range(3):
        v = seeds.sampled(z, lik, seeds.noise(z, lik, 0, draw, 0, None), None)
        total = total + v.mT @ v / (3 * 5)
    assert_rms(factors["2"].G, total, 1e-14)


def test_deep_linear_networks_have_exactly_this_fisher():
    """Without nonlinearities the Gaussian's g is constant, so A ⊗ G is the block of F."""
    model = nn.Sequential(*[nn.Linear(i, o, dtype=torch.float64) for i, o in [(4, 5), (5, 3)]])
    x = torch.randn(8, 4).double()
    found = dd.kron_factors(model.eval(), x, likelihood="gaussian")
    for name, layer in model.named_children():
        blocks = 0
        for row in x:
            j = [
                torch.cat([g if g.ndim == 2 else g[:, None] for g in torch.autograd.grad(
                    v, [layer.weight, layer.bias], retain_graph=True)], 1).flatten()
                for v in model(row)
            ]  # fmt: skip
            j = torch.stack(j)
            blocks = blocks + j.mT @ j / len(x)
        a, g, count = found[name]
        assert count == 8
        assert_rms(torch.kron(g, a), blocks, 1e-10)


# ------------------------------------------------------------------------------ low precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_low_precision_activations(dtype):
    """Against fp64 sums of the very activations and gradients that the model has."""
    model = mlp(16, 24, 24, 8, dtype=dtype)
    x = torch.randn(300, 16).to(dtype)
    y = torch.randint(0, 8, (300,))
    a, g = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, i, z, name=name: a.update({name: i[0].detach()}))
            layer.register_forward_hook(
                lambda m, i, z, name=name: z.register_hook(lambda d: g.update({name: d})) and None
            )
    z = model(x)
    seed = seeds.empirical(z, likelihoods.Categorical(), y, None)
    z.backward(seed)
    for layer in model.modules():
        layer._forward_hooks.clear()
    found = dd.kron_factors(model, [(x, y)], fisher="empirical")
    for name in found:
        inputs = torch.cat([a[name].double(), torch.ones(300, 1).double()], 1)
        assert_rms(found[name].A, inputs.mT @ inputs / 300, 1e-6)
        # Scores in bf16 have few values, so their products round alike and errors do not cancel.
        bound = 1e-6 if dtype == torch.float32 else 2e-6
        assert_rms(found[name].G, g[name].double().mT @ g[name].double() / 300, bound)
        assert found[name].A.dtype == torch.float32


def test_no_negative_eigenvalues_from_bf16_inputs():
    """8192 bf16 rows of rank 65 in 512 dimensions: sums in fp32 leave rounding only."""
    left = torch.randint(-2, 3, (8192, 64)).float()
    right = torch.zeros(64, 512)
    right[torch.arange(64), torch.arange(64) * 8] = 1
    x = (left @ right).bfloat16()  # exact in bf16, of rank 64; 65 with the bias
    model = nn.Linear(512, 4).bfloat16().eval()
    A = dd.kron_factors(model, x, fisher="mc")[""].A
    values = torch.linalg.eigvalsh(A.double())
    assert int((values > 1e-6 * values[-1]).sum()) == 65
    assert values[0] > -1e-7 * values[-1]


# -------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_batch_size_does_not_matter(fisher):
    model, ids = MaskedTransformer().double().eval(), tokens(9, 4)
    labels = torch.randint(0, 3, (9, 4))

    def run(cuts):
        items = zip(ids.split(cuts), labels.split(cuts), strict=True)
        batches = [{"input_ids": i, "labels": y} for i, y in items]
        return dd.kron_factors(model, batches, fisher=fisher, draws=2)

    whole = run([9])
    for cuts in ([1, 8], [3, 3, 3], [1] * 9, [5, 0, 4], [0, 9]):
        assert_same(run(cuts), whole)


def test_sample_order_does_not_matter():
    model, x = mlp(4, 5, 3), torch.randn(11, 4).double()
    y, order = torch.randint(0, 3, (11,)), torch.randperm(11)
    assert_same(dd.kron_factors(model, x[order]), dd.kron_factors(model, x))
    assert_same(
        dd.kron_factors(model, [(x[order], y[order])], fisher="empirical"),
        dd.kron_factors(model, [(x, y)], fisher="empirical"),
    )


@pytest.mark.parametrize("kfac", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_padding_does_not_matter(fisher, kfac):
    model = MaskedTransformer().double().eval()
    lengths, ids = [4, 2, 3], tokens(3, 4)
    labels = torch.randint(0, 3, (3, 4))

    def padded(width, left):
        out, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width).long()
        target = torch.full((3, width), -100)
        for k, n in enumerate(lengths):
            some = slice(width - n, width) if left else slice(0, n)
            out[k, some], mask[k, some], target[k, some] = ids[k, :n], 1, labels[k, :n]
        batch = {"input_ids": out, "attention_mask": mask, "labels": target}
        return dd.kron_factors(model, batch, fisher=fisher, kfac=kfac, draws=2)

    batches = [
        {"input_ids": ids[k : k + 1, :n], "labels": labels[k : k + 1, :n]}
        for k, n in enumerate(lengths)
    ]
    alone = dd.kron_factors(model, batches, fisher=fisher, kfac=kfac, draws=2)
    for width, left in [(4, False), (4, True), (9, False), (9, True)]:
        found = padded(width, left)
        assert found.notes == ()
        assert_same(found, alone, 1e-11)


def test_padded_exact_factors_against_the_definition():
    model, ids = MaskedTransformer().double().eval(), tokens(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    found = dd.kron_factors(model, {"input_ids": ids, "attention_mask": mask})
    samples = [
        {"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, mask, strict=True)
    ]
    truth = dense(model, samples, "categorical", [m.bool() for m in mask])
    for name, (a, g) in truth.items():
        assert_rms(found[name].A, a, 1e-13)
        assert_rms(found[name].G, g, 1e-11)


def test_sharing_inputs_changes_nothing():
    model, ids = MaskedTransformer().double().eval(), tokens(4, 3)
    shared = dd.kron_factors(model, {"input_ids": ids})
    alone = dd.kron_factors(model, {"input_ids": ids}, share_inputs=False)
    assert shared["k"].shares_inputs_with == "q" and alone["k"].shares_inputs_with is None
    assert shared["k"].A_sum.data_ptr() == shared["q"].A_sum.data_ptr()
    # q, which leads, has no bias; k and v have one.
    assert shared["q"].A.shape == (6, 6) and shared["k"].A.shape == (7, 7)
    assert_same(shared, alone, 1e-15)
    assert shared.bytes() < alone.bytes()


def test_inputs_that_are_shared_at_first_only():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x if len(x) <= 2 else x.clone())

    model, x = Late().eval(), torch.randn(5, 3).double()
    with pytest.raises(ValueError, match="pass share_inputs=False"):
        dd.kron_factors(model, x)
    alone = dd.kron_factors(model, x, share_inputs=False)
    assert_rms(alone["b"].A, alone["a"].A, 1e-15)


def test_tokens_before_samples():
    """(t, n, d) inside the model, found out although the first batch has a single sample."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.n(self.a(x.transpose(0, 1))))).transpose(0, 1)

    model, x = Turned().double().eval(), torch.randn(7, 4, 3).double()
    whole = dd.kron_factors(model, x)
    assert_same(dd.kron_factors(model, [x[:1], x[1:]]), whole)
    assert_same(dd.kron_factors(model, [x[:1], x[1:2], x[2:]]), whole)
    for name, (a, g) in dense(model, [row[None] for row in x], "categorical").items():
        assert_rms(whole[name].A, a, 1e-13)
        assert_rms(whole[name].G, g, 1e-11)


def test_generators_are_consumed_once():
    model, x = mlp(4, 5, 3), torch.randn(9, 4).double()
    taken = []

    def stream():
        for part in x.split(2):
            taken.append(len(part))
            yield part

    assert_same(dd.kron_factors(model, stream()), dd.kron_factors(model, x))
    assert taken == [2, 2, 2, 2, 1]


def test_reduce_averages_inputs_and_sums_gradients():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(5, 6, 3).double()
    found = dd.kron_factors(model, x, likelihood="gaussian", kfac="reduce")
    mean = torch.cat([x.mean(1), torch.ones(5, 1).double()], 1)
    assert_rms(found["0"].A, mean.mT @ mean / 5, 1e-13)
    # One seed for each output of each token; the last layer's g is the seed itself.
    assert_rms(found["2"].G, torch.eye(2).double() * 6, 1e-13)


def test_a_weight_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    model, x = Twice().eval(), torch.randn(6, 3).double()
    found = dd.kron_factors(model, x, likelihood="gaussian")["a"]
    h = torch.tanh(model.a(x)).detach()
    rows = torch.cat([torch.cat([x, h]), torch.ones(12, 1).double()], 1)
    assert found.rows == 12
    assert_rms(found.A, rows.mT @ rows / 12, 1e-13)
    first = (1 - h.square()).unsqueeze(-1) * model.a.weight.detach().mT
    assert_rms(found.G, torch.eye(3).double() + (first @ first.mT).mean(0), 1e-12)


def test_a_large_head_has_a_diagonal():
    model, x = mlp(4, 5, 9), torch.randn(6, 4).double()
    for fisher in ("exact", "mc"):
        found = dd.kron_factors(model, x, fisher=fisher, largest_head=8)["2"]
        p = torch.softmax(model(x).detach(), -1)
        assert found.output_form == "diagonal"
        assert_rms(found.G, (p * (1 - p)).mean(0), 1e-14)


def test_the_diagonal_of_a_saturated_head_keeps_its_digits():
    model = nn.Linear(1, 4).eval()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 40.0, 1.0, -3.0]))
    found = dd.kron_factors(model, torch.randn(5, 1), fisher="mc", largest_head=3)[""]
    p = torch.softmax(model.bias.detach().double(), -1)
    others = torch.stack([torch.cat([p[:k], p[k + 1 :]]).sum() for k in range(4)])
    assert max_relative(found.G, p * others) < 1e-5


def test_layers_that_are_asked_for():
    model, x = mlp(4, 5, 6, 3), torch.randn(9, 4).double()
    whole = dd.kron_factors(model, x)
    some = dd.kron_factors(model, x, layers=["2", "4"])
    assert list(some) == ["2", "4"]
    for name in some:
        assert torch.equal(some[name].G, whole[name].G)


def test_user_defined_likelihoods_have_generators_of_their_own():
    class Laplace(likelihoods.Gaussian):
        def noise(self, z, generator=None):
            return torch.randn(z.shape, dtype=z.dtype, generator=generator)

    model, x = mlp(3, 4, 2), torch.randn(6, 3).double()
    whole = dd.kron_factors(model, x, likelihood=Laplace(), fisher="mc")
    cut = dd.kron_factors(model, x.split(2), likelihood=Laplace(), fisher="mc")
    assert_same(cut, whole)
    built_in = dd.kron_factors(model, x, likelihood="gaussian", fisher="mc")
    assert relative_rms(whole["2"].G, built_in["2"].G) > 1e-3


# ------------------------------------------------------------------------------ hard inputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_noted(bad):
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    x[2, 1] = bad
    notes = dd.kron_factors(model, x, fisher="mc").notes
    assert "0: its inputs are not all finite" in notes
    if bad != bad:
        assert "2: its gradients are not all finite" in notes
    assert dd.kron_factors(model, torch.randn(6, 4).double(), fisher="mc").notes == ()


def test_overflow_of_a_sum_is_noted():
    model = nn.Linear(2, 2).eval()
    notes = dd.kron_factors(model, torch.full((3, 2), 1e20), fisher="mc").notes
    assert ": its inputs are not all finite" in notes


def test_nan_in_padding_is_not_counted():
    model = nn.Linear(2, 3).double().eval()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    x, mask = torch.randn(3, 4, 2).double(), torch.ones(3, 4).long()
    mask[:, 2:] = 0
    clean = dd.kron_factors(Masked().eval(), {"x": x, "attention_mask": mask}, fisher="mc")
    x[:, 2:] = float("nan")
    dirty = dd.kron_factors(Masked().eval(), {"x": x, "attention_mask": mask}, fisher="mc")
    assert dirty.notes == ()
    assert_same(dirty, clean, 0)


def test_outputs_that_do_not_match_the_mask_are_noted():
    class Longer(MaskedTransformer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            z = super().forward(input_ids, attention_mask)
            return torch.cat([z, z[:, :1]], 1)

    ids, mask = tokens(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    model = Longer().double().eval()
    found = dd.kron_factors(model, {"input_ids": ids, "attention_mask": mask}, fisher="mc")
    assert found.notes == ("the outputs do not match the mask; those of padding are counted",)
    with pytest.raises(ValueError, match="batches: expected an attention_mask of ones and zeros"):
        dd.kron_factors(model, {"input_ids": ids, "attention_mask": (mask - 1) * 1e9})


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_layers_and_batches():
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)).double().eval()
    found = dd.kron_factors(model, [torch.randn(0, 3).double(), torch.randn(2, 3).double()])
    assert found["0"].G.shape == (0, 0) and found["1"].A.shape == (1, 1)
    assert float(found["1"].A) == 1.0
    with pytest.raises(ValueError, match="batches: expected at least one sample"):
        dd.kron_factors(model, [torch.randn(0, 3).double()])
    with pytest.raises(ValueError, match="batches: expected at least one sample"):
        dd.kron_factors(model, [])


def test_model_is_left_as_it_was():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(5).double()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    class Config:
        use_cache = True

    model.config = Config()

    def untouched():
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.config.use_cache is True
        assert torch.equal(model[0].bias.grad, torch.ones(5).double())
        assert model[2].weight.grad is None

    dd.kron_factors(model, x)
    untouched()

    def broken():
        yield x
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        dd.kron_factors(model, broken())
    untouched()
    with pytest.raises(RuntimeError, match="shape"):
        dd.kron_factors(model, [x, torch.randn(6, 7).double()])
    untouched()
    with torch.no_grad():
        assert_same(dd.kron_factors(model, x), dd.kron_factors(model, x), 0)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(("change", "match"), [
    ({"fisher": "type2"}, "fisher: expected one of"),
    ({"likelihood": "cauchy"}, "likelihood: expected one of"),
    ({"kfac": "conv"}, "kfac: expected one of"),
    ({"draws": 0}, "draws: expected an integer >= 1"),
    ({"seed": -1}, "seed: expected an integer >= 0"),
    ({"dtype": torch.bfloat16}, "dtype: expected"),
    ({"largest_head": -1}, "largest_head: expected"),
    ({"most_passes": 1}, "fisher: 'exact' takes 2 backward passes"),
    ({"layers": ["nowhere"]}, "layers: no layer matches 'nowhere'"),
    ({"layers": "0"}, "layers: expected a sequence"),
    ({"fisher": "empirical"}, "batches: the empirical Fisher needs pairs"),
])  # fmt: skip
def test_errors_name_the_argument(change, match):
    with pytest.raises((ValueError, TypeError), match=match):
        dd.kron_factors(mlp(4, 5, 3), [torch.randn(6, 4).double()], **change)


def test_errors_of_models_and_batches():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        dd.kron_factors(lambda x: x, x)
    with pytest.raises(TypeError, match="batches: expected an iterable"):
        dd.kron_factors(model, 3)
    with pytest.raises(ValueError, match="model: expected a deterministic"):
        dd.kron_factors(nn.Sequential(model, nn.Dropout(0.5)).train(), x)
    with pytest.raises(ValueError, match="model: none of its modules"):
        dd.kron_factors(nn.ReLU(), x)
    with pytest.raises(ValueError, match="at least two classes"):
        dd.kron_factors(mlp(4, 1), x)
    with pytest.raises(ValueError, match=r"targets: expected shape \(6,\)"):
        dd.kron_factors(model, [(x, torch.zeros(5).long())], fisher="empirical")
    with pytest.raises(ValueError, match=r"targets: expected class indices in 0\.\.2"):
        dd.kron_factors(model, [(x, torch.full((6,), 3))], fisher="empirical")
    with pytest.raises(TypeError, match="targets: expected integer class indices"):
        dd.kron_factors(model, [(x, torch.zeros(6))], fisher="empirical")


def test_a_module_that_computes_something_else():
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    model = nn.Sequential(Odd(4, 5), nn.Linear(5, 3)).double().eval()
    with pytest.warns(UserWarning, match="not the linear map of its input"):
        found = dd.kron_factors(model, torch.randn(6, 4).double())
    assert list(found) == ["1"]
    with pytest.raises(ValueError, match="model: no layer stands for"):
        dd.kron_factors(model, torch.randn(6, 4).double(), strict=True)

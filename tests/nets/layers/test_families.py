"""Linear maps, embeddings and norms: scores, layouts, ties and what is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_scores import check_model, stream_scores, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deaddir_fast as dd
from deaddir_fast.nets import seeds
from deaddir_fast.nets.likelihood import Categorical
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Conv1D(nn.Module):
    """GPT-2's linear map with a transposed weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(
            *x.shape[:-1], self.nf
        )


class ZeroRMSNorm(nn.Module):
    """Gemma's: multiplies by 1 + γ."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class LlamaRMSNorm(ZeroRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class SquareRMSNorm(ZeroRMSNorm):
    """Not affine in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * x


class Centred(nn.LayerNorm):
    """A LayerNorm of channels in dimension 1, as ConvNeXt has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, d: int) -> None:
        super().__init__(d)
        nn.init.normal_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2)


ROWS = {
    "linear": lambda: nn.Linear(6, 6),
    "linear, no bias": lambda: nn.Linear(6, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm, no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm of two": lambda: nn.LayerNorm((5, 6)),
    "rms norm": lambda: nn.RMSNorm(6),
    "rms norm of two": lambda: nn.RMSNorm((5, 6)),
    "llama": lambda: LlamaRMSNorm(6),
    "gemma": lambda: ZeroRMSNorm(6),
}
CHANNELS = {
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance-like": lambda: nn.GroupNorm(4, 4),
    "batch norm": lambda: BatchNorm(4),
}


def randomised(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p, std=0.6)
    return model.double().eval()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(ROWS[name](), nn.ReLU(inplace=True), nn.Linear(6, 3))
    check_model(randomised(model), randn(3, 5, 6), seed=seed)


@pytest.mark.parametrize("name", CHANNELS)
def test_channels(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(CHANNELS[name](), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(60, 3))
    check_model(randomised(model), randn(4, 4, 5, 3))


def test_one_dimensional_batch_norm() -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(6)
    model = randomised(nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 3)))
    nn.init.normal_(norm.running_mean)
    check_model(model, randn(4, 5))


@pytest.mark.parametrize(("norm", "why"), [(SquareRMSNorm(6), "not"), (Centred(6), "not")])
def test_norms_that_are_not_what_they_look_like(norm: nn.Module, why: str) -> None:
    model = randomised(nn.Sequential(norm, nn.Linear(6, 6)))
    with pytest.warns(UserWarning, match=r"0 \((\w+Norm|Centred)\): it"):
        survey(model, randn(2, 6, 6))


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding: int | None) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 3))
    ids = torch.tensor([[0, 2, 2, 6], [1, 2, 3, 3], [5, 5, 5, 5]])
    found = check_model(randomised(model), ids)
    assert found.tokens["0"] == 4
    f = dd.kron_factors(model, ids)["0"]
    counts = torch.bincount(ids.reshape(-1), minlength=7).double() / 12
    if padding is not None:
        counts[padding] = 0
    torch.testing.assert_close(f.A, counts)


class Scaled(nn.Embedding):
    """Gemma's: a constant times the rows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def test_scaled_embedding() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(Scaled(7, 4, padding_idx=1), nn.Linear(4, 3))
    check_model(randomised(model), torch.tensor([[0, 2, 1, 6], [1, 2, 3, 3]]))


class Predictions(nn.Module):
    """BERT's: the bias of the decoder is held by the module around it too."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5))
        self.decoder = nn.Linear(4, 5)
        self.decoder.bias, self.also = self.bias, also

    def forward(self, x: Tensor) -> Tensor:
        z = self.decoder(x)
        return z + self.bias if self.also else z


def test_a_bias_that_two_modules_hold() -> None:
    torch.manual_seed(2)
    check_model(randomised(Predictions(False)), randn(3, 6, 4))
    with pytest.raises(ValueError, match="its bias is also used outside of it, by add"):
        survey(randomised(Predictions(True)), randn(3, 6, 4), strict=True)


class Positions(nn.Module):
    """Token and position embeddings, laid out in one of several ways."""

    def __init__(self, how: str, t: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 6), nn.Embedding(t, 6)
        self.norm, self.middle, self.out = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.how = how

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        place = torch.arange(t)
        if self.how == "time first":
            h = self.token(input_ids.T) + self.norm(self.place(place[:, None]))
            return self.out(torch.tanh(self.middle(h))).transpose(0, 1)
        if self.how == "flat":
            h = self.token(input_ids) + self.norm(self.place(place))
            h = torch.tanh(self.middle(h.flatten(0, 1)))
            return self.out(h).view(*input_ids.shape, 3)
        if self.how == "flat, time first":
            h = self.token(input_ids.T) + self.place(place)[:, None]
            h = self.norm(torch.tanh(self.middle(h.flatten(0, 1))))
            return self.out(h.view(t, -1, 6).transpose(0, 1))
        place = place[None] if self.how == "leading one" else place
        return self.out(
            torch.tanh(self.middle(self.token(input_ids) + self.norm(self.place(place))))
        )


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("how", ["plain", "leading one", "time first", "flat"])
def test_layouts(how: str, n: int) -> None:
    """Also where the number of samples is that of tokens."""
    torch.manual_seed(3)
    ids = torch.randint(0, 11, (n, 4))
    found = check_model(randomised(Positions(how)), ids, seed=n)
    layouts = {name: layer.layout for name, layer in found.layers.items()}
    main = {"time first": "second"}.get(how, "samples")
    # What comes after a layer that is given to each sample has rows for each.
    assert layouts["token"] == layouts["norm"] == main and layouts["place"] == "shared"
    assert layouts["middle"] == ("flat" if how == "flat" else main)
    assert found.tokens == dict.fromkeys(found.tokens, 4) | {"norm": 1}


def test_rows_in_an_unknown_order() -> None:
    """Time first, then flattened: expand needs no order, a norm does."""
    torch.manual_seed(4)
    model = randomised(Positions("flat, time first"))
    ids = torch.randint(0, 11, (3, 4))
    with pytest.warns(UserWarning, match=r"norm \(LayerNorm\): which rows of it belong to which"):
        found = survey(model, ids)
    assert found.layers["middle"].layout == "unknown"
    with pytest.warns(UserWarning):
        f = dd.kron_factors(model, ids)["middle"]
    h = (model.token(ids) + model.place(torch.arange(4))).detach().flatten(0, 1)
    h = torch.cat([h, h.new_ones(12, 1)], 1)
    torch.testing.assert_close(f.A, h.T @ h / 12, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="kfac: 'reduce' needs rows"):
        dd.kron_factors(model, ids, kfac="reduce")


def test_shared_rows_that_cannot_be_given_to_each_sample() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.out = nn.Embedding(5, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.key(torch.arange(5)).mT @ self.key(torch.arange(5)) / 5)

    class Square(Table):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ torch.linalg.qr(self.key(torch.arange(5)).view(5, 6)).R)

    torch.manual_seed(5)
    check_model(randomised(Table()), randn(3, 4, 6))
    with pytest.warns(UserWarning, match=r"key \(Embedding\): it has one row for all samples"):
        survey(randomised(Square()), randn(3, 4, 5))


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.middle, self.how = nn.Linear(5, 5), how
        if how == "parameter":
            self.head.weight = self.embed.weight
        if how in ("functional", "product"):
            del self.head

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.embed(ids)))
        if self.how == "functional":
            return F.linear(h, self.embed.weight)
        if self.how == "product":
            return h @ self.embed.weight.T
        return self.head(h)


def test_tied_weights() -> None:
    """Scores of both uses add up to that of the one weight."""
    torch.manual_seed(6)
    found = check_model(randomised(Tied("parameter")), torch.randint(0, 9, (3, 4)))
    assert found.tied == {"head": "embed"} and found.head == "head"


@pytest.mark.parametrize("how", ["functional", "product"])
def test_a_weight_that_is_used_outside_its_module(how: str) -> None:
    torch.manual_seed(6)
    match = r"embed \(Embedding\): its embed\.weight is also used outside of it, by"
    with pytest.raises(ValueError, match=match):
        survey(randomised(Tied(how)), torch.randint(0, 9, (3, 4)), strict=True)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.alias = self.again

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.again(x)
        for _ in range(2):
            h = self.norm(torch.tanh(self.alias(h)))
        return h


def test_a_module_used_several_times() -> None:
    torch.manual_seed(7)
    model = randomised(Twice())
    x = randn(3, 5, 4)
    found = check_model(model, x)
    assert found.calls == {"first": 1, "again": 3, "norm": 2}
    # It received the same tensor as another layer, but others too: their A differ.
    f = dd.kron_factors(model, x, likelihood="gaussian")
    a = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    torch.testing.assert_close(f["first"].A, a.T @ a / 15, rtol=1e-12, atol=1e-12)
    assert f["first"].rows == 15 and f["again"].rows == 45


def test_the_first_of_two_that_share_is_used_again() -> None:
    class Leader(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.again(x) + self.first(x)))

    torch.manual_seed(8)
    model, x = randomised(Leader()), randn(3, 5, 4)
    model.norm = nn.Identity()
    f = dd.kron_factors(model, x, likelihood="gaussian")
    a = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    torch.testing.assert_close(f["first"].A, a.T @ a / 15, rtol=1e-12, atol=1e-12)


class Lora(nn.Module):
    """As peft does it: the base map and two small ones."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(i, o)
        self.lora_A, self.lora_B = nn.Linear(i, 2, bias=False), nn.Linear(2, o, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


def test_lora() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(Lora(5, 4), nn.ReLU(inplace=True), Lora(4, 3))
    found = check_model(randomised(model), randn(3, 6, 5))
    assert found.leaders == {"0.lora_A": "0.base_layer", "2.lora_A": "2.base_layer"}


def test_lora_inside_a_subclass_of_linear() -> None:
    """Before training B is 0 and the output that of the base map, but A and B have scores."""

    class Lora(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.lora_A = nn.Parameter(torch.randn(2, i))
            self.lora_B = nn.Parameter(torch.zeros(o, 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T

    model = nn.Sequential(Lora(5, 4), nn.Linear(4, 3)).double().eval()
    with pytest.raises(ValueError, match=r"0\.lora_A, lora_B \(Lora\): beside the parameters"):
        survey(model, randn(2, 5), strict=True)
    nn.init.normal_(model[0].lora_B)
    with pytest.warns(UserWarning, match="its output is not the linear map of its input"):
        survey(model, randn(2, 5))


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(9)
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config).double().eval()
    check_model(model, randn(3, 6, 5))


UNKNOWN: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "rnn": (lambda: nn.GRU(4, 4, batch_first=True), (2, 3, 4), "recurrent module"),
    "lstm": (lambda: nn.LSTM(4, 4, batch_first=True), (2, 3, 4), "recurrent module"),
    "prelu": (lambda: nn.PReLU(4), (2, 4), "no rule for this type"),
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), (), "max_norm"),
    "statistics": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False), (2, 4), "running statistics"
    ),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), (2, 4), "no layer"),
}  # fmt: skip


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        return self.out(z[0] if isinstance(z, tuple) else z)


@pytest.mark.parametrize("name", UNKNOWN)
def test_strict_names_what_is_unknown(name: str) -> None:
    build, shape, why = UNKNOWN[name]
    model = First(build()).double().eval()
    x = randn(*shape) if shape else torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=rf"^model: .*inner.*{why}|^model: no layer.*inner"):
        survey(model, x, strict=True)
    with pytest.warns(UserWarning, match="inner"):
        found = survey(model, x)
    assert set(found.layers) == {"out"} and found.skipped


def test_a_module_that_is_never_called() -> None:
    """Its weight is used, its hooks are not."""

    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b.forward(self.a(x))

    with pytest.raises(ValueError, match=r"b \(Linear\): its b\.\w+ is also used outside"):
        survey(Bypass().double().eval(), randn(2, 4), strict=True)


def test_restored_after_an_error() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.fail = nn.Linear(4, 4), LlamaRMSNorm(4), False
            self.b = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.a(x))
            if self.fail:
                raise KeyError("inside")
            return self.b(z)

    model = Fails().double().eval()
    x = randn(3, 4)
    found = survey(model, x)
    model.fail = True
    with unchanged(model):
        with pytest.raises(KeyError), Streams(model, found, on_gradient=lambda *_: None) as s:
            s.forward(x, 3)
        with pytest.raises(KeyError):
            survey(model, x)
        with pytest.raises(KeyError):
            dd.kron_factors(model, x)


@pytest.mark.parametrize("seed", range(2))
def test_curvature_of_directions(seed: int) -> None:
    """Mean over samples of Σ_v <score, u>², v the columns of a root of H, is uᵀ F u."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(2),
        nn.Linear(9, 6), nn.LayerNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    model = randomised(model)
    x = randn(5, 2, 5, 5)
    z = model(x).detach()
    columns = list(seeds.exact(z, Categorical()))
    found = survey(model, x, strict=True)
    scores = stream_scores(model, found, x, columns)
    u = {k: torch.randn(3, *p.shape, dtype=p.dtype) for k, p in model.named_parameters()}
    moved = torch.zeros(3, len(columns), 5, dtype=torch.float64)
    for name, layer in found.layers.items():
        d = layer.directions(u)
        assert d is not None
        for k, some in enumerate(scores):
            moved[:, k] += d.flatten(1) @ some[name].flatten(1).T
    for j in range(3):
        tangent = {k: v[j] for k, v in u.items()}
        values = {k: p.detach() for k, p in model.named_parameters()}
        _, dz = torch.func.jvp(
            lambda p: torch.func.functional_call(model, p, (x,)), (values,), (tangent,)
        )
        p = z.softmax(-1)
        exact = ((p * dz.square()).sum(-1) - (p * dz).sum(-1).square()).mean()
        got = moved[j].square().sum(0).mean()
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("how", ["plain", "time first", "flat"])
@pytest.mark.parametrize("kfac", ["expand", "reduce"])
def test_batches_that_begin_with_one_sample(how: str, kfac: str) -> None:
    """One sample does not tell layouts; the next batch does."""
    torch.manual_seed(10)
    model = randomised(Positions(how))
    ids = torch.randint(0, 11, (5, 4))
    once = dd.kron_factors(model, ids, kfac=kfac)
    parts = dd.kron_factors(model, [ids[:1], ids[1:4], ids[4:]], kfac=kfac)
    assert set(once) == set(parts) and len(once) == 5
    for name in once:
        torch.testing.assert_close(parts[name].A, once[name].A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts[name].G, once[name].G, rtol=1e-11, atol=1e-12)


def test_one_sample_did_not_tell_that_a_norm_mixes_them() -> None:
    torch.manual_seed(10)
    model = randomised(Positions("flat, time first"))
    ids = torch.randint(0, 11, (4, 4))
    with pytest.raises(
        ValueError, match=r"batches: with one sample in the first batch (norm|place) seemed"
    ):
        dd.kron_factors(model, [ids[:1], ids[1:]])

"""Convolutions: windows, scores against dense autograd, bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_scores import check_model
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.nets.layers import conv as module
from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)

VARIANTS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same"},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "same dilated": {"dilation": 2, "padding": "same"},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 3},
    "circular": {"padding": 1, "padding_mode": "circular", "dilation": 2},
    "pointwise": {"kernel_size": 1},
    "pointwise groups": {"kernel_size": 1, "groups": 2},
    "pointwise padded": {"kernel_size": 1, "padding": 1},
    "pointwise stride": {"kernel_size": 1, "stride": 2},
    "even same": {"kernel_size": 2, "padding": "same"},
    "no bias": {"bias": False},
}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EXTENTS = {1: (9,), 2: (7, 6), 3: (5, 6, 5)}


class Head(nn.Module):
    """A convolution, an activation in place, and a linear map of the means."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv, self.act = conv, nn.ReLU(inplace=True)
        self.out = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.conv(x))
        w = torch.linspace(0.5, 1.5, z[0, 0].numel(), dtype=z.dtype)
        return self.out((z.flatten(2) * w).sum(-1))


def build(dims: int, **options: Any) -> Head:
    given: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    return Head(CONVS[dims](**given), given["out_channels"]).double().eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores(dims: int, variant: str) -> None:
    torch.manual_seed(dims)
    model = build(dims, **VARIANTS[variant])
    x = torch.randn(4, 4, *EXTENTS[dims], dtype=torch.float64)
    found = check_model(model, x, seed=dims)
    layer = found.layers["conv"]
    assert layer.parameters == sum(p.numel() for p in model.conv.parameters())
    assert found.tokens["conv"] == layer.rows(x, 4).shape[1] == model.conv(x)[0, 0].numel()


def test_uneven_kernel() -> None:
    torch.manual_seed(1)
    model = build(2, kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
    check_model(model, torch.randn(3, 4, 7, 6, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 700, 5000, 1 << 26])
def test_pieces_are_the_rows_in_order(
    dims: int, budget: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded pieces, also where one sample is above the bound."""
    model = build(dims, groups=groups, padding=1)
    x = torch.randn(3, 4, *EXTENTS[dims], dtype=torch.float64)
    layer = survey(model, x).layers["conv"]
    rows = layer.rows(x, 3)
    monkeypatch.setattr(module, "WINDOW_BYTES", budget)
    pieces = list(layer.pieces(x, 3))
    assert all(p.numel() * 8 <= max(budget, rows[0, 0].numel() * 8) for p, _ in pieces)
    flat = torch.cat([p.flatten(0, 1) for p, _ in pieces])
    assert torch.equal(flat, rows.flatten(0, 1))
    if budget == 5000:
        assert len(pieces) > 3 or dims == 1


def unfolded(x: Tensor, groups: int) -> Tensor:
    """(n, t, groups, i) by torch's own im2col."""
    u = F.unfold(x, 3, padding=1).mT
    return u.unflatten(-1, (groups, -1))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kfac", ["expand", "reduce"])
@pytest.mark.parametrize("budget", [2000, 1 << 26])
def test_factors(groups: int, kfac: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A and G against their definitions, for each group."""
    monkeypatch.setattr(module, "WINDOW_BYTES", budget)
    torch.manual_seed(2)
    model = build(2, groups=groups, padding=1, out_channels=8)
    x = torch.randn(5, 4, 4, 3, dtype=torch.float64)
    f = dd.kron_factors(model, [x[:2], x[2:]], likelihood="gaussian", kfac=kfac)["conv"]
    a = unfolded(x, groups)
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    z = model.conv(x)
    w = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    slope = (z > 0).double().flatten(2) * w  # (n, o, t)
    g = torch.einsum("co,not->cnto", model.out.weight, slope).unflatten(-1, (groups, -1))
    if kfac == "expand":
        A = torch.einsum("ntki,ntkj->kij", a, a) / (5 * 12)
        G = torch.einsum("cntko,cntkp->kop", g, g) / 5
    else:
        A = torch.einsum("nki,nkj->kij", a.mean(1), a.mean(1)) / 5
        G = torch.einsum("cnko,cnkp->kop", g.sum(2), g.sum(2)) / 5
    if groups == 1:
        A, G = A[0], G[0]
    torch.testing.assert_close(f.A, A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f.G, G.detach(), rtol=1e-12, atol=1e-12)


def test_depthwise_with_many_groups() -> None:
    """Hundreds of groups in one batched sum."""
    torch.manual_seed(3)
    groups = 300
    conv = nn.Conv2d(groups, groups, 3, groups=groups, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(groups * 16, 2)).double().eval()
    x = torch.randn(9, groups, 4, 4, dtype=torch.float64)
    f = dd.kron_factors(model, x, likelihood="gaussian")["0"]
    assert f.A.shape == (groups, 10, 10) and f.G.shape == (groups, 1, 1)
    a = unfolded(x, groups)[:, :, 7]
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1).flatten(0, 1)
    torch.testing.assert_close(f.A[7], a.T @ a / len(a), rtol=1e-12, atol=1e-12)


def test_exact_with_one_position() -> None:
    """A deep linear network of convolutions that see all of their input: K-FAC is exact."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    model = model.double().eval()
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    factors = dd.kron_factors(model, x, likelihood="gaussian")
    for name, f in factors.items():
        own = dict(model.named_parameters())
        weight, bias = own[f.weight], own[f.bias]
        z = model(x)
        rows = []
        for k in range(6):
            for c in range(3):
                grads = torch.autograd.grad(z[k, c], (weight, bias), retain_graph=True)
                rows.append(torch.cat([grads[0].flatten(1), grads[1][:, None]], 1).flatten())
        s = torch.stack(rows)
        exact = s.T @ s / 6
        torch.testing.assert_close(torch.kron(f.G, f.A), exact, rtol=0, atol=1e-10, msg=name)


def test_unbatched_channels_do_not_pass_for_samples() -> None:
    """Frames that are flattened into the samples' dimension."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).square().mean((1, 3, 4))

    torch.manual_seed(5)
    x = torch.randn(3, 4, 2, 5, 5, dtype=torch.float64)
    found = check_model(Frames().double().eval(), x)
    assert found.layers["conv"].layout == "flat" and found.tokens["conv"] == 4 * 9


def test_transposed_convolution_is_named() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Flatten(), nn.Linear(75, 2)).double()
    with pytest.warns(UserWarning, match=r"0 \(ConvTranspose2d\): the outputs of a transposed"):
        survey(model.eval(), torch.randn(2, 2, 3, 3, dtype=torch.float64))


def test_mask_of_tokens_reaches_a_convolution_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the windows are cut."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.conv = nn.Conv1d(4, 5, 3, padding=1)
            self.out = nn.Linear(5, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.embed(input_ids) * attention_mask[..., None]
            return self.out(torch.tanh(self.conv(h.mT)).mT)

    torch.manual_seed(6)
    model = Text().double().eval()
    ids = torch.randint(0, 11, (4, 6))
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    h = model.embed(ids).detach() * mask[..., None]
    a = F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2)[mask]
    a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    for budget in (1, 1000, 1 << 26):
        monkeypatch.setattr(module, "WINDOW_BYTES", budget)
        f = dd.kron_factors(model, [batch])
        assert f["conv"].rows == 14 and f.notes == ()
        torch.testing.assert_close(f["conv"].A, a.T @ a / 14, rtol=1e-12, atol=1e-12)

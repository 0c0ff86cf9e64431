"""nn.MultiheadAttention and the Transformer around it: same outputs, exact scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_scores import check_model, unchanged
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 5},
    "separate, no bias": {"kdim": 6, "vdim": 5, "bias": False},
    "time first": {"batch_first": False},
    "time first, bias_kv": {"batch_first": False, "add_bias_kv": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "per head": {"average_attn_weights": False},
    "fused": {"need_weights": False},
    "masked": {"attn_mask": "bool"},
    "masked fused": {"attn_mask": "bool", "need_weights": False},
    "float mask": {"attn_mask": "float", "need_weights": False},
    "head mask": {"attn_mask": "heads"},
    "padding": {"key_padding_mask": True},
    "padding fused": {"key_padding_mask": True, "need_weights": False},
    "all masks": {"key_padding_mask": True, "attn_mask": "bool"},
    "causal": {"attn_mask": "causal", "is_causal": True, "need_weights": False},
    "causal weights": {"attn_mask": "causal", "is_causal": True},
}


def lengths(x: Tensor) -> Tensor:
    """(n,) 0 or 1, a function of each sample."""
    return (x[:, 0, 0] > 0).long()


class Model(nn.Module):
    """(n, t, 8) -> (n, t, 3) through one attention; weights enter the output too."""

    def __init__(self, call: dict[str, Any], cross: bool, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.cross, self.call = cross, call
        self.out = nn.Linear(8, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        call = dict(self.call)
        query = key = value = x
        if self.cross or self.attend.kdim != 8:
            key = torch.cat([x, x.flip(1).sin()], 1)[..., : self.attend.kdim]
            value = key.cos()[..., : self.attend.vdim]
        s = key.shape[1]
        if "attn_mask" in call:
            seen = torch.arange(t)[:, None] % 3 != torch.arange(s) % 3
            call["attn_mask"] = {
                "bool": seen.logical_not(),
                "float": seen.to(x.dtype),
                "heads": (lengths(x).repeat_interleave(2)[:, None, None] + seen.long()) == 1,
                "causal": torch.ones(t, s, dtype=torch.bool).triu(1),
            }[call["attn_mask"]]
        if "key_padding_mask" in call:
            call["key_padding_mask"] = torch.arange(s) >= s - lengths(x)[:, None]
        if not self.attend.batch_first:
            same = key is query
            query = query.transpose(0, 1)
            key, value = (query,) * 2 if same else (key.transpose(0, 1), value.transpose(0, 1))
        z, weights = self.attend(query, key, value, **call)
        z = z if self.attend.batch_first else z.transpose(0, 1)
        if weights is not None:
            z = z + weights.reshape(n, -1, weights.shape[-1]).square().sum((1, 2))[:, None, None]
        return self.out(z)


def extra(model: nn.Module) -> tuple[str, ...]:
    return tuple(k for k, _ in model.named_parameters() if "bias_k" in k or "bias_v" in k)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores(variant: str, call: str, cross: bool) -> None:
    torch.manual_seed(0)
    model = Model(CALLS[call], cross, **VARIANTS[variant]).double().eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = check_model(model, x, missing=extra(model))
    assert {"attend.q", "attend.k", "attend.v", "attend.out_proj"} <= set(found.layers)
    if not cross and "separate" not in variant:
        assert found.leaders == {"attend.k": "attend.q", "attend.v": "attend.q"}


def test_bias_kv_is_named() -> None:
    model = Model({}, False, add_bias_kv=True).double().eval()
    with pytest.raises(ValueError, match=r"attend\.bias_k, bias_v"):
        survey(model, torch.randn(2, 3, 8, dtype=torch.float64), strict=True)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool, norm_first: bool, padded: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2)
        self.batch_first, self.padded = batch_first, padded
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.padded:
            mask = torch.arange(x.shape[1]) >= x.shape[1] - lengths(x)[:, None]
        h = x if self.batch_first else x.transpose(0, 1)
        h = self.stack(h, src_key_padding_mask=mask)
        h = h if self.batch_first else h.transpose(0, 1)
        return self.out(h[:, 0])


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_transformer_encoder(batch_first: bool, norm_first: bool, padded: bool) -> None:
    """Its fused path calls no submodule; it must not be taken while layers are tapped."""
    torch.manual_seed(1)
    model = Encoder(batch_first, norm_first, padded).double().eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = check_model(model, x)
    assert len(found.layers) == 2 * (4 + 2 + 2) + 1
    assert all(found.calls[name] == 1 for name in found.layers)
    # Also where no attention is tapped.
    whole = dd.kron_factors(model, x, likelihood="gaussian")
    some = dd.kron_factors(model, x, likelihood="gaussian", layers=["*.0.linear1", "out"])
    assert set(some) == {"stack.layers.0.linear1", "out"}
    for name, f in some.items():
        torch.testing.assert_close(f.G, whole[name].G, rtol=1e-12, atol=1e-14)


def test_transformer_decoder() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x.flip(1).sin(), tgt_is_causal=False)

    torch.manual_seed(2)
    check_model(Decoder().double().eval(), torch.randn(3, 4, 8, dtype=torch.float64))


def test_factors_of_self_attention() -> None:
    """A is one matrix for q, k and v; G has the size of each."""
    torch.manual_seed(3)
    model = Model({}, False).double().eval()
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    f = dd.kron_factors(model, [x[:3], x[3:]], likelihood="gaussian")
    a = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    for letter in "qkv":
        torch.testing.assert_close(f[f"attend.{letter}"].A, a.T @ a / 20, rtol=1e-12, atol=1e-12)
        assert f[f"attend.{letter}"].G.shape == (8, 8)
    assert f["attend.v"].shares_inputs_with == "attend.q"


def test_forward_of_another_kind_is_refused() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            z, weights = super().forward(*args, **kwargs)
            return 2 * z, weights

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Mine(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x)[0]

    with pytest.warns(UserWarning, match="its forward is not that of nn.MultiheadAttention"):
        survey(Uses().double().eval(), torch.randn(2, 3, 8, dtype=torch.float64))


def test_restored_after_an_error() -> None:
    torch.manual_seed(4)
    model = Model({}, False).double().eval()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    found = survey(model, x)
    with unchanged(model):
        with pytest.raises(RuntimeError), Streams(model, found, on_gradient=lambda *_: None) as s:
            s.forward(x[..., :5], 2)
        with pytest.raises(RuntimeError):
            survey(model, x[..., :5])


def test_training_with_dropout_is_refused() -> None:
    model = Model({}, False, dropout=0.1).double().train()
    with pytest.raises(ValueError, match="training mode"):
        survey(model, torch.randn(2, 3, 8, dtype=torch.float64))

"""Heads, checked on what the network computes when one of them is removed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.nets.graph import call_plainly
from deaddir_fast.nets.layers.heads import Heads, heads_of
from deaddir_fast.nets.survey import Survey, survey

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def part(heads: Heads, label: str) -> slice:
    return slice(*heads.ranges[heads.labels.index(label)])


def without(
    model: nn.Module, inputs: Any, found: Survey, removed: list[tuple[str, Heads, str]]
) -> Tensor:
    """Output when these parts of layers are 0 (in the parameters, through ``directions``)."""
    own = dict(model.named_parameters())
    kept = {k: p.detach().clone() for k, p in own.items()}
    with torch.no_grad():
        for name, heads, label in removed:
            layer = found.layers[name]
            # The map from parameters to (o, i + 1) is a permutation: find each entry's place.
            for key in (layer.weight, layer.bias):
                if key is None or (heads.axis == "inputs" and key == layer.bias):
                    continue
                u = torch.arange(1, own[key].numel() + 1, dtype=own[key].dtype)
                places = layer.directions({key: u.view(1, *own[key].shape)})
                assert places is not None
                rows = part(heads, label)
                some = places[0, rows] if heads.axis == "outputs" else places[0][:, rows]
                index = some.flatten().long()
                own[key].view(-1)[index[index > 0] - 1] = 0
        z = call_plainly(model, inputs)
        for k, p in own.items():
            p.copy_(kept[k])
    return z


def check(model: nn.Module, inputs: Any, layers: list[list[str]]) -> None:
    """layers: for each attention the names of q, k, v (equal where packed) and o.

    Without its values a head adds nothing, as without its columns of the map that follows; without
    queries or without keys it weighs all tokens alike.
    """
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    found = survey(model, inputs)
    heads = heads_of(model, found)
    assert set(heads) == {name for names in layers for name in names}
    plain = call_plainly(model, inputs)
    for q, k, v, o in layers:
        # A bias of the values would pass through: it goes with them.
        count, fewer = len(heads[o].labels), sum(x.startswith("v") for x in heads[v].labels)
        group = count // fewer
        for j in range(fewer):
            mine = range(j * group, (j + 1) * group)
            values = without(model, inputs, found, [(v, heads[v], f"v{j}")])
            columns = without(model, inputs, found, [(o, heads[o], f"o{i}") for i in mine])
            torch.testing.assert_close(values, columns, rtol=0, atol=1e-11)
            assert not torch.allclose(values, plain, atol=1e-6)
            keys = without(model, inputs, found, [(k, heads[k], f"k{j}")])
            queries = without(model, inputs, found, [(q, heads[q], f"q{i}") for i in mine])
            torch.testing.assert_close(keys, queries, rtol=0, atol=1e-11)
            assert not torch.allclose(keys, plain, atol=1e-6)


class Own(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        s = x[..., : self.attend.kdim]
        return self.attend(x, s, s[..., : self.attend.vdim], need_weights=False)[0]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 5}])
def test_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    names = [f"attend.{x}" for x in ("q", "k", "v", "out_proj")]
    model = Own(**options).double().eval()
    check(model, torch.randn(2, 5, 12, dtype=torch.float64), [names])


SMALL = dict(
    vocab_size=19, hidden_size=24, num_hidden_layers=1, num_attention_heads=6,
    attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
DECODER = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 4}
FAMILIES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "GPT2": (
        {"vocab_size": 19, "n_embd": 24, "n_layer": 1, "n_head": 6, "n_positions": 8,
         "attn_implementation": "eager"},
        "transformer.h.0.attn", ["c_attn", "c_attn", "c_attn", "c_proj"],
    ),
    "Llama": (DECODER, "model.layers.0.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "Mistral": (DECODER, "model.layers.0.self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "Phi3": (DECODER, "model.layers.0.self_attn", ["qkv_proj"] * 3 + ["o_proj"]),
    "GPTNeoX": (
        {**SMALL, "intermediate_size": 16}, "gpt_neox.layers.0.attention",
        ["query_key_value"] * 3 + ["dense"],
    ),
    "Bloom": (
        {**SMALL, "n_head": 6, "n_layer": 1}, "transformer.h.0.self_attention",
        ["query_key_value"] * 3 + ["dense"],
    ),
    "Bert": (
        {**SMALL, "intermediate_size": 16}, "bert.encoder.layer.0.attention",
        ["self.query", "self.key", "self.value", "output.dense"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face(family: str) -> None:
    hf = pytest.importorskip("transformers")
    options, at, names = FAMILIES[family]
    torch.manual_seed(1)
    kind = (
        "ForMaskedLM" if family == "Bert" else "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    )
    model = getattr(hf, family + kind)(getattr(hf, f"{family}Config")(**options)).double().eval()
    ids = torch.tensor([[1, 5, 7, 2, 9], [3, 4, 8, 18, 6]])
    check(model, {"input_ids": ids}, [[f"{at}.{name}" for name in names]])


def test_what_does_not_fit_is_absent() -> None:
    """Queries packed with a gate, and sizes that are not those of the heads."""

    class Attention(nn.Module):
        def __init__(self, outputs: int, heads: Any) -> None:
            super().__init__()
            self.num_heads, self.head_dim = heads, 4
            self.q_proj, self.k_proj = nn.Linear(12, outputs), nn.Linear(12, 12)
            self.v_proj, self.o_proj = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.o_proj(self.q_proj(x)[..., :12] * self.k_proj(x) + self.v_proj(x))

    x = torch.randn(2, 3, 12)
    for outputs, heads, known in ((12, 3, 4), (24, 3, 0), (12, 2, 0), (12, None, 0), (12, True, 0)):
        model = Attention(outputs, heads).eval()
        assert len(heads_of(model, survey(model, x))) == known


def test_labels_in_order() -> None:
    model = Own().double().eval()
    found = heads_of(model, survey(model, torch.randn(2, 5, 12, dtype=torch.float64)))
    assert found["attend.q"] == Heads("outputs", ("q0", "q1", "q2"), ((0, 4), (4, 8), (8, 12)))
    assert found["attend.out_proj"].axis == "inputs"
    assert all(re.fullmatch("o[0-2]", x) for x in found["attend.out_proj"].labels)


class Toy(nn.Module):
    """Attention with 4 heads of width 3, its projections laid out as in one of the families."""

    def __init__(self, fewer: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, fewer, 3

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(n, t, heads, 3) each to (n, t, 12)."""
        k, v = (z.repeat_interleave(4 // z.shape[2], 2) for z in (k, v))
        weights = torch.softmax(torch.einsum("nthd,nshd->nhts", q, k), -1)
        return torch.einsum("nhts,nshd->nthd", weights, v).flatten(2)


class Separate(Toy):
    def __init__(self) -> None:
        super().__init__(fewer=2)
        self.q_proj, self.o_proj = nn.Linear(8, 12), nn.Linear(12, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        parts = (p(x).unflatten(-1, (-1, 3)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mix(*parts))


class Packed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.mix(*self.c_attn(x).unflatten(-1, (3, 4, 3)).unbind(2)))


class GPTNeoXLike(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.mix(*self.query_key_value(x).unflatten(-1, (4, 3, 3)).unbind(3)))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Separate, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (Packed, ["c_attn"] * 3 + ["c_proj"]),
        (GPTNeoXLike, ["query_key_value"] * 3 + ["dense"]),
    ],
)
def test_layouts_by_hand(kind: type[Toy], names: list[str]) -> None:
    torch.manual_seed(2)
    check(kind().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64), [names])

"""Experts: routed rows, their owners, and modules that hold matrices themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_scores import check_model
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)


class Experts(nn.Module):
    """The layout and the forward of Hugging Face's Mixtral."""

    def __init__(self, count: int, d: int, m: int) -> None:
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * m, d))
        self.down_proj = nn.Parameter(torch.randn(count, d, m))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        mask = F.one_hot(top_k_index, self.num_experts + 1).permute(2, 1, 0)
        for e in range(self.num_experts):
            position, token = torch.where(mask[e])
            if not len(token):
                continue
            x = hidden_states[token]
            gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
            h = F.linear(self.act_fn(gate) * up, self.down_proj[e])
            out.index_add_(0, token, h * top_k_weights[token, position, None])
        return out


class Old(nn.Module):
    """Experts as modules that are called on the rows routed to them."""

    def __init__(self, count: int, d: int, m: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, m), nn.Tanh(), nn.Linear(m, d)) for _ in range(count)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self.experts):
            position, token = torch.where((top_k_index == e).T)
            h = expert(hidden_states[token])  # no rows at all for some
            out.index_add_(0, token, h * top_k_weights[token, position, None])
        return out


class Router(nn.Module):
    """A matrix of its own, and several results."""

    def __init__(self, count: int, d: int, k: int) -> None:
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.randn(count, d)), k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        top, index = torch.softmax(logits, -1).topk(self.k, dim=-1)
        return logits, top / top.sum(-1, keepdim=True), index


class Mixture(nn.Module):
    def __init__(self, kind: type[nn.Module] = Experts, count: int = 5, k: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.router, self.experts = Router(count, 6, k), kind(count, 6, 4)
        self.out = nn.Linear(6, 3)
        self.padded = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        _, weights, index = self.router(h)
        z = self.experts(h.flatten(0, 1), index, weights)
        return self.out(torch.tanh(h + z.view_as(h)))


def ids(n: int = 3, t: int = 4) -> Tensor:
    return torch.arange(n * t).reshape(n, t).mul(7).remainder(13)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_scores(k: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Mixture(k=k).double().eval()
    found = check_model(model, ids(), seed=seed)
    layer = found.layers["experts.0.gate_up"]
    assert (layer.inputs, layer.outputs, layer.layout, layer.routed) == (6, 8, "flat", True)
    assert found.layers["router.weight"].outputs == 5


def routed(model: Mixture, x: Tensor, e: int, mask: Tensor) -> Tensor:
    h = model.embed(x).flatten(0, 1)
    _, _, index = model.router(h)
    return h[(index == e).any(1) & mask.reshape(-1)].detach()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [Experts, Old])
def test_factors(kind: type[nn.Module], masked: bool) -> None:
    """A over routed rows that count, G over samples; batches of any size."""
    torch.manual_seed(4)
    model = Mixture(kind).double().eval()
    with torch.no_grad():
        model.router.weight[3] = 0
        model.router.weight[3, 0] = -50.0  # hardly ever chosen
    x = ids(6, 4)
    mask = torch.ones_like(x).bool()
    if masked:
        mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4, 2])[:, None]
    batches = [
        {"input_ids": x[s], "attention_mask": mask[s].long()}
        for s in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    f = dd.kron_factors(model, batches, likelihood="gaussian")
    up = "gate_up" if kind is Experts else "0"
    middle = "experts" if kind is Experts else "experts.experts"
    for e in range(5):
        name = f"{middle}.{e}.{up}"
        a = routed(model, x, e, mask if kind is Experts else torch.ones_like(mask))
        if name not in f:
            assert not len(a) and any(name in note for note in f.notes)
            continue
        assert f[name].rows == len(a) and f[name].samples == 6
        if kind is Old:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        torch.testing.assert_close(f[name].A, a.T @ a / max(1, len(a)), rtol=1e-12, atol=1e-12)
    # G: Σ rows g gᵀ / samples, from the gradients at the product itself.
    total = torch.zeros_like(f[f"{middle}.1.{up}"].G)
    bias = torch.zeros((), dtype=torch.float64)
    for k in range(6):
        tapes: list[Tensor] = []
        linear = F.linear
        weight = (
            model.experts.gate_up_proj if kind is Experts else model.experts.experts[1][0].weight
        )

        def spy(a: Tensor, w: Tensor, b: Tensor | None = None, *, weight: Tensor = weight,
                tapes: list[Tensor] = tapes, linear: Any = linear) -> Tensor:  # fmt: skip
            z = linear(a, w, b)
            at = weight[1] if kind is Experts else weight
            if w.data_ptr() == at.data_ptr() and w.shape == at.shape:
                z.retain_grad()
                tapes.append(z)
            return z

        F.linear, z = spy, None
        try:
            z = model(x[k : k + 1])
        finally:
            F.linear = linear
        for t in range(4):
            for c in range(3):
                if mask[k, t] and tapes:
                    (g,) = torch.autograd.grad(z[0, t, c], tapes, retain_graph=True)
                    total += g.T @ g
        bias = bias + z.sum().detach()
    torch.testing.assert_close(f[f"{middle}.1.{up}"].G, total / 6, rtol=1e-10, atol=1e-12)
    assert bool(bias.isfinite())


def test_no_reduce() -> None:
    model = Mixture().double().eval()
    with pytest.raises(ValueError, match="kfac: 'reduce' needs rows that belong to samples"):
        dd.kron_factors(model, ids(), likelihood="gaussian", kfac="reduce")


def test_other_layouts_are_refused() -> None:
    """GPT-OSS: weights transposed, with biases, gates interleaved."""

    class Oss(Experts):
        def __init__(self, count: int, d: int, m: int) -> None:
            super().__init__(count, d, m)
            self.gate_up_proj = nn.Parameter(torch.randn(count, d, 2 * m))
            self.down_proj = nn.Parameter(torch.randn(count, m, d))

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return x

    class Biased(Experts):
        def __init__(self, count: int, d: int, m: int) -> None:
            super().__init__(count, d, m)
            self.gate_up_proj_bias = nn.Parameter(torch.randn(count, 2 * m))

    class Interleaved(Experts):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            z = torch.einsum("td,eod->teo", x, self.gate_up_proj)
            h = torch.einsum("tem,edm->ted", z[..., ::2] * z[..., 1::2].sigmoid(), self.down_proj)
            return h.sum(1)

    for kind, why in (
        (Oss, "transposed"), (Biased, "biases"), (Interleaved, "does not compute what such"),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=why):
            survey(Mixture(kind).double().eval(), ids())


class Held(nn.Module):
    """A low-rank update by hand, written in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.base = nn.Linear(5, 4)
        turned = how == "right"
        self.lora_A = nn.Parameter(torch.randn((5, 2) if turned else (2, 5)))
        self.lora_B = nn.Parameter(torch.randn((2, 4) if turned else (4, 2)))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.how == "turned":
            return self.base(x) + 0.5 * (x @ self.lora_A.T @ self.lora_B.mT)
        if self.how == "right":
            return self.base(x) + x @ self.lora_A @ self.lora_B
        return self.base(x) + x @ (self.lora_B @ self.lora_A).T


@pytest.mark.parametrize("how", ["linear", "turned", "right"])
def test_low_rank_update(how: str) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(Held(how), nn.ReLU(inplace=True), nn.Linear(4, 3)).double().eval()
    check_model(model, torch.randn(3, 6, 5, dtype=torch.float64))


def test_merged_update_is_named() -> None:
    model = nn.Sequential(Held("merged"), nn.Linear(4, 3)).double().eval()
    with pytest.warns(UserWarning, match=r"0\.lora_A \(Held\): it is used by \w+, not as"):
        found = survey(model, torch.randn(3, 6, 5, dtype=torch.float64))
    assert set(found.layers) == {"0.base", "1"}


def tiny(config: Any, kind: Any) -> Any:
    torch.manual_seed(6)
    return kind(config).double().eval()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe", "Qwen2Moe"])
def test_hugging_face(family: str) -> None:
    hf = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(hf, f"{family}Config")(
        vocab_size=17, hidden_size=16, intermediate_size=12, moe_intermediate_size=12,
        shared_expert_intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, num_experts=4, num_local_experts=4,
        num_experts_per_tok=2, attn_implementation="eager", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    for implementation in ("eager", "batched_mm"):
        config._experts_implementation = implementation
        model = tiny(config, getattr(hf, f"{family}ForCausalLM"))
        check_model(model, {"input_ids": ids(2, 5)}, tolerance=1e-9)

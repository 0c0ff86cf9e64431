"""Tiny Hugging Face models: what is claimed of each, and trajectories from both ends of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.optim.claims import FRAME, NONE, PAIR, SHARED, SHIFT, STILL
from optim.trajectories import transported

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

COMMON = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "use_cache": False,
}


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **more}))


def qwen() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=19, n_embd=8, n_head=2, n_layer=1, n_positions=16, bos_token_id=0,
        eos_token_id=1, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=10, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **{**COMMON, "num_local_experts": 3, "num_experts_per_tok": 2}
    )
    config._experts_implementation = "eager"  # the fused one has no fp64
    return transformers.MixtralForCausalLM(config)


# What is claimed, counted by treatment (gauges of dimension zero apart): norm scales (in pairs,
# where their readers meet nothing else), up to down and experts in the frame; heads (queries with
# keys, values with outputs) share moments; key biases stay; an untied head is shifted.
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (llama, {FRAME: 4, SHARED: 2, SHIFT: 1}),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), {FRAME: 3, SHARED: 2}),
    "qwen2": (qwen, {FRAME: 4, SHARED: 2, SHIFT: 1}),
    "gpt2": (gpt2, {FRAME: 1, PAIR: 1, SHARED: 2, STILL: 1}),
    "bert": (bert, {PAIR: 1, SHARED: 2, STILL: 1}),
    "mixtral": (mixtral, {FRAME: 4, SHARED: 2, SHIFT: 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_transported(name: str) -> None:
    build, expected = CASES[name]
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ids = torch.randint(19, (8, 6))
    inputs = {"input_ids": ids}
    found = [g for g in gauge.find(model, inputs) if g.dimension]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, -2), y)

    target = ((ids + 1) % 19).flatten()
    pair = transported(model, inputs, target, loss, found, lr=3e-4)
    counted = Counter(c.treatment for c in pair.optimizer.claims)
    # A class bias beside a tied head is a shift of its own.
    got = {k: n for k, n in counted.items() if k != NONE and (k != SHIFT or k in expected)}
    assert got == expected, "\n".join(map(str, pair.optimizer.claims))
    assert pair.moved > 1e-2
    # Rotary tables, router and norms compute in fp32 whatever the parameters are.
    assert pair.ours <= (1e-12 if name in ("gpt2", "bert") else 1e-5)
    assert pair.adamw > 1e-2

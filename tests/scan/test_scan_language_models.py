"""Scans of language models of the common shapes, with random weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deaddir_fast as dd

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name: str) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=32
        ),
        "llama": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=24),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL, intermediate_size=24),
        "mixtral": lambda: hf.MixtralConfig(
            **SMALL, num_key_value_heads=2, intermediate_size=24, num_local_experts=3
        ),
        "bert": lambda: hf.BertConfig(**SMALL, intermediate_size=24),
    }
    config = configs[name]()
    kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():  # trained norms are not all ones
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "mixtral", "bert"])
def test_a_scan_covers_the_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    ids = torch.randint(0, 61, (12, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[8:, 11:] = 0
    batches = [
        {"input_ids": a, "attention_mask": b}
        for a, b in zip(ids.split(6), mask.split(6), strict=True)
    ]
    report = dd.scan(model, batches, out=tmp_path / "s", directions_per_layer=2, ray_samples=2)
    notes = report.data["notes"]
    assert not [n for n in notes if "no rays" in n], notes
    assert report.data["data"]["tokens"] == int(mask.sum())
    covered = {s["name"] for s in report.data["skipped"]}
    totals = report.data["totals"]
    if not covered:
        assert totals["scanned"] == totals["parameters"]  # a tied weight counts once
    kernels = [
        d
        for x in report.layers.values()
        for d in x["directions"]
        if d["label"].startswith("kernel")
    ]
    if name in ("gpt2", "gpt_neox", "bert"):
        assert len(kernels) >= 4
        for d in kernels:
            assert d["class"] == "algebraic" and math.isinf(d["order"])
            assert float(d["why"].rpartition(" ")[2]) >= 0.9999
    else:
        assert not kernels  # RMSNorm has no such direction
    if name == "mixtral":
        experts = [
            x for x in report.layers.values() if x["kind"] == "experts" or ".experts." in x["name"]
        ]
        assert len(experts) == 2 * 3 * 2
        for layer in range(2):
            rows = [
                x["rows"]
                for x in experts
                if f"layers.{layer}." in x["name"] and x["name"].endswith("down")
            ]
            assert sum(rows) == 2 * int(mask.sum())  # two experts a token, padding left out
    if name == "gpt2":
        shared = {x["shares_inputs_with"] for x in report.layers.values()}
        assert shared == {None}
    if name == "llama":
        assert report.layers["model.layers.0.self_attn.v_proj"]["shares_inputs_with"] == (
            "model.layers.0.self_attn.q_proj"
        )
        assert report.layers["model.layers.0.mlp.up_proj"]["shares_inputs_with"] == (
            "model.layers.0.mlp.gate_proj"
        )
        assert any("partly in float32" in n for n in notes)  # its norms

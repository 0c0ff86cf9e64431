"""Known-t sweeps of Hugging Face architectures with random weights."""

import pytest
import torch

import deaddir_fast as dd

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

VOCABULARY = 70


def _gpt2():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=VOCABULARY, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def _llama():
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
    )
    return transformers.LlamaForCausalLM(config)


def _bert():
    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
    )
    return transformers.BertForMaskedLM(config)


def _mixtral():
    config = transformers.MixtralConfig(
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=3,
        experts_implementation="batched_mm",  # grouped products do not exist in fp64
    )
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("build", [_gpt2, _llama, _bert, _mixtral])
def test_rates_are_the_predicted_ones(build):
    torch.manual_seed(0)
    model = build().eval()
    ids = {"input_ids": torch.randint(0, VOCABULARY, (12, 6))}
    probe = dd.freeze_probe(model, ids, unit=1, likelihood="categorical")
    assert not probe.exact
    read = [v for layer in probe.layers for v in layer.verdicts.values()]
    assert len(read) >= 15
    assert all(v.startswith("agrees") for v in read), str(probe)


def test_every_linear_map_is_seen():
    """Fused queries, keys and values (GPT-2), grouped keys (Llama), stacked experts (Mixtral)."""
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, VOCABULARY, (2, 6))}
    gpt2 = dd.theory.predict(_gpt2().eval(), ids, unit=1)
    assert gpt2["transformer.h.0.attn.c_proj"].forward == 1
    llama = dd.theory.predict(_llama().eval(), ids, unit=1)
    assert llama["model.layers.0.self_attn.o_proj"].forward == 1
    assert llama["model.layers.1.mlp.down_proj"].forward == 2
    mixtral = dd.theory.predict(_mixtral().eval(), ids, unit=1)
    experts = [x for x in mixtral.layers if "experts.down_proj" in x.name]
    assert experts
    assert experts[0].forward == 2

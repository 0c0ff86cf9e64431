"""Symmetries of Hugging Face language models: lists written out by hand, and the exact Fisher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.nets.graph import call_model

transformers: Any = pytest.importorskip("transformers")

VOCABULARY = 11
Lines = set[tuple[str, str, int]]


@pytest.fixture(autouse=True)
def no_claim_is_dropped() -> Iterator[None]:
    """The rules themselves should be right; the numerical check is the second line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* dropped: ")
        yield


def gpt2(**changes: Any) -> nn.Module:
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, **changes}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=8,
    )
    return transformers.BertForMaskedLM(config)


def decoder(kind: str, **changes: Any) -> nn.Module:
    """One block, width 8; four query heads of width 4 share two key heads; ten gated units."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 10,
        "max_position_embeddings": 8,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def llama(**changes: Any) -> nn.Module:
    return decoder("Llama", **changes)


def qwen2(**changes: Any) -> nn.Module:
    return decoder("Qwen2", **changes)


def mixtral(experts: int = 3, **changes: Any) -> nn.Module:
    return decoder("Mixtral", num_local_experts=experts, num_experts_per_tok=2, **changes)


def neox() -> nn.Module:
    """Two heads of width 8 of which the first 4 are rotary; one fused map for all three."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=8,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        use_cache=False,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def gptj() -> nn.Module:
    """One head of width 8; its first 4 units are rotary in neighbouring pairs."""
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTJForCausalLM(config)


def ids(samples: int = 3, length: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(VOCABULARY, (samples, length), generator=draw)}


def listing(model: nn.Module) -> Lines:
    return {(g.name, g.group, g.dimension) for g in gauge.find(model, ids())}


def block(norm: str, reads: str, mlp_norm: str, mlp_reads: str) -> Lines:
    """What attention with rotary embeddings and grouped queries, between norms, always has."""
    at = "model.layers.0.self_attn"
    return {
        # 2 key heads, 2 frequencies, modulus and phase of each
        (f"complex rescaling: {at}.q_proj -> {at}.k_proj", "(C^*)^4", 8),
        (f"general linear: {at}.v_proj -> {at}.o_proj", "GL(4)^2", 32),
        (f"rescaling: model.layers.0.{norm} -> {reads}", "(R^*)^8", 8),
        (f"rescaling: model.layers.0.{mlp_norm} -> {mlp_reads}", "(R^*)^8", 8),
    }


QKV = ", ".join(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
GATED = ", ".join(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up"))
ROTARY = block("input_layernorm", QKV, "post_attention_layernorm", GATED)
# Four query heads in two groups: groups change places, and heads inside each on its own.
HEADS: Lines = {
    ("permutation: model.layers.0.self_attn.q_proj -> model.layers.0.self_attn.o_proj", "S_2^2", 0),
    (f"permutation: {QKV} -> model.layers.0.self_attn.o_proj", "S_2", 0),
}
UP_DOWN = ("rescaling: model.layers.0.mlp.up_proj -> model.layers.0.mlp.down_proj", "(R^*)^10", 10)
GATES = (f"permutation: {GATED} -> model.layers.0.mlp.down_proj", "S_10", 0)
WRITERS = (
    "model.embed_tokens, model.layers.0.self_attn.o_proj, model.layers.0.mlp.down_proj, "
    "model.layers.0.input_layernorm and 2 more"  # post_attention_layernorm, norm
)
STREAM = (
    f"permutation: {WRITERS} -> {QKV}, model.layers.0.mlp.gate_proj and 2 more",  # up, head
    "S_8",
    0,
)
TIED_STREAM = (
    f"permutation: {WRITERS} -> model.embed_tokens, {QKV} and 2 more",  # gate, up
    "S_8",
    0,
)
HEAD: Lines = {
    ("rescaling: model.norm -> lm_head", "(R^*)^8", 8),
    ("class shift: lm_head", "R^8", 8),
}
H = "transformer.h.0"
L = "bert.encoder.layer.0"
X = "gpt_neox.layers.0"

LISTS: dict[str, tuple[Callable[[], nn.Module], Lines]] = {
    # The head is the embedding: final norm and classes are tied to the start of the stream.
    "GPT-2": (
        gpt2,
        {
            (f"rescaling: {H}.ln_1 -> {H}.attn.c_attn", "(R^*)^8", 8),
            (f"general linear: {H}.attn.c_attn -> {H}.attn.c_attn", "GL(4)^2", 32),
            (f"general linear: {H}.attn.c_attn -> {H}.attn.c_proj", "GL(4)^2", 32),
            (f"rescaling: {H}.ln_2 -> {H}.mlp.c_fc", "(R^*)^8", 8),
            (f"translation: {H}.ln_1.bias -> {H}.attn.c_attn.bias", "R^8", 8),
            (f"translation: {H}.attn.c_attn.bias -> softmax", "R^8", 8),
            (f"translation: {H}.attn.c_attn.bias -> {H}.attn.c_proj.bias", "R^8", 8),
            (f"translation: {H}.ln_2.bias -> {H}.mlp.c_fc.bias", "R^8", 8),
            # Every norm subtracts the mean of the stream: 8 positions; 8 inputs and a bias; 32 and
            # one. What the embedding writes is read by the head as well.
            ("translation: transformer.wpe -> mean of LayerNorm", "R^8", 8),
            (f"translation: {H}.attn.c_proj -> mean of LayerNorm", "R^9", 9),
            (f"translation: {H}.mlp.c_proj -> mean of LayerNorm", "R^33", 33),
            (f"permutation: {H}.attn.c_attn -> {H}.attn.c_proj", "S_2", 0),
            (f"permutation: {H}.mlp.c_fc -> {H}.mlp.c_proj", "S_32", 0),
            (
                f"permutation: transformer.wte, transformer.wpe, {H}.ln_1, {H}.attn.c_proj and 3 "
                f"more -> transformer.wte, {H}.attn.c_attn, {H}.mlp.c_fc",
                "S_8",
                0,
            ),
        },
    ),
    # Norms after each sum feed the stream as well, but for the last of all.
    "BERT": (
        bert,
        {
            (
                f"general linear: {L}.attention.self.query -> {L}.attention.self.key",
                "GL(4)^2",
                32,
            ),
            (
                f"general linear: {L}.attention.self.value -> {L}.attention.output.dense",
                "GL(4)^2",
                32,
            ),
            (f"rescaling: {L}.output.LayerNorm -> cls.predictions.transform.dense", "(R^*)^8", 8),
            (f"translation: {L}.attention.self.key.bias -> softmax", "R^8", 8),
            (
                f"translation: {L}.attention.self.value.bias -> {L}.attention.output.dense.bias",
                "R^8",
                8,
            ),
            (
                f"translation: {L}.output.LayerNorm.bias -> cls.predictions.transform.dense.bias",
                "R^8",
                8,
            ),
            (
                "translation: cls.predictions.transform.LayerNorm.bias -> cls.predictions.bias",
                "R^8",
                8,
            ),
            # 8 positions, 2 types; 8 inputs and a bias; 10 and one. Words are the head's rows too.
            ("translation: bert.embeddings.position_embeddings -> mean of LayerNorm", "R^8", 8),
            ("translation: bert.embeddings.token_type_embeddings -> mean of LayerNorm", "R^2", 2),
            (f"translation: {L}.attention.output.dense -> mean of LayerNorm", "R^9", 9),
            (f"translation: {L}.output.dense -> mean of LayerNorm", "R^11", 11),
            # the head's own bias
            ("class shift: cls.predictions", "R^1", 1),
            (
                f"permutation: {L}.attention.self.query, {L}.attention.self.key, "
                f"{L}.attention.self.value -> {L}.attention.output.dense",
                "S_2",
                0,
            ),
            (f"permutation: {L}.intermediate.dense -> {L}.output.dense", "S_10", 0),
            (
                "permutation: bert.embeddings.word_embeddings, "
                "bert.embeddings.position_embeddings, "
                "bert.embeddings.token_type_embeddings, bert.embeddings.LayerNorm and 6 more -> "
                f"bert.embeddings.word_embeddings, {L}.attention.self.query, "
                f"{L}.attention.self.key, {L}.attention.self.value and 2 more",
                "S_8",
                0,
            ),
        },
    ),
    # Their norms subtract no mean.
    "Llama": (llama, {*ROTARY, UP_DOWN, *HEAD, *HEADS, GATES, STREAM}),
    "tied Llama": (
        lambda: llama(tie_word_embeddings=True),
        {*ROTARY, UP_DOWN, *HEADS, GATES, TIED_STREAM},
    ),
    # The biases of queries and keys turn with them; that of the values has none to absorb it.
    "Qwen2": (qwen2, {*ROTARY, UP_DOWN, *HEAD, *HEADS, GATES, STREAM}),
    "Mixtral": (
        mixtral,
        {
            *block(
                "input_layernorm",
                QKV,
                "post_attention_layernorm",
                "model.layers.0.mlp.gate, model.layers.0.mlp.experts",
            ),
            # 3 experts of 10 units
            ("rescaling: model.layers.0.mlp.experts -> model.layers.0.mlp.experts", "(R^*)^30", 30),
            *HEAD,
            *HEADS,
            # The router's softmax does not see one vector added to the rows of all experts. What
            # permutes through the sorting of tokens by expert (units, stream, experts) is not
            # searched for.
            ("translation: model.layers.0.mlp.gate -> softmax", "R^8", 8),
        },
    ),
    # Four of eight units in a head turn, in two pairs; the others see no position: GL(4).
    "GPT-NeoX": (
        neox,
        {
            (
                f"complex rescaling: {X}.attention.query_key_value -> "
                f"{X}.attention.query_key_value",
                "(C^*)^4",
                8,
            ),
            (
                f"general linear: {X}.attention.query_key_value -> {X}.attention.query_key_value",
                "GL(4)^2",
                32,
            ),
            (
                f"general linear: {X}.attention.query_key_value -> {X}.attention.dense",
                "GL(8)^2",
                128,
            ),
            (f"rescaling: {X}.input_layernorm -> {X}.attention.query_key_value", "(R^*)^16", 16),
            (
                f"rescaling: {X}.post_attention_layernorm -> {X}.mlp.dense_h_to_4h",
                "(R^*)^16",
                16,
            ),
            ("rescaling: gpt_neox.final_layer_norm -> lm_head", "(R^*)^16", 16),
            (
                f"translation: {X}.input_layernorm.bias -> {X}.attention.query_key_value.bias",
                "R^16",
                16,
            ),
            (
                f"translation: {X}.post_attention_layernorm.bias -> {X}.mlp.dense_h_to_4h.bias",
                "R^16",
                16,
            ),
            (
                f"translation: {X}.attention.query_key_value.bias -> {X}.attention.dense.bias",
                "R^16",
                16,
            ),
            # keys of the four units that see no position
            (f"translation: {X}.attention.query_key_value.bias -> softmax", "R^8", 8),
            ("class shift: lm_head", "R^16", 16),
            # 11 words; 16 inputs and a bias; 10 and one
            ("translation: gpt_neox.embed_in -> mean of LayerNorm", "R^11", 11),
            (f"translation: {X}.attention.dense -> mean of LayerNorm", "R^17", 17),
            (f"translation: {X}.mlp.dense_4h_to_h -> mean of LayerNorm", "R^11", 11),
            (f"permutation: {X}.attention.query_key_value -> {X}.attention.dense", "S_2", 0),
            (f"permutation: {X}.mlp.dense_h_to_4h -> {X}.mlp.dense_4h_to_h", "S_10", 0),
            (
                f"permutation: gpt_neox.embed_in, {X}.input_layernorm, "
                f"{X}.post_attention_layernorm, {X}.attention.dense and 2 more -> "
                f"{X}.attention.query_key_value, {X}.mlp.dense_h_to_4h, lm_head",
                "S_16",
                0,
            ),
        },
    ),
    "GPT-J": (
        gptj,
        {
            (f"complex rescaling: {H}.attn.q_proj -> {H}.attn.k_proj", "(C^*)^2", 4),
            (f"general linear: {H}.attn.q_proj -> {H}.attn.k_proj", "GL(4)", 16),
            (f"general linear: {H}.attn.v_proj -> {H}.attn.out_proj", "GL(8)", 64),
            (
                f"rescaling: {H}.ln_1 -> {H}.attn.k_proj, {H}.attn.v_proj, {H}.attn.q_proj, "
                f"{H}.mlp.fc_in",
                "(R^*)^8",
                8,
            ),
            ("rescaling: transformer.ln_f -> lm_head", "(R^*)^8", 8),
            ("translation: transformer.ln_f.bias -> lm_head.bias", "R^8", 8),
            ("class shift: lm_head", "R^9", 9),
            # 11 words; 8 inputs, no bias; 32 and one
            ("translation: transformer.wte -> mean of LayerNorm", "R^11", 11),
            (f"translation: {H}.attn.out_proj -> mean of LayerNorm", "R^8", 8),
            (f"translation: {H}.mlp.fc_out -> mean of LayerNorm", "R^33", 33),
            (f"permutation: {H}.mlp.fc_in -> {H}.mlp.fc_out", "S_32", 0),
            (
                f"permutation: transformer.wte, {H}.ln_1, {H}.attn.out_proj, {H}.mlp.fc_out and 1 "
                f"more -> {H}.attn.k_proj, {H}.attn.v_proj, {H}.attn.q_proj, {H}.mlp.fc_in and 1 "
                "more",
                "S_8",
                0,
            ),
        },
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LISTS)
def test_list_written_out_by_hand(name: str, dtype: torch.dtype) -> None:
    build, expected = LISTS[name]
    assert listing(build().to(dtype)) == expected


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_followed_however_they_are_run(implementation: str) -> None:
    model = mixtral()
    model.config._experts_implementation = implementation
    assert listing(model) == LISTS["Mixtral"][1]
    assert model.config._experts_implementation == implementation


def test_more_experts_than_tokens() -> None:
    """Experts that no token was sent to have the symmetries of the others."""
    found = {g.name: g for g in gauge.find(mixtral(experts=9), ids(1, 3))}
    experts = found["rescaling: model.layers.0.mlp.experts -> model.layers.0.mlp.experts"]
    assert experts.dimension == 90
    reads = "model.layers.0.mlp.gate, model.layers.0.mlp.experts"
    norm = found[f"rescaling: model.layers.0.post_attention_layernorm -> {reads}"]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = {k: v.detach() for k, v in mixtral(experts=9).named_parameters()}
    moved = norm.act(state, torch.full((8,), 2.0, dtype=torch.float64))
    assert torch.equal(moved[name], state[name] / 2)


def test_explicit_action_on_experts() -> None:
    model = mixtral().double()
    found = next(g for g in gauge.find(model, ids()) if g.dimension == 30)
    state = {k: v.detach() for k, v in model.named_parameters()}
    c = torch.rand(3, 10, dtype=torch.float64) + 0.5
    moved = found.act(state, c.reshape(-1))
    up, down = (f"model.layers.0.mlp.experts.{x}_proj" for x in ("gate_up", "down"))
    assert torch.equal(moved[up][:, :10], state[up][:, :10])
    assert torch.equal(moved[up][:, 10:], state[up][:, 10:] * c[:, :, None])
    assert torch.allclose(moved[down], state[down] / c[:, None, :], rtol=1e-15)


@pytest.mark.parametrize(("name", "stride"), [("Llama", 2), ("GPT-J", 1)])
def test_explicit_action_on_rotary_pairs(name: str, stride: int) -> None:
    """Unit ``j`` and its partner, in halves or neighbouring, as one complex number."""
    model = LISTS[name][0]().double()
    found = next(g for g in gauge.find(model, ids()) if "complex" in g.name)
    assert isinstance(found, gauge.ComplexRescaling)
    state = {k: v.detach() for k, v in model.named_parameters()}
    moved = found.act(state, torch.tensor([[0.0, 2.0]]).double().repeat(found.shape[0], 1))
    at = "model.layers.0.self_attn" if name == "Llama" else "transformer.h.0.attn"
    for side, scale in (("q", 2.0), ("k", 0.5)):  # conj(2i)^-1 = i / 2
        before, after = state[f"{at}.{side}_proj.weight"], moved[f"{at}.{side}_proj.weight"]
        real, imaginary = before[0], before[stride]
        for sign in (1.0, -1.0):  # i or -i: which unit is called real is a convention
            if torch.allclose(after[0], -sign * scale * imaginary):
                assert torch.allclose(after[stride], sign * scale * real)
                break
        else:
            raise AssertionError(f"{side}: not a quarter turn")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        k: v.detach() + 0.2 * torch.randn(v.shape, generator=draw, dtype=torch.float64)
        for k, v in model.named_parameters()
    }


def fisher_root(
    model: nn.Module, state: dict[str, Tensor], chosen: list[str], samples: int = 10
) -> Tensor:
    """Dense R with F = R^T R over the chosen parameters, for classes, in fp64."""
    model.eval()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"
    leaves = {k: v.clone().requires_grad_(k in chosen) for k, v in state.items()}
    z = call_model(model, {**dict(model.named_buffers()), **leaves}, ids(samples, 7))
    z = z.reshape(-1, VOCABULARY)
    of = [leaves[k] for k in chosen]
    each = torch.eye(z.numel(), dtype=torch.float64).reshape(-1, *z.shape)
    grads = torch.autograd.grad(z, of, each, is_grads_batched=True, materialize_grads=True)
    jacobian = torch.cat([g.flatten(1) for g in grads], 1).reshape(*z.shape, -1)
    p = z.detach().softmax(-1).unsqueeze(-1)
    root = p.sqrt() * (jacobian - (p * jacobian).sum(-2, keepdim=True))
    return root.flatten(0, 1) / z.shape[0] ** 0.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in ("GPT-2", "GPT-NeoX") else [])
        for n in LISTS
    ],
)
def test_tangents_lie_in_the_null_space_of_the_exact_fisher(name: str) -> None:
    model = LISTS[name][0]().double()
    found = gauge.find(model, ids())
    state = state_of(model)
    root = fisher_root(model, state, list(state))
    # GPT-J computes its scores in fp32, Mixtral the softmax of its router.
    rounding = 1e-8 if name in ("GPT-J", "Mixtral") else 1e-12
    scale = torch.linalg.matrix_norm(root, 2)
    random = torch.randn(8, root.shape[1], dtype=torch.float64)
    assert ((random @ root.T).norm(dim=1) / random.norm(dim=1) / scale).min() > 1e-3
    for g in (g for g in found if g.dimension):
        moved = g.tangents(state)
        tangents = torch.cat(
            [
                moved[k].flatten(1) if k in moved else v.new_zeros(g.dimension, v.numel())
                for k, v in state.items()
            ],
            1,
        )
        lengths = tangents.norm(dim=1)
        assert lengths.min() > 0
        assert ((tangents @ root.T).norm(dim=1) / scale / lengths).max() <= rounding, g.name


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mixtral"])
def test_queries_and_keys_have_no_symmetry_beyond_the_complex_one(name: str) -> None:
    """4 complex numbers, 8 null directions of the Fisher of queries and keys, no more."""
    model = LISTS[name][0]().double()
    state = state_of(model)
    chosen = [k for k in state if ".q_proj." in k or ".k_proj." in k]
    sizes = torch.linalg.svdvals(fisher_root(model, state, chosen))
    total = sum(state[k].numel() for k in chosen)
    assert sizes.numel() == total
    assert sizes[total - 9] > 1e-9 * sizes[0] and sizes[total - 8] < 1e-13 * sizes[0]


def test_experts_have_no_symmetry_beyond_the_scale_of_units() -> None:
    """3 experts of 4 units: 12 null directions of the Fisher of the experts, no more."""
    model = mixtral(intermediate_size=4).double()
    state = state_of(model)
    chosen = [k for k in state if ".experts." in k]
    sizes = torch.linalg.svdvals(fisher_root(model, state, chosen))
    total = sum(state[k].numel() for k in chosen)
    assert sizes.numel() == total
    assert sizes[total - 13] > 1e-9 * sizes[0] and sizes[total - 12] < 1e-13 * sizes[0]


@pytest.mark.slow
def test_nothing_is_missing_from_the_list_of_a_tied_llama() -> None:
    """Generic point, more outputs than parameters: every null direction is an orbit direction.

    (An embedding of its own for the head would let the residual stream rotate, which is not
    searched for.)
    """
    model = llama(tie_word_embeddings=True).double()
    state = state_of(model)
    found = gauge.find(model, ids())
    assert sum(g.dimension for g in found) == 8 + 8 + 32 + 8 + 10
    root = fisher_root(model, state, list(state), samples=18)
    sizes = torch.linalg.svdvals(root)
    assert root.shape[0] > root.shape[1] == sizes.numel()
    assert int((sizes < 1e-11 * sizes[0]).sum()) == 66
    assert gauge.orthonormal_tangents(found, state)[1] == 66

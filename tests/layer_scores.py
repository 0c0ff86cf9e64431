"""Scores and curvatures of layers from streams, and the same from dense autograd."""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.nets.graph import call_plainly
from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.layers.embedding import Embedding
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import Survey, survey


def inputs_of(layer: Layer, x: Tensor, n: int) -> Tensor:
    """a with its trailing 1, one-hot for embeddings."""
    a = layer.rows(x, n)
    if isinstance(layer, Embedding):
        return nn.functional.one_hot(a[..., 0], layer.inputs).double()
    if layer.bias is not None and layer.form == "matrix":
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
    return a


def score_of(layer: Layer, g: Tensor, a: Tensor, owners: Tensor | None, n: int) -> Tensor:
    """Σ_t g aᵀ for each sample."""
    if owners is not None:
        flat = torch.einsum("ro,ri->roi", g.flatten(0, 1), a.flatten(0, 1))
        return flat.new_zeros(n, *flat.shape[1:]).index_add(0, owners, flat)
    if layer.groups > 1:
        return torch.einsum("ntko,ntki->nkoi", g, a)
    return torch.einsum("nto,nti->noi", g, a)


def stream_scores(
    model: nn.Module, found: Survey, inputs: Any, seeds: list[Tensor]
) -> list[dict[str, Tensor]]:
    """For each seed the per-sample scores of every layer."""
    n = seeds[0].shape[0]
    scores: dict[str, Tensor] = {}

    def take(layer: Layer, grad: Tensor, x: Tensor | None) -> None:
        assert x is not None
        g, a = layer.gradients(grad, n, x), inputs_of(layer, x, n)
        owners = None
        if layer.routed:
            owners = layer.samples_of(n)
            assert owners is not None
        score = score_of(layer, g, a, owners, n)
        scores[layer.name] = scores[layer.name] + score if layer.name in scores else score

    out = []
    with Streams(model, found, on_gradient=take, keep=lambda layer: True) as streams:
        z = streams.forward(inputs, n)
        for k, seed in enumerate(seeds):
            scores = {}
            streams.backward(z, seed, last=k == len(seeds) - 1)
            out.append(scores)
    return out


def dense_scores(model: nn.Module, inputs: Any, seed: Tensor) -> dict[str, Tensor]:
    """{parameter: (n, *shape)} gradients of Σ seed z of each sample."""
    named = {k: p for k, p in model.named_parameters() if p.is_floating_point()}
    rows = defaultdict(list)
    for k in range(len(seed)):
        z = call_plainly(model, inputs)
        grads = torch.autograd.grad((z[k] * seed[k]).sum(), list(named.values()), allow_unused=True)
        for (name, p), grad in zip(named.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad)
    return {name: torch.stack(some) for name, some in rows.items()}


def state_of(model: nn.Module) -> list[Any]:
    """All that taps might leave changed."""
    return [
        [
            (name, m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks),
             {k for k in m.__dict__ if not k.startswith("__")}, m.__dict__.get("forward"))
            for name, m in model.named_modules()
        ],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        torch.backends.mha.get_fastpath_enabled(),
    ]  # fmt: skip


@contextmanager
def unchanged(model: nn.Module) -> Any:
    """The model and its numbers are as before at the end."""
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    try:
        yield
    finally:
        assert state_of(model) == before
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])


def check_model(
    model: nn.Module,
    inputs: Any,
    *,
    missing: tuple[str, ...] = (),
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Survey:
    """Scores from streams equal dense autograd's for every parameter that is not ``missing``.

    Also: outputs with taps equal outputs without; the model stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain = call_plainly(model, inputs)
    n = plain.shape[0]
    seeds = [torch.randn(plain.shape, generator=generator, dtype=plain.dtype) for _ in range(2)]
    with unchanged(model):
        if missing:
            with pytest.warns(UserWarning, match="no layer stands for"):
                found = survey(model, inputs)
        else:
            found = survey(model, inputs, strict=True)
        scores = stream_scores(model, found, inputs, seeds)
        tapped = []
        with Streams(model, found, on_input=lambda *_: None) as streams:
            tapped.append(streams.forward(inputs, n))
        with Streams(model, found, on_gradient=lambda *_: None) as streams:
            tapped.append(streams.forward(inputs, n).detach())
    for z in tapped:
        torch.testing.assert_close(z, plain, rtol=0, atol=1e-13 * float(plain.abs().max()))
    covered = {p for layer in found.layers.values() for p in (layer.weight, layer.bias) if p}
    names = {k for k, _ in model.named_parameters()}
    assert names - covered == set(missing)
    for got, v in zip(scores, seeds, strict=True):
        want = dense_scores(model, inputs, v)
        for name in sorted(covered):
            u = torch.randn(3, *want[name].shape[1:], generator=generator, dtype=want[name].dtype)
            expected = want[name].flatten(1) @ u.flatten(1).T
            total = torch.zeros_like(expected)
            for layer in found.layers.values():
                d = layer.directions({name: u})
                if d is not None and layer.name in got:
                    total += got[layer.name].flatten(1) @ d.flatten(1).T
            size = float(want[name].abs().max()) * u[0].numel() ** 0.5
            torch.testing.assert_close(total, expected, rtol=0, atol=tolerance * size + 1e-14)
    return found

"""Factors of small models from their definition, with autograd and loops over samples."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedTransformer(nn.Module):
    """One block of causal attention that ignores padding on either side; logits for each token."""

    def __init__(self, vocabulary: int = 7, d: int = 6, out: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v = (nn.Linear(d, d, bias=b) for b in (False, True, True))
        self.o = nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.head = nn.Linear(d, out)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        t = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position = (mask.cumsum(1) - 1).clamp_min(0)
        x = self.embed(input_ids)
        angle = position.unsqueeze(-1) * torch.arange(1, x.shape[-1] + 1) / 5
        x = x + torch.sin(angle).to(x.dtype)
        h = self.norm(x)
        allowed = torch.ones(t, t, dtype=torch.bool).tril() & mask.bool().unsqueeze(1)
        scores = self.q(h) @ self.k(h).mT / x.shape[-1] ** 0.5
        # Finite, so that a row that may look at nothing has no NaN.
        weight = torch.softmax(scores.masked_fill(~allowed, -1e9), -1)
        x = x + self.o(weight @ self.v(h))
        return self.head(x + self.down(F.gelu(self.up(x))))


def mlp(*widths: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def hessian(z: Tensor, likelihood: str, variance: float = 1.0) -> Tensor:
    """(c, c) Fisher of one row of outputs, from its closed form."""
    if likelihood == "categorical":
        p = torch.softmax(z, -1)
        return torch.diag(p) - torch.outer(p, p)
    if likelihood == "bernoulli":
        return torch.diag(torch.sigmoid(z) * torch.sigmoid(-z))
    if likelihood == "poisson":
        return torch.diag(torch.exp(z))
    return torch.eye(len(z), dtype=z.dtype) / variance


def streams(model: nn.Module, x: dict | Tensor, keep: Tensor | None = None) -> tuple:
    """One sample: outputs (s, c), inputs a (t, i), Jacobians (s c, t, o) of the linear layers."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    def hook(name: str):
        def take(module: nn.Module, args: tuple, z: Tensor) -> None:
            seen[name] = (args[0].detach(), z)

        return take

    stops = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    z = model(**x) if isinstance(x, dict) else model(x)
    for stop in stops:
        stop.remove()
    z = z.reshape(-1, z.shape[-1])
    if keep is not None:
        z = z[keep]
    a = {n: seen[n][0].reshape(-1, seen[n][0].shape[-1]) for n in names}
    jacobians: dict[str, list[Tensor]] = {n: [] for n in names}
    for value in z.reshape(-1):
        found = torch.autograd.grad(value, [seen[n][1] for n in names], retain_graph=True)
        for n, g in zip(names, found, strict=True):
            jacobians[n].append(g.reshape(-1, g.shape[-1]))
    stacked = {n: torch.stack(g) for n, g in jacobians.items()}
    if keep is not None:
        a = {n: v[keep] for n, v in a.items()}
        stacked = {n: v[:, keep] for n, v in stacked.items()}
    return z.detach(), a, stacked


def dense(
    model: nn.Module, samples: list, likelihood: str, keeps: list | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (A, G)} of the exact Fisher, of inputs that hold one sample each."""
    total_a: dict[str, Tensor] = {}
    total_g: dict[str, Tensor] = {}
    rows = 0
    for k, x in enumerate(samples):
        z, a, jacobians = streams(model, x, None if keeps is None else keeps[k])
        h = torch.block_diag(*[hessian(row, likelihood) for row in z])
        rows += len(next(iter(a.values())))
        for n, ja in jacobians.items():
            inputs = a[n]
            if model.get_submodule(n).bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            total_a[n] = total_a.get(n, 0) + inputs.mT @ inputs
            total_g[n] = total_g.get(n, 0) + torch.einsum("pto,pq,qtu->ou", ja, h, ja)
    return {n: (total_a[n] / rows, total_g[n] / len(samples)) for n in total_a}

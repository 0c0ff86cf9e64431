"""Primitives of architectures as small modules, and the notation that lists them.

``linear, linear+bias, conv, relu|gelu|silu|tanh|relu2|sigmoid|…, mlp:ACT, swiglu, geglu, reglu,
glu, bilinear, attention, layer_norm, rms_norm, moe:ACT, residual(…), dag``; ``name*3`` repeats,
``+bias`` adds biases. A list of them is a chain; ``residual(a, b)`` is x + b(a(x)).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast import _check

WIDTH = 4  # channels of a network made from primitives
HIDDEN = 6  # of its feed-forward blocks
TOKENS = 3


class Squared(nn.Module):
    """ReLU²."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "relu2": Squared,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,  # the gate of a bilinear unit
}
GATES = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "glu": "sigmoid",
    "bilinear": "identity",
}


class MLP(nn.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., i)."""
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """down(act(gate x) · up x): SwiGLU and its kin."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias)
        self.up = nn.Linear(width, hidden, bias)
        self.act = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., i)."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Softmax attention with queries, keys, values and an output map, all heads of equal width."""

    def __init__(
        self, width: int, heads: int = 1, causal: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, i) -> (n, t, i)."""
        q, k, v = (
            m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """A mixture of MLP experts weighted by a softmax router."""

    def __init__(self, width: int, hidden: int, activation: str, count: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(MLP(width, hidden, activation) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., i)."""
        share = self.router(x).softmax(-1)
        return torch.stack([e(x) * share[..., [k]] for k, e in enumerate(self.experts)]).sum(0)


class Residual(nn.Module):
    """x + blocks(x)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., i)."""
        return x + self.blocks(x)


class Dag(nn.Module):
    """Blocks on a graph without cycles; what enters a node is summed.

    Args:
        nodes: {name: (block or None, names of what it reads)}, in an order in which every node
            comes after what it reads; ``"input"`` is the input and the last node the output.
            None is a node that only adds.
    """

    def __init__(self, nodes: Mapping[str, tuple[nn.Module | None, Sequence[str]]]) -> None:
        super().__init__()
        if not nodes:
            raise _check.fail("nodes", nodes, "at least one node")
        known = {"input"}
        self.reads: dict[str, tuple[str, ...]] = {}
        self.blocks = nn.ModuleDict()
        for name, (block, reads) in nodes.items():
            missing = [r for r in reads if r not in known]
            if missing or not reads:
                raise _check.fail("nodes", {name: reads}, f"names among {sorted(known)}")
            known.add(name)
            self.reads[name] = tuple(reads)
            if block is not None:
                self.blocks[name] = block

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., i)."""
        values = {"input": x}
        for name, reads in self.reads.items():
            total = values[reads[0]]
            for other in reads[1:]:
                total = total + values[other]
            values[name] = self.blocks[name](total) if name in self.blocks else total
        return values[name]


def _convolution(width: int, bias: bool) -> nn.Module:
    return nn.Conv1d(width, width, 3, padding=1, bias=bias)


def primitive(name: str, argument: str | None, bias: bool, inner: Sequence[nn.Module]) -> nn.Module:
    """One module from its name."""
    act = argument or "gelu"
    if name in ("mlp", "moe") and act not in ACTIVATIONS:
        raise _check.fail("blocks", f"{name}:{act}", f"an activation among {sorted(ACTIVATIONS)}")
    if name == "linear":
        return nn.Linear(WIDTH, WIDTH, bias)
    if name == "conv":
        return _convolution(WIDTH, bias)
    if name == "mlp":
        return MLP(WIDTH, HIDDEN, act, bias)
    if name in GATES:
        return GatedMLP(WIDTH, HIDDEN, GATES[name], bias)
    if name == "attention":
        return Attention(WIDTH, bias=bias)
    if name == "layer_norm":
        return nn.LayerNorm(WIDTH)
    if name == "rms_norm":
        return nn.RMSNorm(WIDTH)
    if name == "moe":
        return Experts(WIDTH, HIDDEN, act)
    if name == "residual":
        if not inner:
            raise _check.fail("blocks", "residual", "blocks in parentheses: residual(mlp:gelu)")
        return Residual(*inner)
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    raise _check.fail("blocks", name, f"a primitive among {sorted(names())}")


def names() -> list[str]:
    """Every primitive."""
    return [
        "linear", "conv", "mlp", "attention", "layer_norm", "rms_norm", "moe", "residual",
        *GATES, *ACTIVATIONS,
    ]  # fmt: skip


_TOKEN = re.compile(r"\s*([A-Za-z_0-9]+|[:+*(),])")


def parse(text: str) -> list[nn.Module]:
    """Modules from the notation, e.g. ``"linear*2, residual(layer_norm, mlp:gelu+bias)*3"``."""
    tokens, at = [], 0
    text = text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _check.fail("blocks", text, f"primitives separated by commas, not {text[at:]!r}")
        tokens.append(found[1])
        at = found.end()
    modules, rest = _list(tokens, text)
    if rest:
        raise _check.fail("blocks", text, f"nothing after {' '.join(rest)!r}")
    return modules


def _list(tokens: list[str], text: str) -> tuple[list[nn.Module], list[str]]:
    out: list[nn.Module] = []
    while True:
        items, tokens = _item(tokens, text)
        out += items
        if not tokens or tokens[0] != ",":
            return out, tokens
        tokens = tokens[1:]


def _item(tokens: list[str], text: str) -> tuple[list[nn.Module], list[str]]:
    if not tokens or not re.match(r"\w", tokens[0]):
        raise _check.fail("blocks", text, "the name of a primitive")
    name, tokens = tokens[0], tokens[1:]
    argument, bias, count = None, False, 1
    inner_tokens: list[str] = []
    while tokens and tokens[0] in (":", "+", "*", "("):
        mark, tokens = tokens[0], tokens[1:]
        if mark == "(":
            start = tokens
            _, tokens = _list(tokens, text)
            if not tokens or tokens[0] != ")":
                raise _check.fail("blocks", text, "a closing parenthesis")
            inner_tokens = start[: len(start) - len(tokens)]
            tokens = tokens[1:]
            continue
        if not tokens:
            raise _check.fail("blocks", text, f"something after {mark!r}")
        word, tokens = tokens[0], tokens[1:]
        if mark == ":":
            argument = word
        elif mark == "+":
            if word != "bias":
                raise _check.fail("blocks", f"+{word}", "+bias")
            bias = True
        elif not word.isdigit() or not 1 <= int(word) <= 1000:
            raise _check.fail("blocks", f"*{word}", "a count from 1 to 1000")
        else:
            count = int(word)

    def made() -> nn.Module:
        inner = _list(inner_tokens, text)[0] if inner_tokens else []
        return primitive(name, argument, bias, inner)

    return [made() for _ in range(count)], tokens


def chain(blocks: Any) -> nn.Sequential:
    """A module from a string, or from a list of strings and modules, in fp64."""
    if isinstance(blocks, str):
        modules = parse(blocks)
    elif isinstance(blocks, Sequence):
        modules = []
        for k, block in enumerate(blocks):
            if isinstance(block, nn.Module):
                modules.append(copy.deepcopy(block))  # the chain is in fp64, the given one stays
            elif isinstance(block, str):
                modules += parse(block)
            else:
                raise _check.fail(
                    f"blocks[{k}]", block, "a primitive's name or a module", TypeError
                )
    else:
        raise _check.fail("blocks", blocks, "a module, a string or a list of primitives", TypeError)
    if not modules:
        raise _check.fail("blocks", blocks, "at least one primitive")
    return nn.Sequential(*modules).double().eval()


def example(model: nn.Module) -> Tensor:
    """Random inputs for a chain of primitives: (n, t, i), or (n, i, t) for convolutions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, generator=draw)
    convolved = any(isinstance(m, nn.Conv1d) for m in model.modules())
    return x.transpose(1, 2) if convolved else x

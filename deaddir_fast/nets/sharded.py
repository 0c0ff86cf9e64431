"""Models whose parameters are spread over processes: ``fully_shard`` and DTensor.

Every function here that reads a spread parameter is collective: all processes that hold a part of
it must call it, in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def spread(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter or buffer is spread over processes."""
    return any(spread(t) for t in (*model.parameters(), *model.buffers()))


def full(x: Tensor) -> Tensor:
    """The whole of a tensor, detached; collective where it is spread."""
    if not spread(x):
        return x.detach()
    return x.detach().full_tensor()  # type: ignore[attr-defined]


def check_kind(model: nn.Module) -> None:
    """Refuse what cannot be run as it is.

    Raises:
        ValueError: parameters spread otherwise than by ``fully_shard``: with tensor parallelism a
            layer's inputs and outputs are parts too.
    """
    from torch.distributed.fsdp import FSDPModule

    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            inside.update(id(p) for p in module.parameters())
    for name, p in model.named_parameters():
        if spread(p) and (id(p) not in inside or p.device_mesh.ndim > 1):  # type: ignore[attr-defined]
            raise ValueError(
                f"model: {name} is spread over the mesh {p.device_mesh}; "  # type: ignore[attr-defined]
                "expected fully_shard over a mesh of one dimension (a smaller model is gathered: "
                "fp64_up_to)"
            )


def _of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """A module with its parameters whole and without the hooks that gather them; collective."""
    if not is_sharded(module):
        yield
        return
    undo: list[tuple[Any, dict[Any, Any]]] = []
    for part in module.modules():
        undo.append((part._parameters, dict(part._parameters)))
        for name, p in part._parameters.items():
            if p is not None and spread(p):
                part._parameters[name] = nn.Parameter(full(p), requires_grad=False)
        tables: tuple[Any, Any] = (part._forward_pre_hooks, part._forward_hooks)
        for table in tables:
            undo.append((table, dict(table)))
            for key, hook in list(table.items()):
                if _of_torch(hook):
                    del table[key]
    try:
        yield
    finally:
        for table, before in undo:
            table.clear()
            table.update(before)


def gathered(model: nn.Module) -> nn.Module:
    """A copy with whole parameters on every process, and no trace of ``fully_shard``; collective.

    Modules that ``fully_shard`` has taken hold of refuse to be copied, so the copy is put together
    module by module.
    """
    from torch.distributed.fsdp import FSDPModule

    memo: dict[int, Any] = {}
    twins: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        kind: Any = type(module)
        if isinstance(module, FSDPModule):
            kind = kind.__mro__[2]  # (FSDPLinear, FSDPModule, Linear, ...)
        twin = kind.__new__(kind)
        memo[id(module)] = twin
        twins.append((module, twin))
        for table in (module._parameters, module._buffers):
            for t in table.values():
                if t is None or id(t) in memo:
                    continue
                value = full(t).clone()
                parameter = isinstance(t, nn.Parameter)
                memo[id(t)] = nn.Parameter(value, requires_grad=False) if parameter else value
    for module, twin in twins:
        for key, value in module.__dict__.items():
            if key in HOOKS:
                value = type(value)((k, h) for k, h in value.items() if not _of_torch(h))
            twin.__dict__[key] = copy.deepcopy(value, memo)
    found = memo[id(model)]
    assert isinstance(found, nn.Module)
    return found

"""Models whose parameters are spread over processes: ``fully_shard`` and DTensor.

Every function here that reads a spread parameter is collective: all processes that hold a part of
it must call it, in the same order.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
#: What ``fully_shard`` leaves in a module besides hooks.
_MARKS = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


def spread(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    # Slow to import, and there can be none before somebody else has.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def _units(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` has taken hold of."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class it had before ``fully_shard``."""
    # (FSDPLinear, FSDPModule, Linear, ...)
    return type(module).__mro__[2] if module in _units(module) else type(module)


def alone(model: nn.Module) -> set[nn.Module]:
    """Modules that gather their own parameters: what reaches them is a new tensor each time."""
    return set(_units(model))


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are spread over processes, gathered for now or not."""
    return bool(_units(model)) or any(map(spread, (*model.parameters(), *model.buffers())))


def full(x: Tensor) -> Tensor:
    """A copy of the whole of a tensor; collective where it is spread."""
    # A copy: memory that others look into cannot be freed by ``fully_shard``.
    return x.detach().full_tensor() if spread(x) else x.detach().clone()  # type: ignore[attr-defined]


def spread_again(model: nn.Module) -> None:
    """Free what passes have left gathered, so that parameters are the ones ``fully_shard`` keeps.

    The root of a model stays gathered after a forward pass; whatever is done to its parameters
    then (``requires_grad``) is undone by the next pass.
    """
    for unit in _units(model):
        unit.reshard()


def check_kind(model: nn.Module) -> None:
    """Refuse what cannot be run as it is.

    Raises:
        ValueError: parameters spread otherwise than by ``fully_shard``: with tensor parallelism a
            layer's inputs and outputs are parts too.
    """
    inside = {id(p) for unit in _units(model) for p in unit.parameters()}
    for name, p in model.named_parameters():
        if spread(p) and (id(p) not in inside or p.device_mesh.ndim > 1):  # type: ignore[attr-defined]
            raise ValueError(
                f"model: {name} is spread over the mesh {p.device_mesh}; "  # type: ignore[attr-defined]
                "expected fully_shard over a mesh of one dimension (a smaller model is gathered: "
                "fp64_up_to)"
            )


def _of_torch(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)
    return str(getattr(inner, "__module__", "")).startswith("torch.distributed")


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """A module with its parameters whole and without the hooks that gather them; collective."""
    if not any(map(spread, module.parameters())):
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
    memo: dict[int, Any] = {}
    twins: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        kind: Any = plain_type(module)
        twin = kind.__new__(kind)
        memo[id(module)] = twin
        twins.append((module, twin))
        for table in (module._parameters, module._buffers):
            for t in table.values():
                if t is None or id(t) in memo:
                    continue
                value = full(t)
                parameter = isinstance(t, nn.Parameter)
                memo[id(t)] = nn.Parameter(value, requires_grad=False) if parameter else value
    for module, twin in twins:
        for key, value in module.__dict__.items():
            if key.startswith(_MARKS):
                continue
            if key in _HOOKS:
                value = type(value)((k, h) for k, h in value.items() if not _of_torch(h))
            twin.__dict__[key] = copy.deepcopy(value, memo)
    found = memo[id(model)]
    assert isinstance(found, nn.Module)
    return found

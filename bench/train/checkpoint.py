"""Checkpoints: one safetensors file, tensors in it and everything else as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deaddir_fast._files import replace_file


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for nested containers; tensors go to ``tensors`` under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # its keys need not be strings
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"value: a {type(value).__name__} cannot be saved")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    parts = [_unpack(v, tensors) for v in content]
    return parts if kind == "list" else tuple(parts)


def save(path: Path, content: Any) -> None:
    """Write containers of tensors and plain values, all or nothing.

    Raises:
        TypeError: something else is among them.
    """
    tensors: dict[str, Tensor] = {}
    head = json.dumps(_pack(content, tensors))
    replace_file(path, lambda part: save_file(tensors, part, {"content": head}))


def load(path: Path) -> Any:
    """What :func:`save` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpack(json.loads(file.metadata()["content"]), tensors)

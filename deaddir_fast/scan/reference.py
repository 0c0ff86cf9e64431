"""Networks named on the command line: ``package.module:callable``, ``path/to/file.py:callable``.

The callable takes no arguments and returns an ``nn.Module``. Its code runs: name what you trust.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from torch import nn


def is_reference(text: str) -> bool:
    """Whether ``text`` is written as ``module:callable`` or ``file.py:callable``."""
    path, colon, attribute = text.rpartition(":")
    if not colon or not attribute.isidentifier():
        return False
    return path.endswith(".py") or all(part.isidentifier() for part in path.split("."))


def _file(path: Path) -> ModuleType:
    """The module in a file; files beside it can be imported, as ``python file.py`` has it."""
    if not path.is_file():
        raise ImportError(f"{path}: no such file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"_deaddir_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def build(argument: str, reference: str) -> nn.Module:
    """The module that the callable named by ``reference`` returns.

    Args:
        argument: what to call it in errors.
        reference: ``module:callable``, also of the current folder, or ``file.py:callable``.

    Raises:
        ImportError: if there is no such file or module.
        AttributeError, TypeError: if it has no such callable, or another thing is returned.
    """
    path, _, attribute = reference.rpartition(":")
    if path.endswith(".py"):
        module = _file(Path(path))
    else:
        if os.getcwd() not in sys.path:  # as `python -m` does
            sys.path.insert(0, os.getcwd())
        module = importlib.import_module(path)
    function = getattr(module, attribute)
    if not callable(function):
        raise TypeError(f"{argument}: {reference} is a {type(function).__name__}, not callable")
    model = function()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{argument}: {reference} returned {type(model).__name__}, not an nn.Module"
        )
    return model

"""The C++ kernels, or the reason they are not there.

The extension is optional: without it every operation runs on its torch reference. Where a build
expects it, ``DDF_REQUIRE_EXT=1`` turns its absence into an error, so that a broken build cannot
pass for a machine without a compiler.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch  # noqa: F401  first, so that both share the OpenMP runtime that torch brings

extension: ModuleType | None = None
"""``deaddir_fast._C``, or ``None`` where it is not installed or does not load."""

why_not: str | None = None
"""Why :data:`extension` is ``None``; ``None`` where it is there."""

try:
    extension = importlib.import_module("deaddir_fast._C")
except ImportError as error:
    if os.environ.get("DDF_REQUIRE_EXT", "") not in ("", "0"):
        raise ImportError(
            "DDF_REQUIRE_EXT is set and the C++ extension deaddir_fast._C does not load "
            f"({error}); build it with: pip install --no-build-isolation --no-deps -e ."
        ) from error
    why_not = f"deaddir_fast._C does not load: {error}"

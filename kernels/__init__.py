"""Triton kernels, one file per operation: jit functions, launcher, configurations, AOT cases.

Importing a file of kernels queries no device and compiles nothing. Names, index letters and
meaning are those of ``deaddir_fast.ops``.
"""

from __future__ import annotations

import os

#: Whether the kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when
#: a kernel is defined, so it has to be set before Python starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return INTERPRETED

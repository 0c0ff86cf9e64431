"""Launchers of the Triton kernels, one file per family; names are those of the operations.

Triton is imported at the first launch.
"""

from deaddir_fast.ops._triton.curvature import (
    directional_curvature,
    directional_curvature_rank1,
)
from deaddir_fast.ops._triton.gram import gram, gram_, gram_packed, gram_packed_

__all__ = [
    "directional_curvature",
    "directional_curvature_rank1",
    "gram",
    "gram_",
    "gram_packed",
    "gram_packed_",
]

"""Launchers of the C++ kernels, one file per family; names are those of the operations."""

from deaddir_fast.ops._cpu.curvature import directional_curvature
from deaddir_fast.ops._cpu.gram import gram, gram_, gram_packed, gram_packed_
from deaddir_fast.ops._cpu.softmax import linear_softmax_fisher, softmax_fisher, softmax_kl

__all__ = [
    "directional_curvature",
    "gram",
    "gram_",
    "gram_packed",
    "gram_packed_",
    "linear_softmax_fisher",
    "softmax_fisher",
    "softmax_kl",
]

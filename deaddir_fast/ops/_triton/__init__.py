"""Launchers of the Triton kernels, one file per family; names are those of the operations.

Triton is imported at the first launch.
"""

from deaddir_fast.ops._triton.gram import gram, gram_, gram_packed, gram_packed_
from deaddir_fast.ops._triton.softmax import linear_softmax_fisher, softmax_fisher, softmax_kl

__all__ = [
    "gram",
    "gram_",
    "gram_packed",
    "gram_packed_",
    "linear_softmax_fisher",
    "softmax_fisher",
    "softmax_kl",
]

"""Launchers of the Triton kernels, one file per family; names are those of the operations.

Triton is imported at the first launch.
"""

from deaddir_fast.ops._triton.adam import scaled_adam_, scaled_squares, shared_adam_
from deaddir_fast.ops._triton.block import block_adam_, block_products
from deaddir_fast.ops._triton.curvature import (
    directional_curvature,
    directional_curvature_rank1,
    directional_scores,
    directional_scores_rank1,
)
from deaddir_fast.ops._triton.gram import gram, gram_, gram_packed, gram_packed_
from deaddir_fast.ops._triton.kron import (
    kron_matvec,
    kron_quadratic,
    kron_quadratic_rank1,
    kron_solve,
)
from deaddir_fast.ops._triton.softmax import linear_softmax_fisher, softmax_fisher, softmax_kl

__all__ = [
    "block_adam_",
    "block_products",
    "directional_curvature",
    "directional_curvature_rank1",
    "directional_scores",
    "directional_scores_rank1",
    "gram",
    "gram_",
    "gram_packed",
    "gram_packed_",
    "kron_matvec",
    "kron_quadratic",
    "kron_quadratic_rank1",
    "kron_solve",
    "linear_softmax_fisher",
    "scaled_adam_",
    "scaled_squares",
    "shared_adam_",
    "softmax_fisher",
    "softmax_kl",
]

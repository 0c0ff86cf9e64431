"""Operations on plain tensors: what they mean, exact torch references, compiled kernels.

Index letters everywhere: n samples, t tokens, i inputs, o outputs, p directions, r radii, c
classes. Results are fp64 if any input is, else fp32; 16-bit inputs are summed in fp32. Nothing here
knows of networks.
"""

# The registry comes first: below, the names of the modules become the names of the functions.
from deaddir_fast.ops import _registry  # noqa: F401 # registers torch.ops.deaddir
from deaddir_fast.ops.block_adam import block_adam
from deaddir_fast.ops.block_products import block_products
from deaddir_fast.ops.directional_curvature import directional_curvature
from deaddir_fast.ops.directional_curvature_rank1 import directional_curvature_rank1
from deaddir_fast.ops.directional_scores import directional_scores
from deaddir_fast.ops.directional_scores_rank1 import directional_scores_rank1
from deaddir_fast.ops.gram import gram
from deaddir_fast.ops.gram_packed import gram_packed
from deaddir_fast.ops.kron_matvec import kron_matvec
from deaddir_fast.ops.kron_quadratic import kron_quadratic
from deaddir_fast.ops.kron_quadratic_rank1 import kron_quadratic_rank1
from deaddir_fast.ops.kron_solve import kron_solve
from deaddir_fast.ops.linear_softmax_fisher import linear_softmax_fisher
from deaddir_fast.ops.scaled_adam import scaled_adam
from deaddir_fast.ops.scaled_squares import scaled_squares
from deaddir_fast.ops.shared_adam import shared_adam
from deaddir_fast.ops.softmax_fisher import softmax_fisher
from deaddir_fast.ops.softmax_kl import softmax_kl

__all__ = [
    "block_adam",
    "block_products",
    "directional_curvature",
    "directional_curvature_rank1",
    "directional_scores",
    "directional_scores_rank1",
    "gram",
    "gram_packed",
    "kron_matvec",
    "kron_quadratic",
    "kron_quadratic_rank1",
    "kron_solve",
    "linear_softmax_fisher",
    "scaled_adam",
    "scaled_squares",
    "shared_adam",
    "softmax_fisher",
    "softmax_kl",
]

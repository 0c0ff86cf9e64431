"""G U A on a GPU: two products of `deaddir_fast.kernels._product`, U A first.

U A is one product for all directions where their rows follow each other in memory. Its result is
kept in the type of the sums, or, where everything is bf16, as the three bf16 matrices whose sum it
is: then both products run on the matrix units and lose nothing against fp32, for four bf16
products' worth of arithmetic (fp32 without matrix units takes ten times that of one). fp16 has no
such split: its range is too small for the result of a product.
"""

import torch
from torch import Tensor

from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._product import (
    CONFIGS,
    PIECES,
    Config,
    Product,
    cases,
    product_dtype,
    store,
    width,
    write_shared,
)
from deaddir_fast.ops._blocks import blocks

#: Bytes of temporary storage on the device: enough directions at once to fill it.
WORKSPACE = 256 * 2**20


def kron_matvec(
    out: Tensor,
    A: Tensor,
    G: Tensor,
    U: Tensor,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    widen: bool | None = None,
) -> None:
    """Set out to G U A.

    Args:
        out: (p, o, i), contiguous; fp32, or fp64 if any input is.
        A: (i, i).
        G: (o, o).
        U: (p, o, i).
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        widen: see `product_dtype`.
    """
    p, o, i = U.shape
    if out.numel() == 0:
        return
    first = product_dtype(out.dtype, A, U, widen=widen)
    split = product_dtype(out.dtype, A, G, U, widen=widen) == torch.bfloat16
    second, shape = (torch.bfloat16, (PIECES,)) if split else (out.dtype, ())
    A, G = store(A, first), store(G, second)
    bytes_each = o * width(i) * (first.itemsize + (PIECES if split else 1) * second.itemsize)
    for some in blocks(p, bytes_each, WORKSPACE):
        result = out[some]
        v = out.new_empty((*shape, len(result), o, width(i)), dtype=second)
        options = {"precision": precision, "config": config}
        write_shared(v, store(U[some], first), A, i, **options)
        Product(G.expand(len(result), -1, -1), v, o, i, o, **options).write(result)


#: Below this many entries of U, launching costs as much as the products.
WORTHWHILE_ENTRIES = 2**20


def worthwhile(A: Tensor, G: Tensor, U: Tensor) -> bool:
    """Whether the kernel beats the reference: bf16 on the matrix units against fp32 without."""
    narrow = A.dtype == G.dtype == U.dtype == torch.bfloat16
    return narrow and min(U.shape[1:]) >= 128 and U.numel() >= WORTHWHILE_ENTRIES


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    brain = torch.bfloat16
    found = cases(brain, "U A to pieces", out=brain, out_pieces=PIECES)
    found += cases(brain, "G V from pieces", pieces=PIECES, out_stored=False)
    for dtype in CONFIGS:
        found += cases(dtype, "U A")
        if dtype.itemsize > 2:
            found += cases(dtype, "G V", out_stored=False)
    return found

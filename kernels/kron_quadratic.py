"""tr(U^T G U A) on a GPU, in one of two forms; neither stores its second product.

General: V = U A is stored, G^T U is not: each tile of it is multiplied by the tile of V and summed
to one number. 2 p o i (o + i) FLOP. 16-bit factors and directions are multiplied as they are, on
the matrix units, with fp32 sums.

Cholesky: with A = M M^T and G = L L^T the form is the squared size of L^T U M. Half of M and of L
is zero, so a tile takes half the depth on average, and the result cannot be negative: rounding
enters relative to the root of the value, not to |A| |G| |U|^2. p o i (o + i) FLOP and two
factorisations, in fp64. It needs factors that are positive definite and symmetric to the last bit,
which rounded Gram matrices need not be; then the general form is taken. So it is with 16-bit
factors, whose Cholesky factors have more digits than the type.

The sums of the tiles are added in a second step, in fp64 and in a fixed order.

Source: the two forms are our choice.
"""

import torch
from torch import Tensor

from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._product import (
    CONFIGS,
    Config,
    Product,
    cases,
    product_dtype,
    store,
    width,
    write_shared,
)
from deaddir_fast.kernels.kron_matvec import WORKSPACE, WORTHWHILE_ENTRIES
from deaddir_fast.ops._blocks import blocks
from deaddir_fast.ops.kron_quadratic import cholesky_factors

#: An fp64 factorisation takes about as long as a product of this many times its operations; our
#: estimate, not measured.
FACTORISATION_COST = 8


def pays(p: int, o: int, i: int, block: int = 128) -> bool:
    """Whether half the products save more operations than the factorisations cost."""
    saved = p * o * i * (max(0, o - block) + max(0, i - block))
    return 3 * saved > FACTORISATION_COST * (o**3 + i**3)


def capturing(U: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which cannot wait for the device."""
    return U.is_cuda and torch.cuda.is_current_stream_capturing()


def kron_quadratic(
    A: Tensor,
    G: Tensor,
    U: Tensor,
    total: torch.dtype,
    *,
    cholesky: bool | None = None,
    precision: str = "ieee",
    config: Config | None = None,
    widen: bool | None = None,
) -> Tensor:
    """Return tr(U^T G U A) for each direction, clamped at 0.

    Args:
        A: (i, i).
        G: (o, o).
        U: (p, o, i).
        total: fp32, or fp64 if any input is: the type of sums and result.
        cholesky: which form; by default Cholesky where it pays and the factors allow it. True
            takes it wherever they allow it.
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        widen: see `product_dtype`.
    """
    p, o, i = U.shape
    if U.numel() == 0:
        return U.new_zeros(p, dtype=total)
    first = product_dtype(total, A, U, widen=widen)
    second = product_dtype(total, G, U, widen=widen)
    if cholesky is None:
        cholesky = first == second == total and pays(p, o, i) and not capturing(U)
    triangles = cholesky_factors(A, G) if cholesky else None
    options = {"precision": precision, "config": config}
    if triangles is None:
        right, left = store(A, first), store(G, second)
    else:
        first, second = total, total
        right, left = (store(root, total) for root in triangles)
    sums = []
    for some in blocks(p, o * width(i) * (first.itemsize + total.itemsize), WORKSPACE):
        u = store(U[some], first)
        v = u.new_empty(u.shape, dtype=total)
        tall = left.expand(len(u), -1, -1)
        if triangles is None:
            write_shared(v, u, right, i, **options)
            again = u if first == second else store(U[some], second)
            product = Product(tall, again, o, i, o, left_transposed=True, **options)
            sums.append(product.sum(v))
        else:
            write_shared(v, u, right, i, start="column", **options)
            product = Product(tall, v, o, i, o, left_transposed=True, start="row", **options)
            sums.append(product.sum())
    return torch.cat(sums).clamp(min=0).to(total)


def worthwhile(A: Tensor, G: Tensor, U: Tensor) -> bool:
    """Whether the kernel beats the reference: 16-bit on the matrix units against fp32 without.

    In fp32 and fp64 the vendor's products are left to run until a measurement says otherwise.
    """
    narrow = A.dtype.itemsize == 2 and A.dtype == G.dtype == U.dtype
    return narrow and min(U.shape[1:]) >= 128 and U.numel() >= WORTHWHILE_ENTRIES


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched.

    U A itself is in the list of `deaddir_fast.kernels.kron_matvec`.
    """
    found: list[Case] = []
    for dtype in CONFIGS:
        found += cases(dtype, "G^T U times U A", epilogue="dot", left_transposed=True)
        if dtype.itemsize > 2:
            found += cases(dtype, "U M", start="column")
            found += cases(dtype, "L^T U M", start="row", epilogue="square", left_transposed=True)
    return found

"""Every operation of ``torch.ops.deaddir``: name and schema.

Read it as a table of contents. Operation X is explained in ``ops/X.py``, with its reference and its
shape rule; its C++ kernel is ``csrc/X.cpp`` (launched in ``_cpu/``), its Triton kernel
``kernels/X.py`` (``_triton/``), its tests ``tests/ops/test_X.py``. A trailing underscore marks
the form that writes its first argument.
"""

from __future__ import annotations

from importlib import import_module

from deaddir_fast.ops import _cpu, _triton
from deaddir_fast.ops._dispatch import Op, register

TABLE: tuple[tuple[str, str], ...] = (
    # Gram matrices
    ("gram", "(Tensor x, Tensor? weight, float alpha) -> Tensor"),
    ("gram_", "(Tensor(a!) out, Tensor x, Tensor? weight, float alpha, float beta) -> ()"),
    ("gram_packed", "(Tensor x, Tensor? weight, float alpha) -> Tensor"),
    ("gram_packed_", "(Tensor(a!) out, Tensor x, Tensor? weight, float alpha, float beta) -> ()"),
    # Kronecker factors
    ("kron_matvec", "(Tensor A, Tensor G, Tensor U) -> Tensor"),
    ("kron_solve", "(Tensor A, Tensor G, Tensor U, float damping) -> Tensor"),
    ("kron_quadratic", "(Tensor A, Tensor G, Tensor U) -> Tensor"),
    ("kron_quadratic_rank1", "(Tensor A, Tensor G, Tensor v, Tensor w) -> Tensor"),
    # the samples of one layer
    ("directional_curvature", "(Tensor a, Tensor g, Tensor U) -> Tensor"),
    ("directional_curvature_rank1", "(Tensor a, Tensor g, Tensor v, Tensor w) -> Tensor"),
    ("directional_scores", "(Tensor a, Tensor g, Tensor U) -> Tensor"),
    ("directional_scores_rank1", "(Tensor a, Tensor g, Tensor v, Tensor w) -> Tensor"),
    # categorical outputs
    ("softmax_fisher", "(Tensor logits, Tensor tangent) -> Tensor"),
    (
        "linear_softmax_fisher",
        "(Tensor h, Tensor dh, Tensor W, Tensor? bias, Tensor? dW) -> Tensor",
    ),
    ("softmax_kl", "(Tensor logits, Tensor logits_t) -> Tensor"),
    # optimizer steps on lists of matrices
    ("scaled_squares", "(Tensor[] ws, Tensor?[] rows, Tensor?[] cols, int[] dims) -> Tensor"),
    (
        "scaled_adam_",
        "(Tensor(a!)[] ws, Tensor[] gs, Tensor(b!)[] ms, Tensor(c!)[] vs, Tensor?[] rows, "
        "Tensor?[] cols, Tensor hyper, bool maximize, int seed) -> ()",
    ),
    (
        "shared_adam_",
        "(Tensor(a!)[] ws, Tensor[] gs, Tensor(b!)[] ms, Tensor(c!)[] vs, Tensor?[] rows, "
        "Tensor?[] cols, Tensor?[] row_groups, Tensor?[] col_groups, Tensor hyper, "
        "bool maximize, int seed) -> ()",
    ),
    (
        "block_products",
        "(Tensor[] ws, Tensor[] gs, Tensor[] blocks, int[] dims, int count) -> Tensor",
    ),
    (
        "block_adam_",
        "(Tensor(a!)[] ws, Tensor[] gs, Tensor(b!)[] ms, Tensor(c!)[] vs, Tensor[] blocks, "
        "int[] dims, Tensor norms, Tensor inner, Tensor radial, Tensor reach, Tensor hyper, "
        "bool maximize, int seed) -> ()",
    ),
)

for name, schema in TABLE:
    module = import_module(f"deaddir_fast.ops.{name.removesuffix('_')}")
    suffix = "_" if name.endswith("_") else ""
    reference, fake = getattr(module, f"reference{suffix}"), getattr(module, f"fake{suffix}")
    compiled = (getattr(family, name, None) for family in (_cpu, _triton))
    register(Op(name, schema, reference, fake, tuple(k for k in compiled if k is not None)))

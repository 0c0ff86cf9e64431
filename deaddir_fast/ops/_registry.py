"""Every operation of ``torch.ops.deaddir``: name, schema, compiled kernels.

Read it as a table of contents. Operation X is explained in ``ops/X.py``, with its reference and its
shape rule; its C++ kernel is ``csrc/X.cpp`` (launched in ``_cpu.py``), its Triton kernel
``kernels/X.py`` (``_triton.py``), its tests ``tests/ops/test_X.py``. A trailing underscore marks
the form that writes its first argument.
"""

from __future__ import annotations

from importlib import import_module

from deaddir_fast.ops import _cpu, _triton
from deaddir_fast.ops._dispatch import Kernel, Op, register

# fmt: off
TABLE: tuple[tuple[str, str, tuple[Kernel, ...]], ...] = (
    # Gram matrices
    ("gram",
     "(Tensor x, Tensor? weight, float alpha) -> Tensor", (_triton.gram,)),
    ("gram_",
     "(Tensor(a!) out, Tensor x, Tensor? weight, float alpha, float beta) -> ()",
     (_triton.gram_,)),
    ("gram_packed",
     "(Tensor x, Tensor? weight, float alpha) -> Tensor", (_triton.gram_packed,)),
    ("gram_packed_",
     "(Tensor(a!) out, Tensor x, Tensor? weight, float alpha, float beta) -> ()",
     (_triton.gram_packed_,)),
    # Kronecker factors
    ("kron_matvec", "(Tensor A, Tensor G, Tensor U) -> Tensor", ()),
    ("kron_solve", "(Tensor A, Tensor G, Tensor U, float damping) -> Tensor", ()),
    ("kron_quadratic", "(Tensor A, Tensor G, Tensor U) -> Tensor", ()),
    ("kron_quadratic_rank1", "(Tensor A, Tensor G, Tensor v, Tensor w) -> Tensor", ()),
    # the samples of one layer
    ("directional_curvature",
     "(Tensor a, Tensor g, Tensor U) -> Tensor", (_cpu.directional_curvature,)),
    ("directional_curvature_rank1", "(Tensor a, Tensor g, Tensor v, Tensor w) -> Tensor", ()),
    # categorical outputs
    ("softmax_fisher", "(Tensor logits, Tensor tangent) -> Tensor", ()),
    ("linear_softmax_fisher",
     "(Tensor h, Tensor dh, Tensor W, Tensor? bias, Tensor? dW) -> Tensor", ()),
    ("softmax_kl", "(Tensor logits, Tensor logits_t) -> Tensor", ()),
)
# fmt: on

for name, schema, kernels in TABLE:
    module = import_module(f"deaddir_fast.ops.{name.removesuffix('_')}")
    suffix = "_" if name.endswith("_") else ""
    reference, fake = getattr(module, f"reference{suffix}"), getattr(module, f"fake{suffix}")
    register(Op(name, schema, reference, fake, kernels))

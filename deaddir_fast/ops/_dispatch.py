"""From an operation's name and arguments to the code that runs it.

Under `torch.compile`, a dispatch mode (fake tensors, `make_fx`) or on fake and meta tensors the
registered operator ``torch.ops.deaddir.<name>`` is called, so that it shows up as one node.
Otherwise the dispatcher is bypassed and the launcher of the route runs at once; the registered
operator's device kernels are this same launcher.

A route is "reference" (plain torch, always there), "cpu" (C++) or "triton". Compiled kernels read
raw memory, so they see only plain dense tensors: tensor subclasses and tensors inside a functorch
transform or forward-mode differentiation go to the reference, which torch differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from deaddir_fast._backend import current, unavailable

NAMESPACE = "deaddir"

#: Tensors whose memory is what it says; subclasses may wrap something else.
PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Kernel:
    """A compiled implementation of an operation on one route.

    ``problem`` says why it cannot take these arguments (None: it can); ``worthwhile`` says whether
    it beats the reference on them, which matters only when no route is forced.
    """

    route: str
    run: Callable[..., Any]
    problem: Callable[..., str | None]
    worthwhile: Callable[..., bool]


@dataclass(frozen=True)
class Op:
    """One operation: its name, schema, reference, shape rule and compiled kernels."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    kernels: tuple[Kernel, ...] = ()


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Define ``torch.ops.deaddir.<op.name>`` on every device and enter it in `OPS`."""
    qualified = f"{NAMESPACE}::{op.name}"
    torch.library.define(qualified, op.schema)
    torch.library.register_fake(qualified, op.fake)

    def kernel(*args: Any) -> Any:
        return launch(op.name, *args)

    torch.library.register_kernel(qualified, ("cpu", "cuda", "xpu"), kernel)
    if "!" not in op.schema:

        def refuse(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{qualified}: no gradient is defined; detach the inputs")

        torch.library.register_autograd(qualified, refuse)
    OPS[op.name] = op


def tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the arguments, those in lists included."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [t for t in value if isinstance(t, Tensor)]
    return iter(found)


def call(name: str, *args: Any) -> Any:
    """Run an operation whose arguments have been checked."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors(args))
    ):
        return getattr(getattr(torch.ops, NAMESPACE), name).default(*args)
    return launch(name, *args)


def chosen_route(name: str, *args: Any) -> str:
    """The route :func:`launch` would take: "reference", "cpu" or "triton"."""
    kernel = _chosen(name, args)
    return "reference" if kernel is None else kernel.route


def _chosen(name: str, args: tuple[Any, ...]) -> Kernel | None:
    op = OPS[name]
    route = current()
    if route == "reference" or not op.kernels or not _plain(list(tensors(args))):
        return None
    for kernel in op.kernels:
        if route == "auto":
            if (
                kernel.problem(*args) is None
                and kernel.worthwhile(*args)
                and unavailable(kernel.route) is None
            ):
                return kernel
        elif route == kernel.route:
            problem = unavailable(route) or kernel.problem(*args)
            if problem is not None:
                raise RuntimeError(f"{name}: backend {route!r} is forced, but {problem}")
            return kernel
    return None


def launch(name: str, *args: Any) -> Any:
    """Run an operation on the route in force, or on the best one that can take the arguments."""
    kernel = _chosen(name, args)
    if kernel is not None:
        return kernel.run(*args)
    with _full_precision(args):
        return OPS[name].reference(*args)


def _plain(values: list[Tensor]) -> bool:
    """Whether a kernel that reads raw memory may take these arguments."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not values or (
        forward_ad._current_level < 0
        and all(type(t) in PLAIN and not wrapped(t) and not t.is_neg() for t in values)
    )


@contextmanager
def _full_precision(args: tuple[Any, ...]) -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever the process allows for training.

    TF32 or bf16 products carry 1e-3 relative error, which a reading would report as curvature.
    The switch is one of the process: a matrix product of another thread may see it.
    """
    first = next(tensors(args), None)
    if first is None or first.dtype == torch.float64:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # set at run time
    if first.is_cuda:
        settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if before in ("ieee", "none"):
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before

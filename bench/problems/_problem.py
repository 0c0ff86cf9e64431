"""The parts of a problem: seeded inputs, torch formulations, truth, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]


class Draw:
    """Seeded inputs of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Independent normal entries of standard deviation ``scale``."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = torch.randn(shape, generator=self._generator, dtype=wide, device=self.device)
        return x.mul_(scale).to(self.dtype)

    def factor(self, size: int) -> Tensor:
        """A well-conditioned Kronecker factor: the mean of x x^T over twice ``size`` samples."""
        x = self.normal(2 * size, size)
        x = x if x.dtype == torch.float64 else x.float()
        square = (x.mT @ x) / (2 * size)
        return (square.tril() + square.tril(-1).mT).to(self.dtype)


@dataclass(frozen=True)
class Form:
    """One way to write an operation in PyTorch, and why a good user would."""

    name: str
    why: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """An operation on inputs of one kind.

    ``build`` draws the arguments that ``ours``, ``truth`` (which gets them in fp64) and the forms
    take. ``flops`` is the least arithmetic known, as the docstring of the operation states it;
    the bytes that must move are those of inputs and result. ``by_element`` measures the error of
    each element (results that are sums of positive terms), else of the whole (relative RMS).
    ``small`` are sizes for checks; ``registered`` turns the arguments into those of the operator
    in ``torch.ops.deaddir``. ``contiguous``: it takes no strided arguments.

    Where ``written`` is given, ``ours``, ``truth`` and the forms write to their arguments and
    return nothing: it makes the result of the arguments afterwards. ``moved`` gives the bytes that
    have to move, from the arguments, where they are not those of inputs and result.
    """

    name: str
    op: str
    build: Callable[[Sizes, Draw], tuple[Any, ...]]
    ours: Callable[..., Any]
    truth: Callable[..., Any]
    flops: Callable[[Sizes], float]
    small: tuple[Sizes, ...]
    by_element: bool
    forms: tuple[Form, ...] = ()
    registered: Callable[..., tuple[Any, ...]] = field(default=lambda *args: args)
    contiguous: bool = False
    written: Callable[..., Tensor] | None = None
    moved: Callable[[tuple[Any, ...]], float] | None = None

    def result(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        """What ``run`` makes of the arguments, which stay as they are."""
        if self.written is None:
            return run(*args)
        copies = self.fresh(args)
        run(*copies)
        return self.written(*copies)

    def fresh(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments that may be written."""
        if self.written is None:
            return args
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)

    def bytes(self, args: tuple[Any, ...], truth: Tensor) -> float:
        """Bytes that have to move."""
        if self.moved is not None:
            return self.moved(args)
        inputs = sum(x.nbytes for x in args if isinstance(x, Tensor))
        return inputs + truth.numel() * (8 if args[0].dtype == torch.float64 else 4)


def wide(x: Tensor) -> Tensor:
    """16-bit tensors in fp32, others as they are."""
    return x.float() if x.dtype.itemsize == 2 else x


def in_fp64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in fp64, exactly; whole numbers stay what they are."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def chunks(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of ``step``."""
    for start in range(0, length, max(1, step)):
        yield slice(start, start + max(1, step))

"""One ahead-of-time compilation of a kernel: what to compile, and what must come out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Triton's names of the types.
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Case:
    """A kernel with the types, constants and options of one variant.

    ``aligned`` names the pointers and integers that a launch finds divisible by 16, as the
    just-in-time compiler would. ``unit`` is the type of the products, "bf16", "fp16", "fp32" or
    "fp64", or what else the kernel does: it decides which instruction must appear. ``helpers`` are
    the jit functions that the kernel calls. ``shared_bound`` is the shared memory in bytes by which
    configurations are pruned: the code may need no more (0: nothing is promised). ``fusion`` allows
    fused multiply-adds.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...]
    unit: str
    helpers: tuple[Any, ...] = ()
    shared_bound: int = 0
    fusion: bool = True

    @property
    def name(self) -> str:
        """A readable name: kernel, variant, tile, options."""
        tile = (v for k, v in self.constants.items() if k.startswith(("BLOCK", "DEPTH")))
        sizes = "x".join(map(str, tile))
        kernel = self.kernel.__name__
        return f"{kernel} {self.label} {sizes} w{self.warps} s{self.stages}"

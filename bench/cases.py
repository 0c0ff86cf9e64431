"""The sizes that are measured: on a CPU, on a GPU, in order of importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.problems import PROBLEMS, Problem

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Case:
    """A problem at one size.

    ``target`` is the speed-up over the best formulation that is aimed at, ``share`` the part of
    the bound, ``memory`` the part of the formulations' peak memory that may be used; 0 where none
    is set. ``weigh`` measures memory on a CPU too, in processes of its own. ``compile`` adds the
    fastest formulation under torch.compile on a GPU and makes the case a headline.
    """

    problem: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    target: float = 0
    share: float = 0
    memory: float = 0
    weigh: bool = False
    compile: bool = False

    @property
    def of(self) -> Problem:
        """The problem itself."""
        return PROBLEMS[self.problem]

    @property
    def shape(self) -> str:
        """The sizes, readably."""
        return " ".join(f"{k}={v}" for k, v in self.sizes.items())

    @property
    def name(self) -> str:
        """A readable name, unique among the cases."""
        return f"{self.problem} {self.shape} {NAMES[self.dtype]}"


def _case(problem: str, dtype: torch.dtype = torch.float32, /, **rest: float) -> Case:
    """Keywords of one letter are sizes."""
    sizes = {k: int(v) for k, v in rest.items() if len(k) == 1}
    options = {k: v for k, v in rest.items() if len(k) > 1}
    return Case(problem, sizes, dtype, **options)  # type: ignore[arg-type]


FP64, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16

CPU: tuple[Case, ...] = (
    _case("directional_curvature", n=1024, o=512, i=512, p=64, target=3),
    _case("directional_curvature", n=64, o=64, i=64, p=8),
    _case("directional_curvature", FP64, n=512, o=256, i=256, p=16),
    _case("directional_curvature_tokens", n=16, t=128, o=512, i=512, p=64, target=1.5),
    _case("directional_curvature_tokens", FP64, n=8, t=64, o=256, i=256, p=16),
    _case("directional_curvature_rank1", n=4096, o=512, i=512, p=16),
    _case("directional_curvature_rank1", FP64, n=2048, o=256, i=256, p=8),
    _case("directional_curvature_rank1_tokens", n=32, t=256, o=512, i=512, p=16),
    _case("directional_scores", n=1024, o=512, i=512, p=16),
    _case("directional_scores_tokens", n=16, t=128, o=512, i=512, p=64),
    _case("directional_scores_rank1", n=4096, o=512, i=512, p=16),
    _case("directional_scores_rank1_tokens", FP64, n=32, t=256, o=256, i=256, p=8),
    _case("gram", n=8192, i=768, target=3),
    _case("gram", BF16, n=8192, i=768),
    _case("gram", n=256, i=64),
    _case("gram", FP64, n=2048, i=384),
    _case("gram_packed", n=8192, i=768),
    _case("gram_update", n=2048, i=768),
    _case("kron_quadratic", o=512, i=768, p=16, target=3),
    _case("kron_quadratic", o=64, i=96, p=8),
    _case("kron_quadratic", FP64, o=256, i=384, p=8),
    _case("kron_matvec", o=512, i=768, p=8),
    _case("kron_solve", FP64, o=192, i=256, p=8),
    _case("kron_quadratic_rank1", o=2048, i=3072, p=8),
    _case("softmax_fisher", n=256, c=32000, p=4, target=8),
    _case("softmax_fisher", n=64, c=1000, p=2),
    _case("softmax_fisher", FP64, n=64, c=32000, p=2),
    _case("softmax_kl", n=256, c=32000, q=4),
    _case("softmax_kl", FP64, n=64, c=32000, q=2),
    _case("linear_softmax_fisher", n=256, d=256, c=32000, p=2, target=3, memory=0.1, weigh=1),
    _case("linear_softmax_fisher", FP64, n=64, d=128, c=8000, p=1),
    _case("scaled_squares_rows", k=4, o=1024, i=1024),
    _case("scaled_squares_columns", BF16, k=4, o=1024, i=1024),
    _case("adamw", k=4, o=1024, i=1024),
    _case("adamw_rounded", BF16, k=4, o=1024, i=1024),
    _case("scaled_adam", k=4, o=1024, i=1024),
    _case("shared_adam", k=4, o=1024, i=1024),
)

GPU: tuple[Case, ...] = (
    _case("gram", BF16, n=32768, i=4096, target=1.6, compile=1),
    _case(
        "linear_softmax_fisher",
        BF16,
        n=4096, d=4096, c=128256, p=1,
        target=2,
        memory=0.05,
        compile=1,
    ),
    _case("softmax_fisher", n=2048, c=128256, p=2, share=0.8, compile=1),
    _case("softmax_kl", n=2048, c=128256, q=2, share=0.8, compile=1),
    _case(
        "directional_curvature_rank1_tokens",
        BF16,
        n=64, t=2048, o=4096, i=4096, p=16,
        share=0.8,
        compile=1,
    ),
    _case("kron_quadratic_rank1", o=16384, i=16384, p=8, share=0.8, compile=1),
    _case("directional_curvature_tokens", BF16, n=64, t=512, o=4096, i=4096, p=64, compile=1),
    _case("directional_curvature", BF16, n=8192, o=4096, i=4096, p=16, compile=1),
    _case("kron_quadratic", o=4096, i=4096, p=16, compile=1),
    _case("kron_matvec", o=4096, i=4096, p=8, compile=1),
    _case("adamw", k=8, o=4096, i=4096, share=0.8, compile=1),
    _case("scaled_adam", k=8, o=4096, i=4096, share=0.8, compile=1),
    _case("shared_adam", k=8, o=4096, i=4096, share=0.8, compile=1),
    _case("scaled_squares_rows", k=8, o=4096, i=4096, share=0.8, compile=1),
    _case("scaled_squares_columns", k=8, o=4096, i=4096, share=0.8),
    _case("adamw_rounded", BF16, k=8, o=4096, i=4096, share=0.8),
    _case("scaled_adam", k=64, o=768, i=770, share=0.8),
    _case("shared_adam", BF16, k=8, o=4096, i=4096, share=0.8),
    _case("scaled_squares_rows", BF16, k=8, o=4096, i=4096, share=0.8),
    _case("gram_packed", BF16, n=32768, i=4096),
    _case("gram_update", BF16, n=32768, i=4096),
    _case("kron_solve", FP64, o=1024, i=1024, p=8),
    _case("linear_softmax_fisher", BF16, n=4096, d=4096, c=128256, p=2, target=2, memory=0.05),
    _case("softmax_fisher", BF16, n=4096, c=128256, p=2, share=0.8),
    _case("softmax_kl", BF16, n=4096, c=128256, q=2, share=0.8),
    _case("directional_curvature_rank1", n=262144, o=1024, i=1024, p=8, share=0.8),
    _case("kron_quadratic", BF16, o=4096, i=4096, p=32),
    _case("kron_matvec", BF16, o=4096, i=4096, p=16),
    _case("gram", n=32768, i=4096),
    _case("gram", FP64, n=16384, i=4096),
    _case("gram", BF16, n=65536, i=1024),
    _case("directional_curvature", n=8192, o=1024, i=1024, p=32),
    _case("kron_quadratic", FP64, o=2048, i=2048, p=8),
    _case("linear_softmax_fisher", n=2048, d=2048, c=32000, p=2),
)  # fmt: skip

#: One of each problem, as small as its first check: to run the whole flow where time means nothing.
TINY: tuple[Case, ...] = tuple(
    Case(problem.name, problem.small[0], compile=problem.name == "gram")
    for problem in PROBLEMS.values()
    if problem.forms
)

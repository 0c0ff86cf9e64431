"""The step of blocks on this CPU against AdamW: `python -m pytest bench/test_block_adam.py`.

Two layers of 2048 x 2048 in fp32, per unit: the row of a hidden unit is one block, its column in
the second layer another. Reported are the medians, their ratio to that of
``torch.optim.AdamW(fused=True)``, and the share of the bound: bytes that must move over the rate of
the fastest copy or AdamW step (a copy alone is no ceiling: it also reads what it overwrites).
Rounds take turns. The step is checked against its reference first; no test fails for being slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import threads_set
from deaddir_fast import ops
from deaddir_fast._backend import backend
from deaddir_fast.ops import _adam

SIZE = 2048
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
#: Bytes an element: w, m, v read and written, g read; what two looks at a block cost (of a layer,
#: or a tall column); w, g read.
ONCE, TWICE, PRODUCTS = 28, 44, 8


class Layers:
    """Two square layers with the state of a step."""

    def __init__(self, size: int, per_unit: bool) -> None:
        torch.manual_seed(0)
        self.ws = [torch.randn(size, size) / size**0.5 for _ in range(2)]
        self.gs = [torch.randn(size, size) for _ in range(2)]
        self.ms = [torch.zeros(size, size) for _ in range(2)]
        self.vs = [torch.zeros(size, size) for _ in range(2)]
        j = torch.arange(size, dtype=torch.int32) if per_unit else torch.zeros(size).int()
        first = size if per_unit else 1
        self.blocks, self.dims, self.count = [j, first + j], [0, 1], 2 * first
        self.hyper = _adam.hyper(1, **OPTIONS)

    def products(self) -> Tensor:
        return ops.block_products(self.ws, self.gs, self.blocks, self.dims, self.count)

    def adam(self, products: Tensor) -> None:
        keep = 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
        norms, inner = keep * products[0].sqrt(), keep * products[1]
        ops.block_adam(
            self.ws, self.gs, self.ms, self.vs, self.blocks, self.dims, norms, inner,
            torch.zeros_like(norms), norms, self.hyper,
        )  # fmt: skip


def adamw(layers: Layers) -> Callable[[], Any]:
    parameters = [torch.nn.Parameter(w.clone()) for w in layers.ws]
    for parameter, g in zip(parameters, layers.gs, strict=True):
        parameter.grad = g
    return torch.optim.AdamW(parameters, fused=True, **OPTIONS).step


def check(per_unit: bool) -> None:
    ours, plain = Layers(96, per_unit), Layers(96, per_unit)
    ours.adam(ours.products())
    with backend("reference"):
        plain.adam(plain.products())
    for x, y in zip((*ours.ws, *ours.ms, *ours.vs), (*plain.ws, *plain.ms, *plain.vs), strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("blocks", ["units", "layers"])
def test_step(benchmark: Any, blocks: str, request: pytest.FixtureRequest) -> None:
    per_unit = blocks == "units"
    check(per_unit)
    with threads_set(request.config.getoption("--threads")):
        layers = Layers(SIZE, per_unit)
        products = layers.products()
        source = torch.randn(2**24)
        target = torch.empty_like(source)
        others = {
            "AdamW fused": adamw(layers),
            "block_products": layers.products,
            "copy": lambda: target.copy_(source),
        }
        samples: dict[str, list[float]] = {name: [] for name in others}

        def turns() -> None:
            for name, run in others.items():
                begin = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - begin)

        benchmark.pedantic(lambda: layers.adam(products), setup=turns, rounds=25, warmup_rounds=2)
    ours = benchmark.stats.stats.median
    median = {name: statistics.median(times) for name, times in samples.items()}
    elements = 2 * SIZE**2
    rate = max(
        2 * source.nbytes / min(samples["copy"]), elements * ONCE / min(samples["AdamW fused"])
    )
    least = (ONCE + TWICE) / 2 if per_unit else TWICE
    share = {
        "block_adam": elements * least / rate / ours,
        "block_products": elements * PRODUCTS / rate / median["block_products"],
        "AdamW fused": elements * ONCE / rate / median["AdamW fused"],
    }
    benchmark.extra_info.update(
        ratio=median["AdamW fused"] / ours,
        ratio_with_products=median["AdamW fused"] / (ours + median["block_products"]),
        share=share,
        rate=rate,
        median={"block_adam": ours, **median},
    )
    print(
        f"\n{blocks}: block_adam {1e3 * ours:.1f} ms, block_products "
        f"{1e3 * median['block_products']:.1f} ms, "
        f"AdamW fused {1e3 * median['AdamW fused']:.1f} ms, at best {rate / 1e9:.1f} GB/s; "
        "of the bound: " + ", ".join(f"{name} {100 * x:.0f} %" for name, x in share.items())
    )

"""Factors of every layer, and exact rays, of a large decoder with random weights on one GPU.

    python -m bench.large                        # Llama-3-8B's shape, 2^20 tokens; one JSON
    python -m bench.large --tiny                 # the same steps on anything, in seconds

Times the factors alone and reports tokens per second, peak memory and the share of the arithmetic
bound: R (4 i o + i² + o²) FLOP a layer for R tokens, less what layers with one input share.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import deaddir_fast as dd
from bench.llama import Llama, Shape, build
from deaddir_fast.nets.survey import survey
from deaddir_fast.scan.plan import machine_rate, plan

TINY = Shape(layers=2, width=64, inner=96, heads=4, key_heads=2, vocabulary=9000)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def factors(model: Llama, tokens: int, length: int, batch: int) -> tuple[dict[str, Any], Any]:
    """Measure ``kron_factors`` over this many tokens."""
    device = model.embed.weight.device
    dtype = model.embed.weight.dtype
    generator = torch.Generator().manual_seed(1)
    count = -(-tokens // (batch * length))
    batches = [
        torch.randint(0, model.shape.vocabulary, (batch, length), generator=generator).to(device)
        for _ in range(count)
    ]
    dd.kron_factors(model, batches[:1], fisher="mc", layers=["blocks.0.*"])  # kernels compiled
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    read = dd.kron_factors(model, batches, fisher="mc", dtype=torch.float32, progress=True)
    _wait(device)
    seconds = time.perf_counter() - start
    found = survey(model, batches[0])
    cost = plan(
        found,
        count * batch * length,
        count * batch,
        dtype=dtype,
        sums=torch.float32,
        device=device,
        passes=1,
        closed_head="head",
        batch_samples=batch,
    )
    negative = 0.0
    for name in ("blocks.0.attention.q_proj", "blocks.0.down"):
        a, g, _ = read[name]
        for matrix in (a, g):
            values = torch.linalg.eigvalsh(matrix.double())
            negative = max(negative, float(-values[0] / values[-1]))
    return {
        "tokens": count * batch * length,
        "length": length,
        "batch": batch,
        "seconds": seconds,
        "tokens_per_second": count * batch * length / seconds,
        "peak_bytes": _peak(device),
        "factor_bytes": read.bytes(),
        "layers": len(read),
        "flops": cost.flops,
        "gemm_rate": machine_rate(device, dtype),
        "share_of_bound": cost.flops / machine_rate(device, dtype) / seconds,
        "most_negative_eigenvalue": negative,
        "notes": list(read.notes),
    }, read


def rays(model: Llama, length: int, directions: int) -> dict[str, Any]:
    """Measure exact rays along rank-one directions in the last block, in fp32."""
    device = model.embed.weight.device
    model = model.float()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.shape.vocabulary, (2, length), generator=generator).to(device)
    name = f"blocks.{model.shape.layers - 1}.down.weight"
    o, i = model.shape.width, model.shape.inner
    v = torch.randn(directions, o, generator=generator).to(device)
    w = torch.randn(directions, i, generator=generator).to(device)
    radii = torch.logspace(-2, 0, 4, dtype=torch.float64)
    start = time.perf_counter()
    read = dd.ray_curvature(model, ids, {name: dd.RankOne(v, w)}, radii)
    _wait(device)
    return {
        "points": directions * len(radii),
        "seconds": time.perf_counter() - start,
        "peak_bytes": _peak(device),
        "orders": read.pointwise_order().median(1).values.tolist(),
        "notes": list(read.notes),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, for checking")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    device = torch.device(given.device)
    shape = TINY if given.tiny else Shape()
    tokens = given.tokens or (2048 if given.tiny else 1 << 20)
    length = given.length or (64 if given.tiny else 2048)
    model = build(shape, torch.bfloat16, device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "device": named,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": vars(shape),
    }
    result["factors"], read = factors(model, tokens, length, given.batch)
    print(json.dumps(result["factors"], indent=1), flush=True)
    del read
    result["rays"] = rays(model, min(length, 512), 4)
    print(json.dumps(result["rays"], indent=1), flush=True)
    slug = "tiny" if given.tiny else named.lower().replace(" ", "-")
    out = given.out or Path(__file__).parent / "results" / f"large-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()

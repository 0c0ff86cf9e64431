"""Lists of matrices divided into blocks, and the plain fp64 formulas of what is done with them."""

from __future__ import annotations

import numpy as np
import torch
from compare import to_numpy
from torch import Tensor

from deaddir_fast.ops import _adam


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Lists:
    """Seeded matrices of given shapes and dims; ``blocks`` draws ids in [0, count)."""

    def __init__(self, shapes, dims, count, dtype=torch.float64, blocks=None, device="cpu"):
        self.dims, self.count, self.dtype = list(dims), count, dtype
        draw = lambda shape: torch.randn(shape).to(dtype).to(device)  # noqa: E731
        self.ws = [draw(s) for s in shapes]
        self.gs = [draw(s) for s in shapes]
        state = wide(dtype)
        self.ms = [0.1 * torch.randn(s).to(state).to(device) for s in shapes]
        self.vs = [torch.rand(s).to(state).to(device) for s in shapes]
        if blocks is None:
            blocks = [
                torch.randint(max(1, count), (s[d],)) for s, d in zip(shapes, dims, strict=True)
            ]
        self.blocks = [b.to(torch.int32).to(device) for b in blocks]

    def copy(self) -> Lists:
        other = object.__new__(Lists)
        other.__dict__ = dict(self.__dict__)
        for name in ("ws", "gs", "ms", "vs"):
            setattr(other, name, [t.clone() for t in getattr(self, name)])
        return other


def units(outputs: int, inputs: int, dtype=torch.float64, device="cpu") -> Lists:
    """Two layers and a bias: unit j's incoming row with its bias is block j, its outgoing column
    block outputs + j."""
    j = torch.arange(outputs)
    shapes = [(outputs, inputs), (outputs, 1), (inputs, outputs)]
    blocks = [j, j, outputs + j]
    return Lists(shapes, [0, 0, 1], 2 * outputs, dtype, blocks, device)


def sums(xs, ys, blocks, dims, count) -> np.ndarray:
    """Per block the sum of x y, element by element."""
    out = np.zeros(count)
    for x, y, block, dim in zip(xs, ys, blocks, dims, strict=True):
        ids = np.broadcast_to(spread(np.arange(count), block, dim), tuple(x.shape))
        np.add.at(out, ids, to_numpy(x) * to_numpy(y))
    return out


def products(lists: Lists) -> np.ndarray:
    args = lists.blocks, lists.dims, lists.count
    return np.stack([sums(lists.ws, lists.ws, *args), sums(lists.gs, lists.ws, *args)])


def spread(values: np.ndarray, block: Tensor, dim: int) -> np.ndarray:
    """The value of each line's block, broadcastable."""
    chosen = values[block.cpu().numpy()]
    return chosen[:, None] if dim == 0 else chosen


def step(lists: Lists, norms, inner, radial, reach, hyper, maximize=False):
    """New parameters and moments in fp64 numpy, by the formulas of ops/block_adam.py."""
    lr, beta1, beta2, eps, decay, correct1, correct2, _ = hyper.tolist()
    norms, inner, radial, reach = map(to_numpy, (norms, inner, radial, reach))
    inside = norms > 0
    rho = np.where(inside, norms, 1)
    along = np.where(inside, inner / rho**2, 0)
    w0s, us, ms, vs = [], [], [], []
    for k, (block, dim) in enumerate(zip(lists.blocks, lists.dims, strict=True)):
        w, g = to_numpy(lists.ws[k]), to_numpy(lists.gs[k]) * (-1 if maximize else 1)
        w0 = (1 - lr * decay) * w
        t = spread(rho, block, dim) * (g - spread(along, block, dim) * w0)
        m = beta1 * to_numpy(lists.ms[k]) + (1 - beta1) * t
        v = beta2 * to_numpy(lists.vs[k]) + (1 - beta2) * t**2
        w0s.append(w0)
        us.append(m / correct1 / (np.sqrt(v / correct2) + eps))
        ms.append(m)
        vs.append(v)
    overlap = sums(us, w0s, lists.blocks, lists.dims, lists.count)
    back = np.where(inside, overlap / rho**2, 0)
    grow = np.where(inside, np.exp(radial), 1)
    reach = np.where(inside, reach, 1)
    new = [
        spread(grow, b, d) * w0 - lr * spread(reach, b, d) * (u - spread(back, b, d) * w0)
        for w0, u, b, d in zip(w0s, us, lists.blocks, lists.dims, strict=True)
    ]
    return new, ms, vs


def blocks_of(lists: Lists, hyper: Tensor, maximize=False, radial=0.1):
    """Norms and inner products of the decayed blocks, some radial steps, reach as in the paper."""
    keep = 1 - float(hyper[0] * hyper[4])
    squares, inner = products(lists)
    state = wide(lists.dtype) if lists.ws else torch.float32
    norms = torch.from_numpy(keep * np.sqrt(squares))
    inner = torch.from_numpy(keep * inner * (-1 if maximize else 1))
    radial = radial * torch.randn(lists.count, dtype=torch.float64)
    device = lists.ws[0].device if lists.ws else "cpu"
    return [x.to(state).to(device) for x in (norms, inner, radial, norms.clone())]


def hyper(step=3, lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.2, device=None) -> Tensor:
    return _adam.hyper(step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, device=device)


#: Shapes with dims and the number of blocks.
CASES = {
    "one element": ([(1, 1)], [0], 1),
    "a row and a column": ([(1, 7), (7, 1)], [0, 1], 3),
    "rows": ([(5, 33), (5, 1), (3, 130)], [0, 0, 0], 4),
    "columns": ([(9, 17), (1, 17), (300, 5)], [1, 1, 1], 6),
    "mixed": ([(13, 40), (40, 13), (13, 1), (2, 600)], [0, 1, 0, 1], 11),
    "one block": ([(70, 90), (90, 70), (1, 64)], [0, 1, 1], 1),
    "empty blocks": ([(4, 3)], [0], 50),
    "empty matrices": ([(0, 5), (5, 0), (3, 4), (0, 0)], [0, 0, 1, 1], 4),
    "none": ([], [], 3),
}

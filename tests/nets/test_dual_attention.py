"""Attention kept whole: against dense attention, exact arithmetic and torch's forward mode."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deaddir_fast import ray_curvature
from deaddir_fast.nets import attention, dual, dual_rules, graph, rays
from deaddir_fast.nets.dual_values import Context, Discrete, Dual
from deaddir_fast.nets.weights import Points, check_directions

torch.set_num_threads(1)
getcontext().prec = 60
F64 = torch.float64


def _points(radii: list[float]) -> Points:
    grid = torch.tensor(radii, dtype=F64)
    return Points.make(torch.ones(1, dtype=F64), grid, grid)


def _apply(
    radii: list[float], q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float
) -> Dual:
    out = dual_rules.apply(
        Context(_points(radii)), attention.OPERATION, (q, k, v, mask, causal, scale), {}
    )
    assert isinstance(out, Dual)
    return out


def _ray(base: Tensor, u: Tensor | None, radii: list[float]) -> Any:
    """base + r u with its derivative, or a constant."""
    if u is None:
        return base
    r = torch.tensor(radii, dtype=base.dtype).view(-1, *(1,) * u.ndim)
    return Dual(base, r * u, u.expand(len(radii), *u.shape))


@contextmanager
def _tiles(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    """Cut into tiles of about ``size`` elements."""
    with monkeypatch.context() as patch:
        patch.setitem(attention._TILE, "cpu", size)
        patch.setattr(attention, "_SMALL", min(size, attention._SMALL))
        patch.setattr(attention, "_FEWEST_ROWS", 1)
        yield


# Against dense attention ------------------------------------------------------------------------

MASKS = ("none", "causal", "padding", "hidden keys", "additive", "infinite", "per head", "keys")


def _mask(kind: str, n: int, h: int, queries: int, keys: int, g: torch.Generator) -> Any:
    some = torch.rand(n, 1, 1, keys, generator=g) > 0.4
    if kind == "padding":  # every query sees a key
        some[..., 0] = True
        return some
    if kind == "hidden keys":  # some samples see none at all
        some[0] = False
        return some.expand(n, 1, queries, keys)
    if kind == "additive":
        return torch.randn(queries, keys, generator=g, dtype=F64) * 3
    if kind == "infinite":
        mask = torch.randn(n, 1, queries, keys, generator=g, dtype=F64)
        mask[..., torch.rand(queries, keys, generator=g) > 0.6] = -math.inf
        mask[-1, :, -1] = -math.inf
        return mask
    if kind == "per head":
        return torch.randn(h, queries, keys, generator=g, dtype=F64)
    if kind == "keys":
        return torch.rand(keys, generator=g) > 0.3
    return None


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float) -> Tensor:
    """The definition, with a query that sees nothing at 0."""
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    s = q @ k.mT * scale
    if causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask.expand(s.shape)
    elif mask is not None:
        hidden, s = (mask == -math.inf).expand(s.shape), s + mask.clamp(min=-1e300)
    else:
        hidden = torch.zeros(s.shape, dtype=torch.bool)
    shift = s.masked_fill(hidden, -1e300).amax(-1, keepdim=True).detach()
    e = torch.where(hidden, 0.0, torch.exp(torch.where(hidden, shift, s) - shift))
    total = e.sum(-1, keepdim=True)
    return (e / torch.where(total == 0, 1.0, total)) @ v


def _close(got: Tensor, want: Tensor, relative: float, least: float = 1e-300) -> None:
    """Within ``relative`` of the largest value, or of ``least``."""
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    error, scale = float((got - want).abs().max()), float(want.abs().max())
    assert error <= relative * max(scale, least)


SHAPES = (  # n, query heads, key heads, queries, keys, E, V
    (2, 2, 2, 7, 7, 4, 4),
    (1, 1, 1, 1, 1, 1, 1),
    (3, 2, 1, 1, 9, 3, 5),
    (2, 6, 2, 13, 5, 8, 8),
    (2, 4, 4, 5, 17, 16, 2),
    (1, 3, 3, 33, 33, 64, 64),
    (3, 4, 1, 11, 11, 2, 3),
)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_derivatives_match_dense_attention_and_forward_mode(
    shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, hq, hk, queries, keys, e, width = shape
    g = torch.Generator().manual_seed(sum(shape) + len(kind))
    sizes = ((n, hq, queries, e), (n, hk, keys, e), (n, hk, keys, width))
    base = [torch.randn(*s, generator=g, dtype=F64) for s in sizes]
    along = [torch.randn(*s, generator=g, dtype=F64) for s in sizes]
    mask = _mask(kind, n, hq, queries, keys, g)
    causal, scale = kind == "causal", 0.6
    radii = [0.0, 1e-3, -0.4, 2.0, 40.0]
    for moves in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)):
        us = [u if m else None for u, m in zip(along, moves, strict=True)]
        operands = [_ray(b, u, radii) for b, u in zip(base, us, strict=True)]
        outs = []
        for size in (attention._TILE["cpu"], 60, 1)[: 3 if all(moves) else 2]:
            with _tiles(monkeypatch, size):
                outs.append(_apply(radii, *operands, mask, causal, scale))

        def dense(*xs: Tensor) -> Tensor:
            return _dense(*xs, mask, causal, scale)

        def math_path(*xs: Tensor) -> Tensor:
            with graph.readable_attention():
                return F.scaled_dot_product_attention(
                    *xs, mask, 0.0, causal, scale=scale, enable_gqa=True
                )

        for j, r in enumerate(radii):
            for f in (dense, math_path):

                def at(t: Tensor, f: Callable[..., Tensor] = f, us: list[Any] = us) -> Tensor:
                    return f(
                        *(b if u is None else b + t * u for b, u in zip(base, us, strict=True))
                    )

                t = torch.tensor(r, dtype=F64)
                y, slope = torch.func.jvp(at, (t,), (torch.ones_like(t),))
                if f is math_path and kind in ("hidden keys", "infinite"):
                    # torch's derivative is nan where a query sees nothing
                    slope = slope.nan_to_num()
                for out in outs:
                    _close(out.base + out.delta[j], y, 1e-10)
                    # saturated weights: scores of hundreds are known to 1e-13 at best
                    _close(out.dot[j], slope, 1e-10, least=1e-2 if r == 40.0 else 0)
                    if r == 0:
                        _close(out.base, y, 1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_the_operation_itself_is_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 6, 9, 5, generator=g, dtype=F64)
    k = torch.randn(2, 3, 8, 5, generator=g, dtype=F64)
    v = torch.randn(2, 3, 8, 4, generator=g, dtype=F64)
    mask, causal = _mask(kind, 2, 6, 9, 8, g), kind == "causal"
    want = _dense(q, k, v, mask, causal, 0.3)
    for size in (attention._TILE["cpu"], 40):
        with _tiles(monkeypatch, size):
            got = attention.attention(q, k, v, mask, causal, 0.3)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    args = (q, k, v, mask, causal, 0.3)
    torch.library.opcheck(attention.OPERATION, args, test_utils=("test_schema", "test_faketensor"))


# Accuracy of the difference ---------------------------------------------------------------------


def _exact(q: Any, k: Any, v: Any, mask: Any, scale: float) -> list[list[Decimal]]:
    """One head in decimal arithmetic; ``mask`` hides where False."""
    rows = []
    for i, qi in enumerate(q):
        scores = [
            sum((a * b for a, b in zip(qi, kj, strict=True)), Decimal(0)) * Decimal(scale)
            for kj in k
        ]
        weights = [s.exp() if mask[i][j] else Decimal(0) for j, s in enumerate(scores)]
        total = sum(weights, Decimal(0))
        rows.append(
            [
                sum((w * vj[c] for w, vj in zip(weights, v, strict=True)), Decimal(0)) / total
                for c in range(len(v[0]))
            ]
        )
    return rows


def _decimal(x: Tensor, d: Tensor | None = None) -> list[list[Decimal]]:
    moved = torch.zeros_like(x) if d is None else d
    return [
        [Decimal(a) + Decimal(b) for a, b in zip(r, s, strict=True)]
        for r, s in zip(x.tolist(), moved.tolist(), strict=True)
    ]


@pytest.mark.parametrize("radius", [1e-1, 1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("kind", ["generic", "causal", "from zero", "keys moved together"])
def test_small_differences_are_relatively_exact(
    kind: str, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(5)
    t, e = 6, 3
    base = [torch.randn(1, 1, t, e, generator=g, dtype=F64) for _ in range(3)]
    along = [torch.randn(1, 1, t, e, generator=g, dtype=F64) for _ in range(3)]
    if kind == "from zero":  # scores of second order in the radius, values that stay
        base[0], base[1] = torch.zeros_like(base[0]), torch.zeros_like(base[1])
        along[2] = torch.zeros_like(along[2])
    if kind == "keys moved together":  # the softmax does not see the common part
        along[1] = 1e6 * torch.ones_like(along[1]) + along[1]
        along[0], along[2] = torch.zeros_like(along[0]), torch.zeros_like(along[2])
    causal = kind == "causal"
    mask = torch.ones(t, t).tril().bool().tolist() if causal else [[True] * t] * t
    deltas = [radius * u for u in along]
    before = _exact(*(_decimal(b[0, 0]) for b in base), mask, 0.5)
    after = _exact(
        *(_decimal(b[0, 0], d[0, 0]) for b, d in zip(base, deltas, strict=True)), mask, 0.5
    )
    want = torch.tensor(
        [
            [float(y - x) for x, y in zip(r, s, strict=True)]
            for r, s in zip(before, after, strict=True)
        ],
        dtype=F64,
    )
    operands = [
        Dual(b, d.unsqueeze(0), u.unsqueeze(0)) for b, d, u in zip(base, deltas, along, strict=True)
    ]
    for size in (attention._TILE["cpu"], 8):
        with _tiles(monkeypatch, size):
            out = _apply([radius], *operands, None, causal, 0.5)
        # each score's difference is known to rounding, of 1e6 radius where keys move together
        floor = 3e-16 * 1e6 * radius * 3 if kind == "keys moved together" else 0.0
        error = (out.delta[0, 0, 0] - want).abs().amax(-1)
        assert bool((error <= 5e-15 * want.abs().amax(-1) + floor).all())
        order = 2 if kind == "from zero" else 1
        if radius < 1e-3:
            _close(out.dot[0, 0, 0] * radius / order, want, 3e-15 * 10 + radius * 1e3)
    if kind == "from zero" and radius == 1e-12:
        assert 0 < float(want.abs().max()) < 1e-22


def test_a_shift_common_to_all_keys_changes_nothing() -> None:
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, 2, 9, 4, generator=g, dtype=F64) for _ in range(3))
    shift = torch.randn(2, 2, 1, 4, generator=g, dtype=F64).expand_as(k)
    out = _apply([1e-6, 0.3], q, _ray(k, shift, [1e-6, 0.3]), v, None, False, 0.5)
    assert float(out.delta[0].abs().max()) < 1e-21
    assert float(out.delta[1].abs().max()) < 1e-15
    assert float(out.dot.abs().max()) < 1e-14


@pytest.mark.parametrize("jump", [50.0, 1e3, 1e6])
def test_scores_that_move_far_keep_other_rows_exact(jump: float) -> None:
    """One query leaps to another key, also from a weight that underflows; the others crawl."""
    g = torch.Generator().manual_seed(2)
    k, v = (torch.randn(1, 1, 5, 4, generator=g, dtype=F64) for _ in range(2))
    q = torch.randn(1, 1, 3, 4, generator=g, dtype=F64)
    q[0, 0, 0] = -jump * k[0, 0, 3] / k[0, 0, 3].square().sum()
    u = 1e-9 * torch.randn(1, 1, 3, 4, generator=g, dtype=F64)
    u[0, 0, 0] = -2.5 * q[0, 0, 0]
    out = _apply([1.0], _ray(q, u, [1.0]), k, v, None, False, 1.0)
    want, slope = torch.func.jvp(
        lambda t: _dense(q + t * u, k, v, None, False, 1.0),
        (torch.ones((), dtype=F64),),
        (torch.ones((), dtype=F64),),
    )
    torch.testing.assert_close(out.base + out.delta[0], want, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(out.dot[0], slope, rtol=1e-8, atol=1e-13)
    _, small = torch.func.jvp(
        lambda t: _dense(q + t * u, k, v, None, False, 1.0),
        (torch.full((), 0.5, dtype=F64),),
        (torch.ones((), dtype=F64),),
    )
    # over this small step the difference is the derivative in the middle, to third order
    _close(out.delta[0, :, :, 1:], small[:, :, 1:], 1e-13)


def test_single_precision_stays_single() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v, u = (torch.randn(2, 2, 9, 4, generator=g) for _ in range(4))
    out = _apply([1e-4], _ray(q, u, [1e-4]), k, v, None, True, 0.5)
    assert out.delta.dtype == out.dot.dtype == out.base.dtype == torch.float32
    double = [x.double() for x in (q, k, v, u)]
    want = _apply([1e-4], _ray(double[0], double[3], [1e-4]), *double[1:3], None, True, 0.5)
    _close(out.delta.double(), want.delta, 2e-6)


# Masks that move --------------------------------------------------------------------------------


def test_a_learned_bias_moves_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 3, 7, 4, generator=g, dtype=F64) for _ in range(3))
    bias, u, uq = (torch.randn(*s, generator=g, dtype=F64) for s in ((3, 7, 7), (3, 7, 7), q.shape))
    bias[:, torch.ones(7, 7).triu(1).bool()] = -math.inf
    radii = [1e-3, 0.5, 80.0]
    for moved in (None, uq):
        for size in (attention._TILE["cpu"], 20):
            with _tiles(monkeypatch, size):
                out = _apply(radii, _ray(q, moved, radii), k, v, _ray(bias, u, radii), False, 0.5)
            for j, r in enumerate(radii):

                def at(t: Tensor, moved: Any = moved) -> Tensor:
                    return _dense(
                        q if moved is None else q + t * moved, k, v, bias + t * u, False, 0.5
                    )

                t = torch.tensor(r, dtype=F64)
                y, slope = torch.func.jvp(at, (t,), (torch.ones_like(t),))
                _close(out.base + out.delta[j], y, 1e-10)
                _close(out.dot[j], slope, 1e-10)


def test_a_boolean_mask_that_differs_between_points() -> None:
    g = torch.Generator().manual_seed(6)
    q, k, v, u = (torch.randn(1, 2, 5, 3, generator=g, dtype=F64) for _ in range(4))
    seen = torch.rand(3, 1, 1, 5, 5, generator=g) > 0.3
    seen[0] = seen[2]
    seen[1, ..., 0, :] = False
    radii = [1e-9, 1e-9]
    for moved in (None, u):
        mask = Discrete(seen[2], seen[:2])
        out = _apply(radii, _ray(q, moved, radii), k, v, mask, False, 0.5)
        for j in range(2):
            at = q if moved is None else q + 1e-9 * u
            _close(out.base + out.delta[j], _dense(at, k, v, seen[j], False, 0.5), 1e-14)
        same = _apply(radii[:1], _ray(q, u, radii[:1]), k, v, seen[2], False, 0.5)
        if moved is not None:  # where the mask stays, the difference stays exact
            _close(out.delta[0], same.delta[0], 1e-14)
        else:
            assert float(out.delta[0].abs().max()) == 0.0


# Memory -----------------------------------------------------------------------------------------


class _Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.most = self.largest = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = [storage.nbytes(), 0]
                    self.now += storage.nbytes()
                self.live[key][1] += 1
                self.most = max(self.most, self.now)
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(x, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        entry = self.live.get(key, [0, 0])
        entry[1] -= 1
        if entry[1] == 0:
            self.now -= self.live.pop(key)[0]


def test_keys_no_query_of_a_tile_sees_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask given as a mask costs what ``causal`` costs."""
    g = torch.Generator().manual_seed(0)
    q, k, v, u = (torch.randn(1, 2, 64, 4, generator=g, dtype=F64) for _ in range(4))
    operands = [_ray(x, u, [0.1]) for x in (q, k, v)]
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    with _tiles(monkeypatch, 8 * 64):
        counts, found = [], []
        for given, causal in ((None, True), (mask, False), (None, False)):
            with FlopCounterMode(display=False) as flops:
                found.append(_apply([0.1], *operands, given, causal, 0.5))
            counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] < 0.6 * counts[2]
    _close(found[0].delta, found[1].delta, 1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_sequence(causal: bool) -> None:
    peaks = []
    for t in (512, 2048):
        g = torch.Generator().manual_seed(0)
        q, k, v, u = (torch.randn(1, 2, t, 16, generator=g, dtype=F64) for _ in range(4))
        operands = [_ray(x, u, [1e-3, 0.1]) for x in (q, k, v)]
        with _Peak() as peak:
            _apply([1e-3, 0.1], *operands, None, causal, 0.25)
        peaks.append(peak)
        assert peak.largest < 8 * t * t  # of one head at one point
        # what the estimate promises, base included
        scratch = 8 * attention.scratch_elements(attention.Shape.of(q, k, v), "cpu")
        assert peak.most <= 2 * (scratch + 4 * 8 * q.numel()) + 8 * q.numel()
    assert peaks[1].most < 4.5 * peaks[0].most


def _gpt(key_heads: int = 4, depth: int = 1) -> Any:
    torch.manual_seed(0)
    return _Decoder(16, 4, key_heads, depth).double().eval()


def test_the_estimate_is_linear_in_the_sequence() -> None:
    found = []
    for t in (128, 512):
        x = torch.randint(0, 11, (1, t))
        for keep in (True, False):
            captured = graph.capture(_gpt(), x, keep_attention=keep)
            point, _ = dual.working_bytes(captured, {"embed.weight"}, still=False)
            found.append(point)
    assert found[2] < 4.5 * found[0]
    assert found[3] > 12 * found[1]
    assert found[2] < found[3] / 5


@pytest.mark.slow
def test_rays_through_a_long_sequence_stay_within_their_budget() -> None:
    t = 1024
    x = torch.randint(0, 11, (2, t), generator=torch.Generator().manual_seed(0))
    model = _gpt()
    g = torch.Generator().manual_seed(1)
    directions = {
        k: torch.randn(2, *p.shape, generator=g, dtype=F64) for k, p in model.named_parameters()
    }
    budget = 12 << 20
    with _Peak() as peak:
        ray_curvature(model, x, directions, [1e-3, 0.3], memory_budget=budget)
    assert peak.largest < 8 * t * t
    assert peak.most < 2 * budget


# Whole models -----------------------------------------------------------------------------------


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions on (n, h, t, e)."""
    t, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(t, dtype=x.dtype).unsqueeze(1) * 0.3 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.e = heads, key_heads, width // heads
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * key_heads * self.e)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        n, t, _ = h.shape
        k, v = self.kv(h).view(n, t, 2, self.key_heads, self.e).permute(2, 0, 3, 1, 4)
        q = self.q(h).view(n, t, self.heads, self.e).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            _rotate(q), _rotate(k), v, is_causal=True, enable_gqa=self.heads != self.key_heads
        )
        return x + self.out(y.transpose(1, 2).flatten(2))


class _Decoder(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, key_heads) for _ in range(depth)))
        self.head = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


class _Padded(nn.Module):
    """An encoder that reads which tokens are padding, and attention from a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pool = nn.MultiheadAttention(8, 4, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        h = self.encoder(self.embed(x), src_key_padding_mask=padding, is_causal=False)
        query = self.query.expand(len(x), -1, -1)
        y = self.pool(query, h, h, key_padding_mask=padding, need_weights=False)[0]
        return self.head(y[:, 0])


class _Biased(nn.Module):
    """Learned positions in the scores, one key head for all, no head dimension needed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.bias = nn.Parameter(torch.randn(5, 5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        y = imported_by_name(q, k, v, self.bias.masked_fill(hidden, -math.inf), scale=0.7)
        return self.head(y)


class _Gated(nn.Module):
    """A boolean mask that depends on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.gate = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = (self.gate(x) > 0) | torch.eye(5, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, seen)


def _models(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "decoder":
        return _gpt(), torch.randint(0, 11, (5, 6))
    if name == "grouped decoder":
        return _gpt(key_heads=2, depth=2), torch.randint(0, 11, (5, 6))
    if name == "padded encoder":
        x = torch.randint(1, 7, (5, 6))
        x[1, 4:], x[3, 1:] = 0, 0
        return _Padded().double().eval(), x
    made = _Biased() if name == "learned bias" else _Gated()
    return made.double().eval(), torch.randn(5, 5, 6, dtype=F64)


MODELS = ("decoder", "grouped decoder", "padded encoder", "learned bias", "gated mask")


def _directions(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    u = {k: torch.randn(3, *p.shape, generator=g, dtype=F64) for k, p in model.named_parameters()}
    first = next(iter(u))
    for name, x in u.items():
        if name != first:
            x[2] = 0
    return u


def _kept(model: nn.Module, x: Any, keep: bool = True) -> list[str]:
    nodes = graph.capture(model, x, keep_attention=keep).graph.nodes
    return [str(n.target) for n in nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", MODELS)
def test_rays_match_the_decomposed_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _models(name)
    ops = _kept(model, x)
    assert "deaddir.attention.default" in ops
    assert not any("softmax" in op for op in ops)
    assert not any("deaddir" in op for op in _kept(model, x, keep=False))
    radii = [0.0, 1e-7, -0.3]
    whole = ray_curvature(model, x, _directions(model), radii)
    with monkeypatch.context() as patch:
        for module in (graph, rays):
            patch.setattr(module, "whole_attention", nullcontext)
        parts = ray_curvature(model, x, _directions(model), radii)
    assert whole.notes == parts.notes
    for a, b in ((whole.fisher, parts.fisher), (whole.kl, parts.kl)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
    assert bool((whole.kl[:, 1:] > 0).all())


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_match_forward_mode(name: str) -> None:
    model, x = _models(name)
    u = _directions(model)
    values = dict(model.named_parameters())
    norm = math.sqrt(sum(float(t[0].square().sum()) for t in u.values()))
    unit = {k: t[:1] / norm for k, t in u.items()}
    directions = check_directions(unit, {k: v.detach() for k, v in values.items()})
    points = Points.make(directions.norms, *(torch.tensor([0.2], dtype=F64),) * 2)
    captured = graph.capture(model, x, keep_attention=True)
    out, _ = dual.run(
        captured, captured.bind(x), dual.parameter_values(captured, directions, points), points
    )

    def along(t: Tensor) -> Tensor:
        with graph.readable_attention():
            return graph.call_model(
                model, {k: v.detach() + t * unit[k][0] for k, v in values.items()}, x
            )

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        t = torch.tensor(0.2, dtype=F64)
        y, slope = torch.func.jvp(along, (t,), (torch.ones_like(t),))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    _close(out.base + out.delta[0], y, 1e-12)
    _close(out.dot[0], slope, 1e-11)


# What is kept whole -----------------------------------------------------------------------------


class _Call(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.w, self.kwargs = nn.Parameter(torch.ones((), dtype=F64)), kwargs

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.w * q, k, v, **self.kwargs)


def _operands(*sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=g, dtype=F64) for s in sizes)


@pytest.mark.parametrize(
    ("sizes", "kwargs"),
    [
        (((4, 6, 2), (4, 5, 2), (4, 5, 3)), {}),
        (((4, 2), (5, 2), (5, 3)), {}),
        (((2, 3, 4, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {"is_causal": True}),  # broadcast heads
        (((2, 3, 2, 4, 2), (1, 3, 2, 4, 2), (2, 1, 2, 4, 2)), {"scale": -0.4}),
        (((2, 3, 4, 4, 2), (2, 3, 2, 4, 2), (2, 3, 2, 4, 2)), {"enable_gqa": True}),
        (((2, 2, 4, 2), (2, 2, 4, 2), (2, 2, 4, 2)), {"attn_mask": torch.ones(4, 1) > 0}),
    ],
)
def test_shapes_torch_accepts_are_kept_whole(sizes: Any, kwargs: dict[str, Any]) -> None:
    model, x = _Call(**kwargs), _operands(*sizes)
    assert "deaddir.attention.default" in _kept(model, x)
    captured = graph.capture(model, x, keep_attention=True)
    points = _points([0.5])
    w = Dual(torch.ones((), dtype=F64), *(torch.tensor([t], dtype=F64) for t in (0.5, 1.0)))
    out, _ = dual.run(captured, list(x), {"w": w}, points)
    with graph.readable_attention():
        y, slope = torch.func.jvp(
            lambda t: F.scaled_dot_product_attention(t * x[0], x[1], x[2], **kwargs),
            (torch.tensor(1.5, dtype=F64),),
            (torch.ones((), dtype=F64),),
        )
    _close(out.base + out.delta[0], y, 1e-13)
    _close(out.dot[0], slope, 1e-12)


def test_what_it_cannot_hold_is_left_to_torch() -> None:
    sizes = ((2, 2, 4, 3),) * 3
    x = _operands(*sizes)
    half = tuple(t.half() for t in x)
    assert not any("deaddir" in op for op in _kept(_Call(), half))
    mapped = _Mapped()
    assert not any("deaddir" in op for op in _kept(mapped, x[0]))
    mask = torch.ones(4, 4) > 0
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal"):
        graph.capture(_Call(attn_mask=mask, is_causal=True), x, keep_attention=True)
    for kwargs in ({"attn_mask": mask[:3]}, {"attn_mask": mask.long()}):
        with pytest.raises((RuntimeError, ValueError)) as want:
            F.scaled_dot_product_attention(*x, **kwargs)
        with pytest.raises((RuntimeError, ValueError)) as got:
            graph.capture(_Call(**kwargs), x, keep_attention=True)
        assert str(got.value)[:40] == str(want.value)[:40]


class _Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(F.scaled_dot_product_attention)(self.w * x, x, x)


def test_torch_has_its_function_back_after_a_capture() -> None:
    before = F.scaled_dot_product_attention
    x = _operands(*((2, 2, 4, 3),) * 3)
    graph.capture(_Call(), x, keep_attention=True)
    assert F.scaled_dot_product_attention is before
    with pytest.raises(RuntimeError), attention.whole_attention():
        raise RuntimeError
    assert F.scaled_dot_product_attention is before


# Hugging Face -----------------------------------------------------------------------------------


def _hugging_face(name: str) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = torch.randint(1, 17, (3, 6))
    padding = torch.ones(3, 6, dtype=torch.long)
    padding[1, 4:] = 0
    common = {"vocab_size": 17, "attn_implementation": "sdpa", "use_cache": False}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, **common)
        return transformers.GPT2LMHeadModel(config), {"input_ids": tokens}
    small = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, **common}
    if name == "llama":
        config = transformers.LlamaConfig(
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8, **small
        )
        return transformers.LlamaForCausalLM(config), {"input_ids": tokens}
    config = transformers.BertConfig(num_attention_heads=2, max_position_embeddings=8, **small)
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": tokens, "attention_mask": padding}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_hugging_face_models_match_the_decomposed_path(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _hugging_face(name)
    model = model.double().eval()
    assert "deaddir.attention.default" in _kept(model, x)
    u = _directions(model)
    whole = ray_curvature(model, x, u, [1e-6, 0.1])
    with monkeypatch.context() as patch:
        for module in (graph, rays):
            patch.setattr(module, "whole_attention", nullcontext)
        parts = ray_curvature(model, x, u, [1e-6, 0.1])
    assert whole.notes == parts.notes
    torch.testing.assert_close(whole.fisher, parts.fisher, rtol=1e-9, atol=0)
    torch.testing.assert_close(whole.kl, parts.kl, rtol=1e-9, atol=0)

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from adam_steps import (
    DTYPES,
    SETTINGS,
    SHAPES,
    assert_close,
    draw,
    moved,
    random_bits,
    state_dtype,
    values,
)
from compare import assert_relative, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import scaled_adam
from deaddir_fast.ops._adam import HYPER, hyper

torch.set_num_threads(1)

SCALES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(params=_native.extension.build_info()["isas"] if _native.extension else [])
def isa(request):
    previous = _native.extension.use_isa(request.param)
    yield request.param
    _native.extension.use_isa(previous)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check_values(x, *, maximize=False):
    y = x.copy()
    scaled_adam(*y.args(), values(), maximize=maximize)
    in_torch = partial(torch.Tensor.to, dtype=x.ms[0].dtype)
    for k, w in enumerate(x.ws):
        truth = moved(x, k, maximize=maximize)
        w1, m1, v1 = moved(x, k, maximize=maximize, arithmetic=in_torch)
        for result, exact, same in zip(
            (y.ws[k], y.ms[k], y.vs[k]), truth, (w1.to(w.dtype), m1, v1), strict=True
        ):
            assert_close(result, exact, same)
    for name in ("gs", "rows", "cols"):
        for before, after in zip(getattr(x, name), getattr(y, name), strict=True):
            assert before is None or torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,cols", SCALES)
def test_values(dtype, rows, cols):
    check_values(draw(SHAPES, dtype, rows=rows, cols=cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_on_every_instruction_set(isa, dtype):
    with backend("cpu"):
        for rows, cols in SCALES:
            check_values(draw(SHAPES, dtype, rows=rows, cols=cols))


def test_maximize():
    check_values(draw(SHAPES, torch.float32), maximize=True)


def test_large():
    check_values(draw([(500, 700), (3, 2), (90001, 1)], torch.float32))
    check_values(draw([(50, 5003)], torch.bfloat16))


def test_scales_of_some_matrices_only():
    x = draw(SHAPES, torch.float64)
    for k in range(len(SHAPES)):
        x.rows[k] = x.rows[k] if k % 2 else None
        x.cols[k] = x.cols[k] if k % 3 else None
    check_values(x)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_without_scales_it_is_adamw(dtype, bound, maximize):
    x = draw([(7, 5), (1, 9), (64, 3)], dtype, rows=False, cols=False)
    theirs = [w.clone().requires_grad_() for w in x.ws]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS, maximize=maximize)
    for m in (*x.ms, *x.vs):
        m.zero_()
    for step in range(1, 8):
        x.gs = [torch.randn_like(w) for w in x.ws]
        for w, g in zip(theirs, x.gs, strict=True):
            w.grad = g.clone()
        optimizer.step()
        scaled_adam(*x.args(), values(step), maximize=maximize)
    for k, w in enumerate(theirs):
        assert_relative(x.ws[k], w, bound * 100)
        assert np.abs(to_numpy(x.ws[k]) - to_numpy(w)).max() <= bound
        assert_relative(x.ms[k], optimizer.state[w]["exp_avg"], bound * 100)
        assert_relative(x.vs[k], optimizer.state[w]["exp_avg_sq"], bound * 100)


@given(
    o=st.integers(1, 9),
    i=st.integers(1, 80),
    powers=st.lists(st.integers(-6, 6), min_size=18, max_size=18),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_moves_with_rescaled_units(o, i, powers, dtype, seed):
    """(w, g, row) -> (c w, g / c, c row) leaves m and v, and w takes c: exactly for powers of 2."""
    x = draw([(o, i)], dtype, seed=seed)
    c = torch.tensor([2.0**p for p in powers[:o]], dtype=torch.float64)
    y = x.copy()
    y.ws[0] = (x.ws[0].double() * c[:, None]).to(dtype)
    y.gs[0] = (x.gs[0].double() / c[:, None]).to(dtype)
    y.rows[0] = (x.rows[0].double() * c).to(state_dtype(dtype))
    for each in (x, y):
        scaled_adam(*each.args(), values())
    assert torch.equal(y.ms[0], x.ms[0])
    assert torch.equal(y.vs[0], x.vs[0])
    assert torch.equal(y.ws[0].double(), x.ws[0].double() * c[:, None])


def test_moves_with_any_rescaling_of_columns():
    x = draw([(6, 5)], torch.float64)
    c = torch.rand(5, dtype=torch.float64) + 0.3
    y = x.copy()
    y.ws[0], y.gs[0], y.cols[0] = x.ws[0] * c, x.gs[0] / c, x.cols[0] * c
    for each in (x, y):
        scaled_adam(*each.args(), values())
    assert_relative(y.ms[0], x.ms[0], 1e-14)
    assert_relative(y.vs[0], x.vs[0], 1e-14)
    assert_relative(y.ws[0], x.ws[0] * c, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_only_its_own_memory(dtype):
    x, bases = draw([(5, 7), (3, 1)], dtype), []

    def guarded(t):
        base = torch.full((t.numel() + 34,), float("nan"), dtype=t.dtype)
        bases.append(base)
        inside = base[17 : 17 + t.numel()].view(t.shape)
        return inside.copy_(t)

    y = x.copy()
    y.ws, y.ms, y.vs = ([guarded(t) for t in values_] for values_ in (x.ws, x.ms, x.vs))
    scaled_adam(*y.args(), values())
    scaled_adam(*x.args(), values())
    for base in bases:
        assert base[:17].isnan().all()
        assert base[-17:].isnan().all()
        assert not base[17:-17].isnan().any()
    for k in range(2):
        assert torch.equal(x.ws[k], y.ws[k])


def test_nothing_to_do():
    scaled_adam([], [], [], [], [], [], values())
    check_values(draw([(0, 3), (3, 0)], torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nan_and_infinity_propagate(dtype):
    x = draw([(4, 40), (3, 70)], dtype)
    inf, nan = float("inf"), float("nan")
    x.gs[0][1, 3], x.gs[0][2, 5], x.ws[0][0, 0], x.vs[0][3, 3] = nan, inf, -inf, -1e6
    x.rows[1][1], x.cols[1][2] = inf, 0.0
    y = x.copy()
    scaled_adam(*y.args(), values())
    for k in range(2):
        with np.errstate(invalid="ignore"):
            truth = moved(x, k)
        for result, exact in zip((y.ws[k], y.ms[k], y.vs[k]), truth, strict=True):
            assert torch.equal(result.isnan(), torch.from_numpy(np.isnan(exact)))
            infinite = torch.from_numpy(np.where(np.isinf(exact), exact, 0.0))
            assert torch.equal(torch.where(result.isinf(), result.double(), 0.0), infinite)


def still(w, step=3, weight_decay=0.1):
    """Lists in which a step multiplies w by 1 - lr weight_decay and does nothing else."""
    zeros = torch.zeros(w.shape)
    return [w], [torch.zeros_like(w)], [zeros.clone()], [zeros + 1], [None], [None]


def rounded(w, seed, step, position=0):
    """What stochastic rounding should make of (1 - lr wd) w, in plain integers."""
    product = (w.float() * float(np.float32(1 - SETTINGS["lr"] * SETTINGS["weight_decay"]))).numpy()
    bits = product.view(np.uint32).astype(np.int64).ravel()
    noise = np.array([random_bits(seed, step, position, j) for j in range(bits.size)], np.int64)
    up = ((bits + noise) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return torch.from_numpy(up.reshape(w.shape)).bfloat16()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 600), (700, 1), (40, 33)])
@pytest.mark.parametrize(("seed", "step"), [(0, 1), (12345, 7), (2**32 + 3, 2**31 + 5)])
def test_stochastic_rounding_is_bit_exact(shape, seed, step):
    w = torch.randn(shape).bfloat16()
    expected = rounded(w, seed, step)
    lists = still(w.clone())
    scaled_adam(*lists, values(step), seed=seed)
    assert torch.equal(lists[0][0], expected)
    assert seed != 12345 or w.numel() < 20 or not torch.equal(expected, rounded(w, seed + 1, step))


def test_stochastic_rounding_by_position_in_the_list():
    ws = [torch.randn(9, 5).bfloat16() for _ in range(3)]
    ws[1] = ws[0].clone()
    lists = [[each for w in ws for each in still(w.clone())[n]] for n in range(6)]
    scaled_adam(*lists, values(3), seed=8)
    for k, w in enumerate(ws):
        assert torch.equal(lists[0][k], rounded(w, 8, 3, k))
    assert not torch.equal(lists[0][0], lists[0][1])


def test_stochastic_rounding_with_scales_and_steps():
    """The values between which it chooses are the neighbours of the exact step."""
    x = draw([(30, 77), (50, 3)], torch.bfloat16)
    scaled_adam(*(y := x.copy()).args(), values(), seed=3)
    for k in range(2):
        exact = moved(x, k)[0]
        distance = np.abs(to_numpy(y.ws[k]) - exact)
        assert (distance <= 2.0**-7 * np.abs(exact) * (1 + 1e-4)).all()
        nearest = to_numpy(torch.from_numpy(exact).bfloat16())
        assert (to_numpy(y.ws[k]) != nearest).mean() > 0.1


def test_stochastic_rounding_has_the_right_mean():
    w = torch.full((512, 512), 1.0).bfloat16()
    lists = still(w)
    scaled_adam(*lists, values(5), seed=77)
    target, n = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"], 512 * 512
    below = 1 - 2.0**-8
    assert set(lists[0][0].unique().tolist()) == {below, 1.0}
    p = (target - below) * 2**8
    spread = 2.0**-8 * (p * (1 - p) / n) ** 0.5
    assert abs(lists[0][0].double().mean().item() - target) <= 5 * spread
    halves = (lists[0][0].flatten()[::2] == 1.0, lists[0][0].flatten()[1::2] == 1.0)
    for half in halves:
        assert abs(half.double().mean().item() - p) < 0.01
    both = (halves[0] & halves[1]).double().mean().item()
    assert abs(both - p * p) < 0.01


def test_stochastic_rounding_keeps_nan_and_infinity():
    w = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0]]).bfloat16()
    for seed in range(20):
        lists = still(w.clone())
        scaled_adam(*lists, values(), seed=seed)
        result = lists[0][0][0]
        assert result[0].isnan()
        assert result[1:].tolist() == [float("inf"), -float("inf"), 0.0, -0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_round_to_nearest(dtype):
    x = draw(SHAPES, dtype)
    y = x.copy()
    scaled_adam(*x.args(), values())
    scaled_adam(*y.args(), values(), seed=4)
    for a, b in zip(x.ws, y.ws, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rounding_to_nearest(dtype):
    """Values between, at and just off the ties of every exponent, subnormal and overflowing."""
    finite = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite()].double()
    gap = finite[1:] - finite[:-1]
    middle = finite[:-1] + gap / 2
    wanted = torch.cat([middle, middle - gap / 64, middle + gap / 64, finite]).float()
    wanted = torch.cat([wanted, -wanted, torch.tensor([65519.0, 65520.0, 1e6, 3.4e38])])[None]
    # w' = 0 w - lr s m' / (sqrt(v') + eps) with lr = -1, all else exact: w' = m
    one = torch.ones_like(wanted)
    nothing = torch.zeros(wanted.shape, dtype=dtype)
    values_ = torch.tensor([-1.0, 0.0, 1.0, 0.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    values_[1] = 1.0  # beta1 = 1: m stays
    w = nothing.clone()
    scaled_adam([w], [nothing], [wanted.clone()], [one], [None], [None], values_)
    assert torch.equal(w, wanted.to(dtype))


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
def test_random_bits_at_far_offsets(isa):
    for offset in (0, 1, 2**33 - 5, 2**33 - 1024, 2**40 + 7):
        found = _native.extension.random_bits(9, 4, 2, offset, 1100)
        assert found == [random_bits(9, 4, 2, offset + j) for j in range(1100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_threads_or_company(dtype, threads):
    shapes = [(300, 257), (1, 1), (5, 70001), (90000, 1), (3, 3)]
    x = draw(shapes, dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        scaled_adam(*(y := x.copy()).args(), values(), seed=1)
        results.append(y)
    alone = x.copy()
    for k in range(len(shapes)):  # at the same place in the list, for the random bits
        lists = [[None] * k + [values_[k]] for values_ in alone.args()]
        for n in range(4):
            lists[n][:k] = [lists[n][k].new_zeros(0, 1)] * k
        scaled_adam(*lists, values(), seed=1)
    for y in [*results[1:], alone]:
        for name in ("ws", "ms", "vs"):
            pairs = zip(getattr(y, name), getattr(results[0], name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_tensor_hyper_parameters():
    x = draw([(4, 5)], torch.float64)
    y = x.copy()
    scaled_adam(*x.args(), values(3))
    step = torch.tensor(3, dtype=torch.int64)
    made = hyper(step, **(SETTINGS | {"lr": torch.tensor(0.03, dtype=torch.float64)}))
    scaled_adam(*y.args(), made)
    assert_relative(y.ws[0], x.ws[0], 1e-15)


def test_autograd_sees_the_writes():
    x = draw([(4, 5), (2, 2)], torch.float32)
    written = [*x.ws, *x.ms, *x.vs]
    before = [t._version for t in written]
    kept = [t._version for t in x.gs]
    scaled_adam(*x.args(), values())
    assert all(t._version > b for t, b in zip(written, before, strict=True))
    assert [t._version for t in x.gs] == kept


def test_parameters_under_no_grad_and_inference():
    x = draw([(4, 5)], torch.float32)
    w = torch.nn.Parameter(x.ws[0].clone())
    with pytest.raises(RuntimeError, match=r"ws\[0\]: requires grad.*no_grad"):
        scaled_adam([w], *x.args()[1:], values())
    with torch.no_grad():
        scaled_adam([w], *(y := x.copy()).args()[1:], values())
    with torch.inference_mode():
        z = draw([(4, 5)], torch.float32)
        scaled_adam(*z.args(), values())
        assert torch.equal(z.ws[0], w)
    assert torch.equal(z.vs[0], y.vs[0])


def test_bad_arguments():
    x = draw([(4, 5), (2, 3)], torch.float32)
    h = values()

    def step(error, message, hyper=h, **changes):
        lists = vars(x.copy()) | changes
        with pytest.raises(error, match=message):
            scaled_adam(*(lists[n] for n in ("ws", "gs", "ms", "vs", "rows", "cols")), hyper)

    step(TypeError, r"ws: expected a list of tensors", ws=x.ws[0])
    step(TypeError, r"ws\[1\]: expected a tensor", ws=[x.ws[0], None])
    step(ValueError, r"gs: expected 2 tensors, got 1", gs=x.gs[:1])
    step(ValueError, r"ws\[1\]: expected 2 dimensions", ws=[x.ws[0], torch.zeros(3)])
    step(ValueError, r"ws\[0\]: expected a contiguous", ws=[torch.zeros(5, 4).mT, x.ws[1]])
    step(ValueError, r"ws\[1\]: .*float32 on cpu, as the first", ws=[x.ws[0], x.ws[1].double()])
    step(ValueError, r"gs\[1\]: expected shape \(2, 3\)", gs=[x.gs[0], torch.zeros(3, 2)])
    step(ValueError, r"gs\[0\]: expected torch.float32", gs=[g.double() for g in x.gs])
    step(ValueError, r"ms\[0\]: expected torch.float32", ms=[m.bfloat16() for m in x.ms])
    step(ValueError, r"ms\[0\]: expected shape", ms=[x.ms[1], x.ms[1]])
    step(ValueError, r"vs\[0\]: expected shape", vs=[x.vs[1], x.vs[1]])
    step(ValueError, r"vs\[0\]: expected torch.float32", vs=[v.double() for v in x.vs])
    step(ValueError, r"rows: expected 2 entries, got 1", rows=[None])
    step(ValueError, r"rows\[0\]: expected size 4", rows=[torch.ones(5), None])
    step(ValueError, r"cols\[1\]: expected size 3", cols=[None, torch.ones(2)])
    step(TypeError, r"cols\[1\]: expected dtype float32", cols=[None, torch.ones(3).double()])
    step(TypeError, r"cols: expected a list", cols=None)
    step(ValueError, r"rows\[0\]: expected a contiguous vector", rows=[torch.ones(8)[::2], None])
    step(ValueError, r"rows\[0\]: expected a contiguous", rows=[torch.ones(4, device="meta"), None])
    step(TypeError, r"hyper: expected dtype float64", h.float())
    step(ValueError, rf"hyper: expected size {len(HYPER)}", h[:5])
    step(ValueError, r"hyper: expected a contiguous tensor on cpu", h.to("meta"))
    step(ValueError, r"hyper: expected a contiguous tensor", h.repeat(2)[::2])
    step(TypeError, r"gs\[0\]: expected a dense", gs=[x.gs[0].to_sparse(), x.gs[1]])
    with pytest.raises(ValueError, match=r"seed: expected an integer >= -1"):
        scaled_adam(*x.args(), h, seed=-2)
    with pytest.raises(TypeError, match=r"seed: expected an integer"):
        scaled_adam(*x.args(), h, seed=1.5)


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
def test_the_extension_checks_for_itself():
    x = draw([(4, 5), (2, 3)], torch.float32)
    run, h = _native.extension.scaled_adam, values()

    def step(error, message, hyper=h, threads=1, **changes):
        lists = vars(x.copy()) | changes
        lists = [lists[n] for n in ("ws", "gs", "ms", "vs", "rows", "cols")]
        with pytest.raises(error, match=message):
            run(*lists, hyper, False, -1, threads)

    step(ValueError, r"gs: expected 2 entries, got 1", gs=x.gs[:1])
    step(ValueError, r"gs\[1\]: expected 2 rows \(those of ws\), got 3", gs=[x.gs[0], x.gs[0][:3]])
    step(ValueError, r"vs\[1\]: expected 3 columns", vs=[x.vs[0], torch.zeros(2, 4)])
    step(ValueError, r"rows\[0\]: expected 4 rows", rows=[torch.ones(5), None])
    step(ValueError, r"ms: expected float64 where ws is", ms=[m.double() for m in x.ms])
    step(ValueError, r"gs: expected the type of ws", gs=[g.half() for g in x.gs])
    step(ValueError, r"gs\[1\]: expected the type of the others", gs=[x.gs[0], x.gs[1].half()])
    step(ValueError, r"ws\[0\]: expected a contiguous", ws=[torch.zeros(5, 4).mT, x.ws[1]])
    step(ValueError, r"ws\[1\]: expected 2 dimensions", ws=[x.ws[0], torch.zeros(3)])
    step(TypeError, r"ws\[1\]: expected a CPU tensor", ws=[x.ws[0], torch.zeros(2, 3).int()])
    step(ValueError, r"hyper: expected float64 \(8,\)", h[:5])
    step(ValueError, r"threads: expected at least 1", threads=0)
    step(ValueError, r"ws, ms, vs: .*memory of its own", vs=x.ms, ms=x.ms)
    part = torch.zeros(26)
    step(ValueError, r"memory of its own", ws=[part[:20].view(4, 5), part[19:25].view(2, 3)])
    part = [part[:20].view(4, 5), part[20:].view(2, 3)]
    run(part, x.gs, x.ms, x.vs, x.rows, x.cols, h, False, -1, 1)
    with pytest.raises(ValueError, match="offset"):
        _native.extension.random_bits(0, 0, 0, -1, 3)
    with pytest.raises(ValueError, match="count"):
        _native.extension.random_bits(0, 0, 0, 1, -3)


def test_registered_operator():
    for dtype, seed in ((torch.float32, -1), (torch.bfloat16, 3)):
        x = draw([(4, 5), (2, 3)], dtype)
        x.rows[0] = x.cols[1] = None
        args = (*x.args(), values(), False, seed)
        torch.library.opcheck(torch.ops.deaddir.scaled_adam_.default, args)


def test_compiles_to_one_node():
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    @torch.compile(fullgraph=True, backend=keep)
    def step(ws, gs, ms, vs, rows, cols, h):
        scaled_adam(ws, gs, ms, vs, rows, cols, h)
        return ws[0] * 2

    x = draw([(4, 5), (2, 3)], torch.float32)
    y = x.copy()
    doubled = step(*x.args(), values())
    scaled_adam(*y.args(), values())
    targets = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
    assert "deaddir.scaled_adam_.default" in targets
    assert torch.equal(x.ws[0], y.ws[0])
    assert torch.equal(doubled, 2 * y.ws[0])

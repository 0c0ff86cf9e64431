from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from adam_steps import DTYPES, Lists, assert_close, draw, moved, state_dtype, values
from compare import EPS, assert_relative, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import scaled_adam, shared_adam

torch.set_num_threads(1)

INT = torch.int32


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


@dataclass
class Shared(Lists):
    row_groups: list
    col_groups: list

    def args(self):
        return (*super().args(), self.row_groups, self.col_groups)


def heads(n, size):
    return (torch.arange(n) // size).to(INT)


def halves(n):  # rotary pairs: j and j + n/2
    return (torch.arange(n) % (n // 2)).to(INT)


def neighbours(n):  # rotary pairs: 2j and 2j + 1
    return heads(n, 2)


def scattered(n, count, seed=0):
    """Every group is met, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(n, generator=generator) % count).to(INT)


def rotary_heads(n, size):  # halves of each head in turn
    j = torch.arange(n)
    return (j // size * (size // 2) + j % (size // 2)).to(INT)


#: (shape, groups of rows, groups of columns)
CASES = [
    ((12, 5), heads(12, 4), None),
    ((5, 12), None, heads(12, 4)),
    ((64, 90), halves(64), None),
    ((9, 90), None, halves(90)),
    ((9, 90), None, neighbours(90)),
    ((64, 33), rotary_heads(64, 16), None),
    ((10, 64), None, rotary_heads(64, 16)),
    ((30, 70), heads(30, 10), heads(70, 7)),
    ((31, 200), scattered(31, 4), scattered(200, 7)),
    ((200, 31), scattered(200, 9), None),
    ((7, 600), None, scattered(600, 50)),
    ((17, 3), heads(17, 17), heads(3, 3)),
    ((150, 1), heads(150, 16), None),
    ((1, 150), None, heads(150, 16)),
    ((150, 1), None, None),
    ((12, 80), None, None),
    ((1, 1), heads(1, 1), heads(1, 1)),
    ((130, 40), heads(130, 130), None),
    ((0, 4), None, heads(4, 2)),
    ((4, 0), heads(4, 2), None),
    ((0, 0), None, None),
]
#: Groups too large for one thread.
LARGE = [
    ((700, 600), heads(700, 700), heads(600, 600)),
    ((1100, 700), heads(1100, 1100), None),
    ((40, 20000), heads(40, 20), None),
    ((5000, 3), scattered(5000, 2), scattered(3, 2)),
    ((400, 1300), scattered(400, 1), scattered(1300, 130)),
    ((400001, 1), heads(400001, 400001), None),
    ((3, 100000), None, heads(100000, 64)),
]


def problem(cases, dtype, *, rows=True, cols=True, seed=0):
    x = draw([case[0] for case in cases], dtype, rows=rows, cols=cols, seed=seed)
    shapes = [
        tuple(n if g is None else int(g.max()) + 1 for n, g in zip(shape, groups, strict=True))
        for shape, *groups in cases
    ]
    vs = [v.square().to(state_dtype(dtype)) for v in draw(shapes, torch.float64, seed=seed + 1).ws]
    x.vs = vs
    return Shared(**vars(x), row_groups=[c[1] for c in cases], col_groups=[c[2] for c in cases])


def grouped(x, k):
    """Means over the groups of matrix k, and their spreading, in numpy or in torch."""
    o, i = x.ws[k].shape
    row = torch.arange(o) if x.row_groups[k] is None else x.row_groups[k].long()
    col = torch.arange(i) if x.col_groups[k] is None else x.col_groups[k].long()
    r, c = row.numpy(), col.numpy()
    to_rows = torch.eye(x.vs[k].shape[0], dtype=torch.float64)[row]
    to_cols = torch.eye(x.vs[k].shape[1], dtype=torch.float64)[col]
    count = to_rows.sum(0)[:, None] * to_cols.sum(0)

    def mean(squares):
        if isinstance(squares, np.ndarray):
            return to_rows.numpy().T @ squares @ to_cols.numpy() / count.numpy()
        total = to_rows.to(squares.dtype).mT @ squares @ to_cols.to(squares.dtype)
        return total / count.to(squares.dtype)

    return {"mean": mean, "spread": lambda v: v[r][:, c]}


def check_values(x, *, maximize=False):
    y = x.copy()
    shared_adam(*y.args(), values(), maximize=maximize)
    for k, w in enumerate(x.ws):
        groups, in_torch = grouped(x, k), partial(torch.Tensor.to, dtype=x.ms[k].dtype)
        truth = moved(x, k, maximize=maximize, **groups)
        w1, m1, v1 = moved(x, k, maximize=maximize, arithmetic=in_torch, **groups)
        for result, exact, same in zip(
            (y.ws[k], y.ms[k], y.vs[k]), truth, (w1.to(w.dtype), m1, v1), strict=True
        ):
            assert_close(result, exact, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("cols", [False, True])
def test_values(dtype, rows, cols):
    check_values(problem(CASES, dtype, rows=rows, cols=cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_on_every_instruction_set(isa, dtype):
    with backend("cpu"):
        check_values(problem(CASES, dtype))


@pytest.mark.parametrize("case", LARGE, ids=lambda case: "x".join(map(str, case[0])))
def test_large_groups(case, forced_route):
    (o, i), row, col = case
    x = problem([case, CASES[0]], torch.float32)
    y = x.copy()
    shared_adam(*y.args(), values())
    # one-hot matrices would be large here: means by weights of a histogram
    r = np.arange(o) if row is None else row.numpy()
    c = np.arange(i) if col is None else col.numpy()
    b, a = x.vs[0].shape
    place = (r[:, None] * a + c).ravel()
    count = np.bincount(place, minlength=b * a).reshape(b, a)

    def mean(squares):
        return np.bincount(place, squares.ravel(), b * a).reshape(b, a) / count

    truth = moved(x, 0, mean=mean, spread=lambda v: v[r][:, c])
    for result, exact in zip((y.ws[0], y.ms[0], y.vs[0]), truth, strict=True):
        bound = 6e-7 if forced_route == "cpu" else 1e-4  # torch adds one after another in fp32
        assert np.abs(to_numpy(result) - exact).max() <= bound * np.abs(exact).max()


def test_maximize():
    check_values(problem(CASES[:9], torch.float32), maximize=True)


@given(
    o=st.integers(1, 30),
    i=st.integers(1, 30),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_groups(o, i, data, seed):
    def groups(n):
        count = data.draw(st.integers(0, n))
        return scattered(n, count, data.draw(st.integers(0, 1000))) if count else None

    rows, cols = data.draw(st.booleans()), data.draw(st.booleans())
    x = problem([((o, i), groups(o), groups(i))], torch.float64, rows=rows, cols=cols, seed=seed)
    check_values(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_groups_it_is_scaled_adam(dtype):
    x = problem([((5, 7), None, None), ((3, 70), None, None)], dtype)
    y = x.copy()
    shared_adam(*x.args(), values())
    scaled_adam(*Lists.args(y), values())
    for name in ("ws", "ms", "vs"):
        for a, b in zip(getattr(x, name), getattr(y, name), strict=True):
            assert_relative(a, b, 1e-5 if a.dtype in DTYPES[:2] else EPS[a.dtype])


def test_every_element_its_own_group_is_scaled_adam():
    x = problem([((5, 70), heads(5, 1), heads(70, 1))], torch.float64)
    y = x.copy()
    shared_adam(*x.args(), values())
    scaled_adam(*Lists.args(y), values())
    assert_relative(x.vs[0], y.vs[0], 1e-14)
    assert np.abs(to_numpy(x.ws[0]) - to_numpy(y.ws[0])).max() < 1e-13


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("by", ["rows", "cols"])
def test_turns_with_rotations_of_a_group(by):
    """Heads turned by different rotations, over several steps: v stays, m and w turn."""
    turn = torch.block_diag(*(orthogonal(4, seed) for seed in range(3)))
    groups, d = heads(12, 4), 1 if by == "cols" else 0

    def turned(w):
        return turn @ w if by == "rows" else w @ turn.mT

    shape = (12, 9) if by == "rows" else (9, 12)
    case = (shape, groups, None) if by == "rows" else (shape, None, groups)
    x = problem([case], torch.float64, rows=d == 1, cols=d == 0)  # scales of the other side only
    y = x.copy()
    y.ws, y.ms = [turned(x.ws[0]).contiguous()], [turned(x.ms[0]).contiguous()]
    for step in range(1, 5):
        x.gs = [torch.randn(shape, dtype=torch.float64)]
        y.gs = [turned(x.gs[0]).contiguous()]
        for each in (x, y):
            shared_adam(*each.args(), values(step))
    assert_relative(y.vs[0], x.vs[0], 1e-12)
    assert np.abs(to_numpy(y.ms[0] - turned(x.ms[0]))).max() < 1e-13
    assert np.abs(to_numpy(y.ws[0] - turned(x.ws[0]))).max() < 1e-12


def test_turns_with_phases_of_rotary_pairs():
    n, i = 16, 5
    angle = torch.rand(n // 2, dtype=torch.float64) * 6
    c, s = torch.diag(angle.cos()), torch.diag(angle.sin())
    turn = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])
    x = problem([((n, i), halves(n), None)], torch.float64, rows=False)
    y = x.copy()
    for name in ("ws", "gs", "ms"):
        setattr(y, name, [turn @ getattr(x, name)[0]])
    for each in (x, y):
        shared_adam(*each.args(), values())
    assert_relative(y.vs[0], x.vs[0], 1e-13)
    assert np.abs(to_numpy(y.ws[0] - turn @ x.ws[0])).max() < 1e-13


@given(power=st.lists(st.integers(-5, 5), min_size=12, max_size=12), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_moves_with_rescaled_units(power, seed):
    """(w, g, row) -> (c w, g / c, c row), c a power of 2: not a bit of m and v changes."""
    x = problem([((12, 9), heads(12, 4), scattered(9, 3))], torch.float32, seed=seed)
    c = torch.tensor([2.0**p for p in power])
    y = x.copy()
    y.ws, y.gs, y.rows = [x.ws[0] * c[:, None]], [x.gs[0] / c[:, None]], [x.rows[0] * c]
    for each in (x, y):
        shared_adam(*each.args(), values())
    assert torch.equal(y.ms[0], x.ms[0])
    assert torch.equal(y.vs[0], x.vs[0])
    assert torch.equal(y.ws[0], x.ws[0] * c[:, None])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_group(bad):
    cases = [((12, 20), heads(12, 4), None), ((6, 40), None, halves(40)), *CASES[7:9]]
    x = problem(cases, torch.float32)
    for g in x.gs:
        g[2, 3] = bad
    y = x.copy()
    shared_adam(*y.args(), values())
    for k in range(len(cases)):
        with np.errstate(invalid="ignore"):
            truth = moved(x, k, **_loops(x, k))
        for result, exact in zip((y.ws[k], y.ms[k], y.vs[k]), truth, strict=True):
            assert torch.equal(result.isnan(), torch.from_numpy(np.isnan(exact)))
            assert torch.equal(result.isinf(), torch.from_numpy(np.isinf(exact)))


def _loops(x, k):
    """As `grouped`, by loops: 0 times infinity must not come in."""
    o, i = x.ws[k].shape
    r = np.arange(o) if x.row_groups[k] is None else x.row_groups[k].numpy()
    c = np.arange(i) if x.col_groups[k] is None else x.col_groups[k].numpy()

    def mean(squares):
        return np.array(
            [
                [squares[np.ix_(r == b, c == a)].mean() for a in range(x.vs[k].shape[1])]
                for b in range(x.vs[k].shape[0])
            ]
        )

    return {"mean": mean, "spread": lambda v: v[r][:, c]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_only_its_own_memory(dtype):
    x, bases = problem([*CASES[:3], CASES[8]], dtype), []

    def guarded(t):
        base = torch.full((t.numel() + 34,), float("nan"), dtype=t.dtype)
        bases.append(base)
        inside = base[17 : 17 + t.numel()].view(t.shape)
        return inside.copy_(t)

    y = x.copy()
    y.ws, y.ms, y.vs = ([guarded(t) for t in values_] for values_ in (x.ws, x.ms, x.vs))
    shared_adam(*y.args(), values())
    shared_adam(*x.args(), values())
    for base in bases:
        assert base[:17].isnan().all()
        assert base[-17:].isnan().all()
        assert not base[17:-17].isnan().any()
    for name in ("ws", "ms", "vs"):
        pairs = zip(getattr(x, name), getattr(y, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("case", [CASES[0], CASES[8], ((600, 1000), heads(600, 600), None)])
def test_stochastic_rounding_is_that_of_scaled_adam(case):
    """Without gradients and moments both steps multiply w by 1 - lr weight_decay and round it."""
    x = problem([CASES[1], case], torch.bfloat16)
    for t in (*x.gs, *x.ms):
        t.zero_()
    y = x.copy()
    y.vs = [torch.ones(w.shape) for w in x.ws]
    shared_adam(*x.args(), values(), seed=5)
    scaled_adam(*Lists.args(y), values(), seed=5)
    for a, b in zip(x.ws, y.ws, strict=True):
        assert torch.equal(a, b)
    nearest = problem([CASES[1], case], torch.bfloat16).ws[1] * 0.997
    assert not torch.equal(x.ws[1], nearest)


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_threads(dtype, threads):
    x = problem([*CASES, *LARGE], dtype)
    results = []
    with backend("cpu"):  # sums of torch do depend on threads
        for count in (1, 2, 3, 7):
            threads(count)
            shared_adam(*(y := x.copy()).args(), values(), seed=2)
            results.append(y)
    for y in results[1:]:
        for name in ("ws", "ms", "vs"):
            pairs = zip(getattr(y, name), getattr(results[0], name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_to_do():
    shared_adam([], [], [], [], [], [], [], [], values())


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("where", ["row_groups", "col_groups"])
def test_groups_outside_are_refused(where, wrong, forced_route):
    x = problem([CASES[0], ((12, 12), heads(12, 4), heads(12, 4))], torch.float32)
    getattr(x, where)[1] = getattr(x, where)[1].clone()
    getattr(x, where)[1][5] = wrong
    y = x.copy()
    with pytest.raises((ValueError, IndexError, RuntimeError)) as caught:
        shared_adam(*y.args(), values())
    if forced_route == "cpu":
        assert f"{where}[1]: expected entries from 0 to 2, got {wrong} at 5" in str(caught.value)
        for name in ("ws", "ms", "vs"):
            pairs = zip(getattr(x, name), getattr(y, name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_autograd_sees_the_writes():
    x = problem(CASES[:2], torch.float32)
    written = [*x.ws, *x.ms, *x.vs]
    before = [t._version for t in written]
    shared_adam(*x.args(), values())
    assert all(t._version > b for t, b in zip(written, before, strict=True))


def test_bad_arguments():
    x = problem([((4, 6), heads(4, 2), heads(6, 3)), ((2, 3), None, None)], torch.float32)

    def step(error, message, **changes):
        lists = vars(x.copy()) | changes
        with pytest.raises(error, match=message):
            shared_adam(*Shared(**lists).args(), values())

    v, v1 = x.vs
    step(ValueError, r"vs: expected 2 tensors, got 1", vs=[v])
    step(TypeError, r"vs: expected a list of tensors", vs=v)
    step(ValueError, r"vs\[1\]: expected size 2 in dimension 0", vs=[v, torch.zeros(1, 3)])
    step(ValueError, r"vs\[1\]: expected size 3 in dimension 1", vs=[v, torch.zeros(2, 2)])
    step(TypeError, r"vs\[0\]: expected dtype float32", vs=[v.double(), v1])
    step(ValueError, r"vs\[1\]: expected a contiguous", vs=[v, torch.zeros(3, 2).mT])
    step(ValueError, r"vs\[1\]: expected 2 dimensions", vs=[v, torch.zeros(3)])
    step(TypeError, r"row_groups\[0\]: expected dtype int32", row_groups=[heads(4, 2).long(), None])
    step(ValueError, r"row_groups\[0\]: expected size 4", row_groups=[heads(5, 2), None])
    step(ValueError, r"col_groups\[0\]: expected size 6", col_groups=[heads(5, 2), None])
    step(ValueError, r"col_groups: expected 2 entries", col_groups=[None])
    step(ValueError, r"row_groups\[0\]: expected a contig", row_groups=[heads(8, 2)[::2], None])
    step(ValueError, r"gs\[0\]: expected shape", gs=[x.gs[1], x.gs[1]])
    step(ValueError, r"ms\[1\]: expected torch.float32", ms=[x.ms[0], x.ms[1].double()])
    with pytest.raises(ValueError, match=r"seed: expected an integer >= -1"):
        shared_adam(*x.args(), values(), seed=-2)
    with pytest.raises(RuntimeError, match=r"ws\[0\]: requires grad.*no_grad"):
        x.ws[0].requires_grad_()
        shared_adam(*x.args(), values())


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
def test_the_extension_checks_for_itself():
    x = problem([((4, 6), heads(4, 2), heads(6, 3)), ((2, 3), None, None)], torch.float32)

    def step(error, message, **changes):
        lists = vars(x.copy()) | changes
        with pytest.raises(error, match=message):
            _native.extension.shared_adam(*Shared(**lists).args(), values(), False, -1, 1)

    v, v1 = x.vs
    step(ValueError, r"vs: expected 2 entries, got 1", vs=[v])
    step(ValueError, r"vs\[1\]: expected 2 rows", vs=[v, torch.zeros(1, 3)])
    step(ValueError, r"vs\[1\]: expected 3 columns", vs=[v, torch.zeros(2, 2)])
    step(ValueError, r"vs: expected float64 where ws is", vs=[v.double(), v1.double()])
    step(TypeError, r"row_groups\[0\]: expected a CPU tensor of int32",
         row_groups=[heads(4, 2).long(), None])  # fmt: skip
    step(TypeError, r"row_groups\[0\]: expected a CPU tensor of int32",
         row_groups=[torch.zeros(4), None])  # fmt: skip
    step(ValueError, r"row_groups\[0\]: expected 4 rows", row_groups=[heads(5, 2), None])
    step(ValueError, r"col_groups\[0\]: expected entries from 0 to 1, got 2 at 4",
         col_groups=[heads(6, 2), None])  # fmt: skip


def test_registered_operator():
    for dtype, seed in ((torch.float32, -1), (torch.bfloat16, 3)):
        x = problem([((4, 6), heads(4, 2), heads(6, 3)), ((2, 3), None, None)], dtype)
        x.rows[0] = None
        args = (*x.args(), values(), False, seed)
        torch.library.opcheck(torch.ops.deaddir.shared_adam_.default, args)


def test_compiles_to_one_node():
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    @torch.compile(fullgraph=True, backend=keep)
    def step(ws, gs, ms, vs, rows, cols, row_groups, col_groups, h):
        shared_adam(ws, gs, ms, vs, rows, cols, row_groups, col_groups, h)
        return ws[0] * 2

    x = problem(CASES[:2], torch.float32)
    y = x.copy()
    doubled = step(*x.args(), values())
    shared_adam(*y.args(), values())
    targets = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
    assert "deaddir.shared_adam_.default" in targets
    assert torch.equal(x.ws[0], y.ws[0])
    assert torch.equal(doubled, 2 * y.ws[0])

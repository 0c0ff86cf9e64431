"""Optimizer steps of the Triton kernels on a GPU: values, streams, graphs, AdamW."""

from __future__ import annotations

import pytest
import torch
from compare import assert_relative
from numpy_steps import BF16, F16, F32, F64, Problem, draw, hyper, take

from deaddir_fast._backend import backend
from deaddir_fast.ops import scaled_adam, scaled_squares, shared_adam

lists = pytest.importorskip("deaddir_fast.kernels._lists", reason="Triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

SHAPES = [(5, 7), (33, 1030), (700, 768), (1, 21000), (1, 1), (0, 4), (1300, 1), (512, 2048)]
BOUND = {F64: 1e-12, F32: 2e-5}
DTYPES = [F64, F32, BF16, F16]


@pytest.fixture(autouse=True)
def forced_route():
    with backend("triton"):
        yield


def blocks(n, size):
    return (torch.arange(n) // size).to(torch.int32)


def pairs(n):
    return (torch.arange(n) % (n // 2)).to(torch.int32)


def scattered(n, count):
    group = torch.randint(0, count, (n,))
    group[:count] = torch.arange(count)
    return group[torch.randperm(n)].to(torch.int32)


def groups():
    """Heads, rotary pairs, uneven and scattered groups, all of a matrix, none."""
    return [
        ((512, 768), (blocks(512, 64), None)),
        ((512, 770), (pairs(512), None)),
        ((300, 1024), (None, blocks(1024, 128))),
        ((300, 1024), (None, pairs(1024))),
        ((700, 3000), (blocks(700, 700), blocks(3000, 3000))),
        ((257, 130), (scattered(257, 9), scattered(130, 40))),
        ((600, 64), (torch.arange(600).sub(580).clamp(min=0).to(torch.int32), None)),
        ((40, 24), (None, None)),
    ]


def assert_same(result: Problem, truth: Problem) -> None:
    for name in ("ws", "ms", "vs"):
        for k, (a, b) in enumerate(zip(getattr(result, name), getattr(truth, name), strict=True)):
            assert torch.equal(a.cpu(), b.cpu()), f"{name}[{k}] {tuple(a.shape)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_of_squares(dtype, scaled):
    p = draw(SHAPES, dtype, rows=scaled, cols=scaled).copy("cuda")
    for dim in (0, 1):
        dims = [dim] * len(SHAPES)
        result = scaled_squares(p.ws, p.rows, p.cols, dims)
        assert torch.equal(result, scaled_squares(p.ws, p.rows, p.cols, dims))
        truth = []
        for w, row, col in zip(p.ws, p.rows, p.cols, strict=True):
            x = w.double()
            x = x if row is None else x * row.double()[:, None]
            x = x if col is None else x * col.double()
            truth.append(x.square().sum(1 - dim))
        assert_relative(result, torch.cat(truth), BOUND[result.dtype])


@pytest.mark.parametrize(
    ("dtype", "seed"), [(F64, -1), (F32, -1), (F16, -1), (BF16, -1), (BF16, 9)]
)
@pytest.mark.parametrize("scaled", [(False, False), (True, True), (True, False), (False, True)])
def test_a_step_to_the_bit(dtype, seed, scaled):
    problem = draw(SHAPES, dtype, rows=scaled[0], cols=scaled[1])
    result = problem.copy("cuda")
    maximize = scaled == (True, False)
    scaled_adam(*result.args(), hyper("cuda"), maximize=maximize, seed=seed)
    assert_same(result, take(problem, maximize, seed))


def test_unaligned_matrices():
    problem = draw([(60, 64), (60, 64)], F32)
    result = problem.copy("cuda")
    for some in (result.ws, result.gs, result.vs):
        base = torch.empty(1 + some[1].numel(), device="cuda")
        some[1] = base[1:].view_as(some[1]).copy_(some[1])
        assert some[1].data_ptr() % 16 != 0
    scaled_adam(*result.args(), hyper("cuda"))
    assert_same(result, take(problem, False, -1))
    truth = result.ws[1].double().square().sum(1)
    assert_relative(scaled_squares(result.ws[1:], [None], [None], [0]), truth, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_shared_step(dtype, scaled):
    cases = groups()
    maps = [pair for _, pair in cases]
    problem = draw([s for s, _ in cases], dtype, rows=scaled, cols=scaled, groups=maps)
    result, again = problem.copy("cuda"), problem.copy("cuda")
    shared_adam(*result.args(), hyper("cuda"), maximize=scaled)
    shared_adam(*again.args(), hyper("cuda"), maximize=scaled)
    assert_same(again, result)
    truth = take(problem, scaled, -1)
    slack = {F64: 1e-12, F32: 1e-5, BF16: 2**-8, F16: 2**-11}[dtype]
    for k in range(len(cases)):
        assert torch.equal(result.ms[k].cpu(), truth.ms[k])
        assert_relative(result.vs[k], truth.vs[k], BOUND[truth.vs[k].dtype])
        w, expected = result.ws[k].double().cpu(), truth.ws[k].double()
        assert ((w - expected).abs() <= slack * (expected.abs() + 0.1)).all()


def test_a_graph_takes_the_step_that_the_hyper_parameters_say():
    shapes = [(512, 64), (33, 130)]
    maps = [(blocks(512, 64), None), (None, pairs(130))]
    shared = draw(shapes, F32, groups=maps).copy("cuda")
    plain = draw(shapes, F32).copy("cuda")
    values = hyper("cuda")

    def step():
        shared_adam(*shared.args(), values)
        scaled_adam(*plain.args(), values)
        return scaled_squares(plain.ws, plain.rows, plain.cols, [0, 1])

    expected = [Problem(*p.copy("cuda").args()) for p in (shared, plain)]
    changed = values.clone()
    changed[0] *= 0.5
    for h in (values, changed):  # a step that builds the tables, and a replay
        shared_adam(*expected[0].args(), h)
        scaled_adam(*expected[1].args(), h)
    squares = scaled_squares(expected[1].ws, expected[1].rows, expected[1].cols, [0, 1])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = step()
    lists.clear()  # the graph holds what it reads
    torch.cuda.empty_cache()
    values.copy_(changed)
    graph.replay()
    for result, truth in zip((shared, plain), expected, strict=True):
        assert_same(result, truth)
    assert torch.equal(sums, squares)


def test_a_graph_is_refused_a_list_that_was_not_met_before():
    problem = draw([(16, 8)], F32).copy("cuda")
    values = hyper("cuda")
    lists.clear()
    with (
        pytest.raises(RuntimeError, match="before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        scaled_adam(*problem.args(), values)


def test_other_streams_wait_for_the_table():
    problem = draw([(700, 768)], F32)
    result, values = problem.copy("cuda"), hyper("cuda")
    lists.clear()
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    before = problem.copy("cuda")
    scaled_adam(*before.args(), values)  # another list: compiled, not in the way
    scaled_adam(*result.args(), values)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        scaled_adam(*result.args(), values)
    torch.cuda.synchronize()
    assert_same(result, take(take(problem, False, -1), False, -1))


def test_steps_are_those_of_fused_adamw():
    torch.manual_seed(1)
    ws = [torch.randn(s, device="cuda", requires_grad=True) for s in [(300, 257), (64, 64)]]
    ours = [w.detach().clone() for w in ws]
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(ws, fused=True, **settings)
    ms, vs = ([torch.zeros_like(w) for w in ours] for _ in range(2))
    for step in range(1, 6):
        gs = [torch.randn_like(w) for w in ours]
        for w, g in zip(ws, gs, strict=True):
            w.grad = g.clone()
        optimizer.step()
        one, two = (1 - b**step for b in settings["betas"])
        values = [settings["lr"], *settings["betas"], 1e-8, 0.1, one, two, step]
        h = torch.tensor(values, dtype=F64, device="cuda")
        scaled_adam(ours, gs, ms, vs, [None] * 2, [None] * 2, h)
    for a, b in zip(ours, ws, strict=True):
        assert ((a - b).abs() <= 1e-5 * (b.abs() + 0.1)).all()

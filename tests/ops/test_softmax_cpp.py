"""The C++ kernels of the categorical family, called directly, with every usable instruction set."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from compare import assert_relative, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import linear_softmax_fisher, softmax_fisher, softmax_kl
from deaddir_fast.ops._dispatch import OPS

C: Any = _native.extension

pytestmark = pytest.mark.skipif(C is None, reason=f"no C++ here: {_native.why_not}")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BOUND = {F64: 1e-12, F32: 2e-5}


@pytest.fixture(params=C.build_info()["isas"] if C else [])
def isa(request):
    previous = C.use_isa(request.param)
    yield request.param
    C.use_isa(previous)


def run(name, *args, threads=1):
    wide = any(x is not None and x.dtype == F64 for x in args)
    out = torch.full(args[1].shape[:2], float("nan"), dtype=F64 if wide else F32)
    getattr(C, name)(*args, out, threads)
    return out


# ------------------------------------------------------------------------------- the mathematics


def probability(z):
    weight = np.exp(z - z.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def centred(p, x):
    x = x - np.take_along_axis(x, p.argmax(-1)[None, :, None].repeat(len(x), 0), -1)
    return x - (p * x).sum(-1, keepdims=True)


def true_fisher(logits, tangent):
    p = probability(to_numpy(logits))
    return (p * centred(p, to_numpy(tangent)) ** 2).sum(-1)


def excess(x):
    """e^x - 1 - x, from its power series where the difference would cancel."""
    near = np.where(np.abs(x) < 0.5, x, 0.0)
    term, total = np.ones_like(x), np.zeros_like(x)
    for k in range(1, 20):
        term = term * near / k
        total = total + (term if k > 1 else 0.0)
    return np.where(np.abs(x) < 0.5, total, np.expm1(x) - x)


def true_kl(logits, logits_t):
    """For the difference of the arguments as the type of the arithmetic represents it."""
    dtype = F64 if F64 in (logits.dtype, logits_t.dtype) else F32
    p = probability(to_numpy(logits))
    x = centred(p, to_numpy(logits_t.to(dtype) - logits.to(dtype)))
    return np.log1p((p * excess(x)).sum(-1))


def true_linear(h, dh, W, bias=None, dW=None):
    h, dh, W = map(to_numpy, (h, dh, W))
    z, tangent = h @ W.T, dh @ W.T
    if bias is not None:
        z = z + to_numpy(bias)
    if dW is not None:
        tangent = tangent + np.einsum("nd,pcd->pnc", h, to_numpy(dW))
    return true_fisher(z, tangent)


def features(n, d, c, p, dtypes=(F64,) * 5):
    """h, dh, W, bias, dW with logits of order one."""
    shapes = (n, d), (p, n, d), (c, d), (c,), (p, c, d)
    scales = (max(1, d) ** -0.5, 1.0, 1.0, 1.0, 1.0)
    return tuple(
        (k * torch.randn(s, dtype=F64)).to(t)
        for k, s, t in zip(scales, shapes, dtypes, strict=True)
    )


# -------------------------------------------------------------------------------------- values

# Around vectors of 2 to 16 lanes, their unrolled groups, runs and chunks of 2048 and 4096.
CLASSES = [1, 2, 3, 15, 17, 65, 2047, 2048, 2049, 4097, 12289]


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32), (BF16, F16), (F32, F64)])
@pytest.mark.parametrize("c", CLASSES)
def test_values_over_one_row(isa, c, dtypes):
    z, tangent = (3 * torch.randn(2, c)).to(dtypes[0]), (torch.randn(3, 2, c) + 5).to(dtypes[1])
    result = run("softmax_fisher", z, tangent)
    bound = BOUND[result.dtype]
    assert_relative(result, true_fisher(z, tangent), bound)
    for step in (1e-3, 0.3, 3.0):
        moved = (z.double() + step * torch.randn(3, 2, c)).to(dtypes[1])
        assert_relative(run("softmax_kl", z, moved), true_kl(z, moved), bound)


# Around strips of 48 and 96 classes, panels of 8 to 32 samples, depths of 512, groups of 20
# directions and blocks of some hundred samples.
LINEAR = [
    (1, 1, 1, 1),
    (2, 0, 5, 3),
    (3, 5, 2, 1),
    (16, 33, 95, 2),
    (17, 64, 96, 3),
    (31, 7, 97, 2),
    (33, 511, 12, 1),
    (5, 512, 13, 2),
    (4, 513, 200, 1),
    (2, 1300, 49, 2),
    (3, 6, 50, 41),
    (700, 5, 60, 2),
    (8, 3, 4000, 1),
]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape", LINEAR)
def test_values_of_a_read_out(isa, shape, dtype):
    h, dh, W, bias, dW = features(*shape, (dtype,) * 5)
    for b, dw in ((None, None), (bias, None), (None, dW), (bias, dW)):
        result = run("linear_softmax_fisher", h, dh, W, b, dw)
        assert_rms(result, true_linear(h, dh, W, b, dw), BOUND[result.dtype] / 4)


@given(
    n=st.integers(0, 40),
    c=st.integers(1, 300),
    p=st.integers(0, 12),
    dtypes=st.tuples(*[st.sampled_from([F64, F32, BF16, F16])] * 2),
    scale=st.floats(0.01, 20),
    exponent=st.floats(-6, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_type(n, c, p, dtypes, scale, exponent, seed):
    torch.manual_seed(seed)
    z = (scale * torch.randn(n, c)).to(dtypes[0])
    tangent = (10.0**exponent * torch.randn(p, n, c)).to(dtypes[1])
    moved = (z.double() + 10.0**exponent * torch.randn(p, n, c)).to(dtypes[1])
    for name, other, truth in (
        ("softmax_fisher", tangent, true_fisher(z, tangent)),
        ("softmax_kl", moved, true_kl(z, moved)),
    ):
        result = run(name, z, other)
        assert result.shape == (p, n)
        assert torch.equal(result, run(name, z, other, threads=3))
        resolved = truth > 1e-30  # fp32 squares underflow below
        assert_relative(result.numpy()[resolved], truth[resolved], BOUND[result.dtype])
        assert (result.numpy()[~resolved] <= 2e-30).all()


@given(
    n=st.integers(0, 70),
    d=st.integers(0, 60),
    c=st.integers(8, 250),
    p=st.integers(0, 6),
    dtypes=st.tuples(*[st.sampled_from([F64, F32, BF16, F16])] * 5),
    biased=st.booleans(),
    moving=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_any_read_out(n, d, c, p, dtypes, biased, moving, seed):
    torch.manual_seed(seed)
    h, dh, W, bias, dW = features(n, d, c, p, dtypes)
    args = h, dh, W, bias if biased else None, dW if moving else None
    result = run("linear_softmax_fisher", *args)
    assert result.dtype == (F64 if any(x is not None and x.dtype == F64 for x in args) else F32)
    assert torch.equal(result, run("linear_softmax_fisher", *args, threads=3))
    assert_relative(result, true_linear(*args), BOUND[result.dtype])


def test_the_error_does_not_grow_with_the_number_of_classes(isa):
    z, tangent = 3 * torch.randn(1, 300_000), torch.randn(1, 1, 300_000)
    assert_relative(run("softmax_fisher", z, tangent), true_fisher(z, tangent), 2e-6)
    moved = z + 0.1 * tangent
    assert_relative(run("softmax_kl", z, moved), true_kl(z, moved), 2e-6)
    h, dh, W, _, _ = features(2, 4, 50_000, 2, (F32,) * 5)
    assert_relative(run("linear_softmax_fisher", h, dh, W, None, None), true_linear(h, dh, W), 2e-6)


@pytest.mark.parametrize(("dtype", "lowest"), [(F32, 104.0), (F64, 746.0)])
def test_the_exponential_to_the_end_of_its_range(isa, dtype, lowest):
    # two classes e^-x apart: the variance of (0, 1) is p (1 - p), about e^-x
    x = torch.cat([torch.linspace(0, lowest, 4001).to(dtype), torch.tensor([torch.inf]).to(dtype)])
    z = torch.stack([torch.zeros_like(x), -x], 1)
    tangent = torch.tensor([0.0, 1.0], dtype=dtype).expand(1, len(x), 2).contiguous()
    result = to_numpy(run("softmax_fisher", z, tangent))[0]
    with mpmath.workdps(40):
        e = [mpmath.exp(-mpmath.mpf(float(v))) for v in x]
        truth = np.array([float(v / (1 + v) ** 2) for v in e])
    eps = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * eps
    assert (np.abs(result - truth) <= 4 * eps * truth + smallest).all()
    assert result[-1] == 0


# ---------------------------------------------------------------------------- hard distributions


def test_constants_cost_nothing(isa):
    for dtype, shift in ((F32, 2.0**16), (F64, 2.0**40)):
        base = torch.randint(-8, 9, (2, 3, 5000)).to(dtype)
        z = torch.randn(3, 5000).to(dtype)
        assert_relative(run("softmax_fisher", z, base + shift), true_fisher(z, base), BOUND[dtype])
        constant = torch.full_like(base, 1.2345678)
        assert (run("softmax_fisher", z, constant) == 0).all()


@pytest.mark.parametrize("winner", [0, 2500, 4999])
@pytest.mark.parametrize("gap", [0.0, 20.0, 60.0])
def test_a_confident_class_costs_no_digits(isa, gap, winner):
    for dtype in (F32, F64):
        z, tangent = torch.randn(2, 5000).to(dtype), torch.randn(2, 2, 5000).to(dtype) + 100
        z[:, winner] += gap + 8
        assert_relative(run("softmax_fisher", z, tangent), true_fisher(z, tangent), BOUND[dtype])
        moved = z + 0.1 * torch.randn(2, 2, 5000).to(dtype)
        assert_relative(run("softmax_kl", z, moved), true_kl(z, moved), BOUND[dtype])
        h, dh, W, bias, _ = features(3, 4, 300, 2, (dtype,) * 5)
        bias[winner % 300] += gap + 8
        result = run("linear_softmax_fisher", h, dh, W, bias, None)
        assert_relative(result, true_linear(h, dh, W, bias), BOUND[dtype])


def test_masked_classes_are_absent(isa):
    # whole chunks and strips at either end, and every third class between
    keep = torch.zeros(9000, dtype=torch.bool)
    keep[4200:4600:3] = True
    z, tangent = torch.randn(2, 9000).double(), torch.randn(3, 2, 9000).double()
    masked = torch.where(keep, z, -torch.inf)
    moved = torch.where(keep, z + 0.2 * tangent, -torch.inf)
    few, few_tangents = z[:, keep], tangent[:, :, keep]
    assert_relative(run("softmax_fisher", masked, tangent), true_fisher(few, few_tangents), 1e-12)
    expected = true_kl(few, few + 0.2 * few_tangents)
    assert_relative(run("softmax_kl", masked, moved), expected, 1e-12)

    h, dh, W, bias, dW = features(3, 4, 500, 2)
    bias[:110], bias[120:400] = -torch.inf, -torch.inf
    rest = bias.isfinite()
    expected = true_linear(h, dh, W[rest], bias[rest], dW[:, rest])
    assert_relative(run("linear_softmax_fisher", h, dh, W, bias, dW), expected, 1e-12)

    nothing = torch.full_like(z, -torch.inf)
    assert run("softmax_fisher", nothing, tangent).isnan().all()
    assert run("softmax_kl", nothing, tangent).isnan().all()
    nothing = torch.full_like(bias, -torch.inf)
    assert run("linear_softmax_fisher", h, dh, W, nothing, dW).isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("far", [30.0, 44.0, 46.0, 80.0, 95.0, 200.0, 1e5])
def test_divergences_of_any_size(isa, far, dtype):
    # one class of little or no probability moves up, into the overflow of e^x and beyond
    for depth, c in product((1.0, 30.0, 90.0), (5, 3000)):
        z = torch.zeros(1, c).to(dtype)
        z[0, 2] = -depth
        moved = z[None].clone()
        moved[0, 0, 2] += far
        with mpmath.workdps(60):
            weight, move = mpmath.exp(-mpmath.mpf(depth)), mpmath.mpf(far)
            p = weight / (weight + c - 1)
            truth = float(mpmath.log1p(p * mpmath.expm1(move)) - p * move)
        # the exponent, up to 100, is rounded before its exponential is taken
        bound = BOUND[dtype] if dtype == F32 else 1e-13
        if truth > 1e-25:
            assert_relative(run("softmax_kl", z, moved), np.array([[truth]]), bound)


def test_gained_and_lost_classes(isa):
    inf = torch.inf
    z = torch.randn(2, 2100).double()
    z[0, 2050] = -inf
    moved = z + 0.1 * torch.randn(3, 2, 2100).double()
    moved[0, 0, 2050] = 0.7  # gained
    moved[1, :, 7] = -inf  # lost
    result = run("softmax_kl", z, moved)
    assert (result[1] == inf).all()
    keep = torch.arange(2100) != 2050
    expected = true_kl(z[:1, keep], moved[[0, 2], :1][..., keep])
    assert_relative(result[2, :1], expected[1], 1e-12)
    left = moved[0, 0, keep].exp().sum()
    grown = expected[0] + float(torch.log((left + moved[0, 0, 2050].exp()) / left))
    assert_relative(result[0, :1], grown, 1e-12)


SPECIAL = [float("nan"), float("inf"), -float("inf")]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_non_finite_values_as_in_the_reference(data):
    n, p, c = 3, 2, data.draw(st.sampled_from([1, 4, 19, 40]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    place = st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL))

    def spoil(x, at_most):
        for where, value in data.draw(st.lists(place, max_size=at_most)):
            if x.numel():
                x.view(-1)[where % x.numel()] = value
        return x

    dtype = data.draw(st.sampled_from([F64, F32]))
    z = spoil(torch.randn(n, c).to(dtype), 3)
    tangent, moved = (spoil(torch.randn(p, n, c).to(dtype), 4) for _ in range(2))
    h, dh, W, bias, dW = features(n, 5, c, p, (dtype,) * 5)
    h, dh, W, bias, dW = spoil(h, 1), spoil(dh, 1), spoil(W, 1), spoil(bias, 2), spoil(dW, 1)
    calls = [
        (softmax_fisher, (z, tangent), {}),
        (softmax_kl, (z, moved), {}),
        (linear_softmax_fisher, (h, dh, W), {"bias": bias, "dW": dW}),
        (linear_softmax_fisher, (h, dh, W), {"bias": bias}),
    ]
    for op, args, more in calls:
        with backend("reference"):
            expected = op(*args, **more)
        with backend("cpu"):
            result = op(*args, **more)
        assert torch.equal(result.isnan(), expected.isnan()), (op, result, expected)
        assert torch.equal(result.isinf(), expected.isinf()), (op, result, expected)


# ------------------------------------------------------------------------- threads, memory, calls


@pytest.mark.parametrize("shape", [(1, 100_000, 1), (1, 3000, 60), (40, 5000, 2), (3000, 40, 3)])
def test_same_bits_on_any_number_of_threads(isa, shape):
    n, c, p = shape
    z, tangent = torch.randn(n, c), torch.randn(p, n, c)
    for name in ("softmax_fisher", "softmax_kl"):
        once = run(name, z, tangent)
        assert once.isfinite().all()
        for threads in (1, 2, 3):
            assert torch.equal(once, run(name, z, tangent, threads=threads))


@pytest.mark.parametrize("shape", [(1, 100, 20_000, 1), (300, 40, 500, 2), (40, 600, 300, 3)])
def test_same_bits_of_a_read_out_on_any_number_of_threads(isa, shape):
    args = features(*shape, (F32,) * 5)
    once = run("linear_softmax_fisher", *args)
    assert once.isfinite().all()
    for threads in (1, 2, 3):
        assert torch.equal(once, run("linear_softmax_fisher", *args, threads=threads))


def test_a_sample_does_not_depend_on_its_neighbours(isa):
    h, dh, W, bias, dW = features(75, 20, 300, 2, (F32,) * 5)
    whole = run("linear_softmax_fisher", h, dh, W, bias, dW)
    h[3], dh[:, 40] = torch.nan, torch.inf
    spoiled = run("linear_softmax_fisher", h, dh, W, bias, dW)
    clean = torch.ones(75, dtype=torch.bool)
    clean[[3, 40]] = False
    assert torch.equal(spoiled[:, clean], whole[:, clean])
    assert spoiled[:, ~clean].isnan().all()


MEMORY = """
import torch
from deaddir_fast import _native

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

n, d, c, p = 256, 256, 32000, 2
h, dh, W, out = torch.randn(n, d), torch.randn(p, n, d), torch.randn(c, d), torch.empty(p, n)
first = h[:1], dh[:, :1].contiguous(), W, None, None, out[:, :1].contiguous()
_native.extension.linear_softmax_fisher(*first, 2)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
_native.extension.linear_softmax_fisher(h, dh, W, None, None, out, 2)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_read_out():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    if "clear_refs" in done.stderr and "Error" in done.stderr:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    written_out = 3 * 256 * 32000 * 4  # logits and two tangents
    assert int(done.stdout) < written_out / 10


def test_strides_types_and_inputs():
    z = torch.randn(40, 12).mT[::2].bfloat16()
    tangent = torch.randn(40, 12, 3).permute(2, 1, 0)[:, ::2].double()
    h, W = torch.randn(8, 6).mT, torch.randn(30, 16)[::2, ::2].half()
    dh = torch.randn(8, 6, 2).double().permute(2, 1, 0)
    inputs = z, tangent, h, W, dh
    before = [x.clone() for x in inputs]
    with backend("cpu"):
        assert_relative(softmax_fisher(z, tangent), true_fisher(z, tangent), 1e-12)
        assert_relative(softmax_kl(z, tangent), true_kl(z, tangent), 1e-12)
        assert_relative(linear_softmax_fisher(h, dh, W), true_linear(h, dh, W), 1e-12)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_empty_extents(isa):
    for n, p in ((0, 3), (3, 0), (0, 0)):
        for name in ("softmax_fisher", "softmax_kl"):
            assert run(name, torch.randn(n, 5), torch.randn(p, n, 5)).shape == (p, n)
        assert run("linear_softmax_fisher", *features(n, 4, 6, p)).shape == (p, n)
    h, dh, W, bias, dW = features(3, 0, 6, 2)
    assert torch.equal(run("linear_softmax_fisher", h, dh, W, bias, dW), torch.zeros(2, 3).double())


Z, T, H, DH, WW = (torch.zeros(s) for s in ((3, 4), (2, 3, 4), (3, 5), (2, 3, 5), (4, 5)))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("softmax_fisher", (Z[0], T, Z, 1), r"logits: .*\(n, c\), c >= 1, got float32 \(4,\)"),
        ("softmax_fisher", (torch.zeros(3, 0), T, torch.zeros(2, 3), 1), "logits: .*c >= 1"),
        ("softmax_fisher", (Z, torch.zeros(2, 2, 4), torch.zeros(2, 3), 1), "tangent: .*size 3"),
        ("softmax_fisher", (Z, T, torch.zeros(2, 2), 1), "out: .*size 3 .*the samples of logits"),
        ("softmax_fisher", (Z, T, torch.zeros(1, 3), 1), "out: .*size 2 .*tangent"),
        ("softmax_fisher", (Z, T.double(), torch.zeros(2, 3), 1), "out: .*float64, as an input is"),
        ("softmax_fisher", (Z, T, torch.zeros(2, 3), 0), "threads: .*at least 1"),
        ("softmax_kl", (Z, Z, Z, 1), "logits_t: .*3 dimensions"),
        ("softmax_kl", (Z, torch.zeros(2, 3, 5), torch.zeros(2, 3), 1), "logits_t: .*size 4"),
        ("linear_softmax_fisher", (H, DH[:, :2].contiguous(), WW), "dh: .*size 3"),
        ("linear_softmax_fisher", (H, DH, torch.zeros(4, 6)), "W: .*size 5"),
        ("linear_softmax_fisher", (H, DH, torch.zeros(0, 5)), "W: .*c >= 1"),
        ("linear_softmax_fisher", (H, DH, WW, torch.zeros(3)), "bias: .*size 4"),
        ("linear_softmax_fisher", (H, DH, WW, None, torch.zeros(1, 4, 5)), "dW: .*size 2"),
        ("linear_softmax_fisher", (H, DH, WW, None, DH), "dW: .*size 4"),
    ],
)
def test_bad_arguments_are_named(name, args, message):
    if name == "linear_softmax_fisher":
        args = (*args, *(None,) * (5 - len(args)), torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match=message):
        getattr(C, name)(*args)


def test_every_operation_of_the_family_has_a_kernel():
    for name in ("softmax_fisher", "softmax_kl", "linear_softmax_fisher"):
        assert OPS[name].kernels[0].route == "cpu"

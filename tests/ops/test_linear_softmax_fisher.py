from __future__ import annotations

import pytest
import torch
from compare import assert_relative, assert_rms

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import linear_softmax_fisher, softmax_fisher
from deaddir_fast.ops.linear_softmax_fisher import reference

torch.set_num_threads(1)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def route(request):
    if request.param == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(request.param):
        yield request.param


def make(n, d, c, p, dtype=torch.float64):
    shapes = (n, d), (p, n, d), (c, d), (c,), (p, c, d)
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def truth(h, dh, W, bias=None, dW=None):
    """With the logits written out, in fp64; `softmax_fisher` is tested against 60 digits."""
    h, dh, W = h.double(), dh.double(), W.double()
    logits, tangent = h @ W.mT, dh @ W.mT
    if bias is not None:
        logits = logits + bias.double()
    if dW is not None:
        tangent = tangent + torch.einsum("nd,pcd->pnc", h, dW.double())
    return softmax_fisher(logits, tangent)


@pytest.mark.parametrize("tile", [1, 7, 64, 1024])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 5, 65, 3), (7, 3, 200, 2), (2, 0, 5, 3)])
def test_values(shape, tile, monkeypatch):
    monkeypatch.setitem(reference.__globals__, "TILE", tile)
    h, dh, W, bias, dW = make(*shape)
    for b, dw in ((None, None), (bias, None), (None, dW), (bias, dW)):
        result = linear_softmax_fisher(h, dh, W, bias=b, dW=dw)
        assert_rms(result, truth(h, dh, W, b, dw), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    h, dh, W, bias, dW = make(6, 16, 300, 3, dtype)
    result = linear_softmax_fisher(h, dh, W, bias=bias, dW=dW)
    assert result.dtype == torch.float32
    assert_rms(result, truth(h, dh, W, bias, dW), 2e-5)


def test_never_stores_all_logits(monkeypatch):
    n, d, c, p = 64, 4, 5000, 2
    h, dh, W, bias, _ = make(n, d, c, p)
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 2**17)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        result = reference(h, dh, W, bias, None)
    assert largest < n * c / 4
    assert_rms(result, truth(h, dh, W, bias), 1e-13)


@pytest.mark.parametrize("gap", [0.0, 15.0, 30.0, 200.0])
def test_a_confident_class_in_any_tile(gap, monkeypatch):
    monkeypatch.setitem(reference.__globals__, "TILE", 4)
    h, dh, W, bias, dW = make(3, 5, 20, 2)
    for winner in (0, 9, 19):
        b = bias.clone()
        b[winner] += gap
        result = linear_softmax_fisher(h, dh, W, bias=b, dW=dW)
        assert_relative(result, truth(h, dh, W, b, dW), 1e-11)


def test_masked_classes_and_masked_tiles(monkeypatch):
    monkeypatch.setitem(reference.__globals__, "TILE", 4)
    h, dh, W, bias, dW = make(3, 5, 14, 2)
    bias[:5], bias[8:12] = -torch.inf, -torch.inf
    keep = [5, 6, 7, 12, 13]
    expected = truth(h, dh, W[keep], bias[keep], dW[:, keep])
    assert_relative(linear_softmax_fisher(h, dh, W, bias=bias, dW=dW), expected, 1e-12)
    all_masked = torch.full_like(bias, -torch.inf)
    assert linear_softmax_fisher(h, dh, W, bias=all_masked).isnan().all()


def test_a_gauge_direction_reads_zero():
    # the same vector added to every row of W shifts all logits alike; products of equal rows may
    # differ in their last bit, and the variance is that squared
    h, dh, W, _, _ = make(4, 8, 50, 1)
    dW = torch.randn(8).double().expand(1, 50, 8)
    result = linear_softmax_fisher(h, torch.zeros_like(dh), W, dW=dW)
    random = linear_softmax_fisher(h, torch.zeros_like(dh), W, dW=torch.randn(1, 50, 8).double())
    assert (result <= 1e-28 * random).all()


def test_strides_and_empty():
    h, W = torch.randn(5, 8).double().mT, torch.randn(10, 14).double().mT[::2, ::2]
    dh = torch.randn(5, 8, 3).double().permute(2, 1, 0)
    assert_rms(linear_softmax_fisher(h, dh, W), truth(h, dh, W), 1e-13)
    for n, p in ((0, 3), (3, 0), (0, 0)):
        h, dh, W, bias, dW = make(n, 4, 6, p)
        assert linear_softmax_fisher(h, dh, W, bias=bias, dW=dW).shape == (p, n)


def test_nan_stays_with_its_sample():
    h, dh, W, bias, _ = make(4, 3, 10, 2)
    h[1, 0], dh[0, 2, 1] = float("nan"), float("nan")
    result = linear_softmax_fisher(h, dh, W, bias=bias)
    expected = [[False, True, True, False], [False, True, False, False]]
    assert result.isnan().tolist() == expected


def test_bad_arguments():
    h, dh, W, bias, dW = make(4, 3, 10, 2)
    with pytest.raises(ValueError, match=r"dh: expected size 4 in dimension 1"):
        linear_softmax_fisher(h, dh[:, :3], W)
    with pytest.raises(ValueError, match=r"W: expected size 3 in dimension 1"):
        linear_softmax_fisher(h, dh, W.mT)
    with pytest.raises(ValueError, match=r"W: expected at least one class"):
        linear_softmax_fisher(h, dh, W[:0])
    with pytest.raises(ValueError, match=r"bias: expected size 10"):
        linear_softmax_fisher(h, dh, W, bias=bias[:9])
    with pytest.raises(ValueError, match=r"dW: expected size 2 in dimension 0"):
        linear_softmax_fisher(h, dh, W, dW=dW[:1])
    with pytest.raises(RuntimeError, match=r"W: requires grad"):
        linear_softmax_fisher(h, dh, torch.nn.Parameter(W))


def test_registered_operator():
    h, dh, W, bias, dW = make(4, 3, 10, 2, torch.float32)
    torch.library.opcheck(torch.ops.deaddir.linear_softmax_fisher.default, (h, dh, W, bias, dW))
    torch.library.opcheck(torch.ops.deaddir.linear_softmax_fisher.default, (h, dh, W, None, None))

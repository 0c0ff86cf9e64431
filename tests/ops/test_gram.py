from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import EPS, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast._backend import backend
from deaddir_fast.ops import gram
from deaddir_fast.ops._blocks import WORKSPACE

torch.set_num_threads(1)

SHAPES = [(1, 1), (5, 3), (63, 33), (1000, 65), (0, 4), (7, 0), (0, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(x, weight=None, out=None, alpha=1.0, beta=0.0):
    x = to_numpy(x)
    w = np.ones(len(x)) if weight is None else to_numpy(weight)
    result = alpha * (x.T @ (w[:, None] * x))
    if beta:
        lower = np.tril(to_numpy(out))
        result = result + beta * (lower + np.tril(lower, -1).T)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_values(shape, dtype, weighted):
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[0], dtype=dtype) if weighted else None
    result = gram(x, weight=weight, alpha=0.3)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result, result.mT)
    expected = truth(x, weight, alpha=0.3)
    eps = EPS[result.dtype]  # 16-bit inputs are exact and summed in fp32
    size = np.linalg.norm(np.abs(0.3 * to_numpy(x)).T @ np.abs(to_numpy(x)))
    error = np.linalg.norm(to_numpy(result) - expected)
    assert error <= 8 * eps * max(size, 1e-300)


@given(
    n=st.integers(0, 40),
    i=st.integers(0, 12),
    alpha=st.floats(-3, 3),
    beta=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_update_in_place(n, i, alpha, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=generator, dtype=torch.float64)
    out = torch.randn(i, i, generator=generator, dtype=torch.float64)
    expected = truth(x, None, out, alpha, beta)
    version = out._version
    result = gram(x, out=out, alpha=alpha, beta=beta)
    assert result is out
    assert out._version > version
    assert torch.equal(out, out.mT)
    assert np.abs(to_numpy(out) - expected).max(initial=0) <= 1e-13 * (n + 1) * 10


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 1000)
    x, weight = torch.randn(501, 7, dtype=torch.float64), torch.rand(501)
    assert_rms(gram(x, weight=weight), truth(x, weight), 1e-14)
    assert WORKSPACE > 1000


def test_large():
    x = torch.randn(3000, 300)
    assert_rms(gram(x), truth(x), 1e-6)


def test_strided_inputs_and_outputs():
    base = torch.randn(20, 30, dtype=torch.float64)
    x, weight = base.mT[::2], torch.rand(30, dtype=torch.float64)[::2]
    out = torch.zeros(20, 40, dtype=torch.float64)[:, ::2]
    before = base.clone()
    gram(x, weight=weight, out=out)
    assert_rms(out, truth(x, weight), 1e-14)
    assert torch.equal(base, before)


def test_nan_and_infinity_propagate():
    x = torch.randn(6, 4, dtype=torch.float64)
    x[2, 1] = float("nan")
    result = gram(x)
    bad = torch.zeros(4, 4, dtype=torch.bool)
    bad[1], bad[:, 1] = True, True
    assert torch.equal(result.isnan(), bad)
    x[2, 1] = float("inf")
    result = gram(x)
    assert result[1, 1] == float("inf")
    assert torch.equal(~result.isfinite(), bad)


def test_beta_zero_does_not_read_out():
    x = torch.randn(5, 3)
    out = torch.full((3, 3), float("nan"))
    assert_rms(gram(x, out=out), truth(x), 1e-6)


def test_no_samples():
    out = torch.eye(3)
    gram(torch.zeros(0, 3), out=out, beta=0.5)
    assert torch.equal(out, 0.5 * torch.eye(3))


def test_products_of_fp32_are_not_rounded_to_tf32():
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.fail("torch has no switch for the precision of matrix products")
    x = torch.randn(256, 64)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert_rms(gram(x), truth(x), 1e-6)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_bad_arguments():
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"x: expected a tensor.*got list"):
        gram([[1.0]])
    with pytest.raises(TypeError, match=r"x: expected dtype .*int64"):
        gram(x.long())
    with pytest.raises(TypeError, match=r"x: expected a dense"):
        gram(x.to_sparse())
    with pytest.raises(ValueError, match=r"x: expected 2 dimensions"):
        gram(x[0])
    with pytest.raises(ValueError, match=r"weight: expected size 5"):
        gram(x, weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"out: expected shape \(3, 3\)"):
        gram(x, out=torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"out: expected dtype float32"):
        gram(x, out=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out: .*shares no memory with x"):
        square = torch.randn(3, 3)
        gram(square, out=square)
    with pytest.raises(ValueError, match=r"beta: expected 0 where no out"):
        gram(x, beta=0.5)
    with pytest.raises(ValueError, match=r"alpha: expected a finite number"):
        gram(x, alpha=float("nan"))
    with pytest.raises(TypeError, match=r"alpha: expected a real number"):
        gram(x, alpha="one")
    with pytest.raises(ValueError, match=r"weight: expected a tensor on cpu, where x is"):
        gram(x, weight=torch.ones(5, device="meta"))


def test_gradients_are_refused():
    x = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"x: requires grad.*detach\(\).*no_grad"):
        gram(x)
    with torch.no_grad():
        assert not gram(x).requires_grad
    with pytest.raises(RuntimeError, match="no gradient is defined"):
        torch.ops.deaddir.gram(x, None, 1.0).sum().backward()


def test_registered_operators():
    x, weight = torch.randn(5, 3), torch.rand(5)
    torch.library.opcheck(torch.ops.deaddir.gram.default, (x, None, 0.5))
    torch.library.opcheck(torch.ops.deaddir.gram.default, (x.bfloat16(), weight, 0.5))
    out = torch.zeros(3, 3)
    torch.library.opcheck(torch.ops.deaddir.gram_.default, (out, x, weight, 0.5, 0.9))


def test_compiles_to_one_node():
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    @torch.compile(fullgraph=True, backend=keep)
    def step(x, out):
        gram(x, out=out, alpha=0.5, beta=0.9)
        return gram(x * 2) + 1

    x, out, compiled_out = torch.randn(5, 3), torch.eye(3), torch.eye(3)
    result = step(x, compiled_out)
    targets = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
    assert "deaddir.gram.default" in targets
    assert "deaddir.gram_.default" in targets
    assert torch.equal(result, gram(x * 2) + 1)
    assert torch.equal(compiled_out, gram(x, out=out, alpha=0.5, beta=0.9))


def test_forward_mode_goes_through_the_reference():
    x, tangent = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with backend("auto"):
        _, derivative = torch.func.jvp(gram, (x,), (tangent,))
    assert_rms(derivative, tangent.mT @ x + x.mT @ tangent, 1e-14)

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import deaddir_fast._backend
from deaddir_fast import _native
from deaddir_fast._backend import backend, routes, unavailable
from deaddir_fast.kernels import interpreted
from deaddir_fast.ops import _dispatch, directional_curvature, gram, softmax_fisher
from deaddir_fast.ops._dispatch import OPS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def default():
    with backend("auto"):
        yield


@pytest.fixture
def cpp(monkeypatch):
    """Calls of the C++ kernel of directional_curvature, whether or not it is built here."""
    calls = []

    class Extension:
        def directional_curvature(self, a, g, U, out, threads):
            calls.append((a, g, U, threads))
            out.fill_(7.0)

    monkeypatch.setattr(_native, "extension", Extension())
    return calls


def arguments(dtype=torch.float32):
    return tuple(torch.randn(s, dtype=dtype) for s in ((5, 4), (5, 3), (2, 3, 4)))


def test_setter_and_context_manager():
    assert backend() == "auto"
    backend("reference")
    assert backend() == "reference"
    with backend("auto") as name:
        assert name == backend() == "auto"
        with backend("reference"):
            assert backend() == "reference"
        assert backend() == "auto"
    assert backend() == "reference"
    with pytest.raises(KeyError), backend("auto"):
        raise KeyError
    assert backend() == "reference"


def test_a_stored_choice_can_be_entered_again():
    choice = backend("reference")
    backend("auto")
    for _ in range(2):
        with choice:
            assert backend() == "reference"


def test_threads_choose_for_themselves():
    seen = {}

    def work():
        seen["start"] = backend()
        backend("reference")
        ready.set()
        done.wait(10)
        seen["end"] = backend()

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    assert backend() == "auto"
    done.set()
    thread.join()
    assert seen == {"start": "auto", "end": "reference"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"backend: expected one of 'reference', 'cpu'"):
        backend("cuda")
    assert backend() == "auto"


def test_a_route_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "why_not", "no compiler was found")
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run here: no compiler was found"):
        backend("cpu")
    assert routes()["directional_curvature"]["cpu"] == "no compiler was found"
    a, g, U = arguments()
    assert directional_curvature(a, g, U).isfinite().all()  # the reference serves


@pytest.mark.skipif(torch.cuda.is_available() or interpreted(), reason="Triton runs here")
def test_triton_needs_a_gpu_or_the_interpreter():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: .*TRITON_INTERPRET=1"):
        backend("triton")


def test_triton_is_optional(monkeypatch):
    monkeypatch.setattr(deaddir_fast._backend, "_importable", lambda module: module != "triton")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: triton is not installed"):
        backend("triton")
    assert routes()["gram"]["triton"] == "triton is not installed"


def test_a_forced_route_refuses_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(deaddir_fast._backend, "_triton_problem", lambda: None)
    monkeypatch.setattr("deaddir_fast.kernels.INTERPRETED", False)
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match=r"gram: backend 'triton' is forced, .*on cpu"),
    ):
        gram(torch.randn(3, 2))
    without = replace(OPS["softmax_fisher"], kernels=())
    monkeypatch.setitem(OPS, "softmax_fisher", without)
    with backend("triton"):  # no Triton kernel: the reference
        assert softmax_fisher(torch.randn(3, 4), torch.randn(1, 3, 4)).shape == (1, 3)
    assert gram(torch.randn(3, 2)).shape == (2, 2)


def test_auto_and_cpu_take_the_cpp_kernel_and_reference_does_not(cpp):
    a, g, U = arguments()
    for name in ("auto", "cpu"):
        with backend(name):
            assert (directional_curvature(a, g, U) == 7).all()
    with backend("reference"):
        assert not (directional_curvature(a, g, U) == 7).any()
    assert len(cpp) == 2
    assert cpp[0][3] == torch.get_num_threads()
    # the registered operator takes the same way
    assert (torch.ops.deaddir.directional_curvature(a, g, U) == 7).all()


def test_cpp_gets_contiguous_tensors(cpp):
    a, g, U = (x.expand(*x.shape).mT.contiguous().mT for x in arguments())
    assert not a.is_contiguous()
    directional_curvature(a, g, U)
    assert all(x.is_contiguous() for x in cpp[0][:3])


class Wrapper(torch.Tensor):
    """A tensor that is not its memory."""


def test_only_plain_tensors_reach_compiled_kernels(cpp):
    a, g, U = arguments()
    directional_curvature(a.as_subclass(Wrapper), g, U)
    torch.func.jvp(lambda x: directional_curvature(a, g, x), (U,), (U,))
    torch.func.vmap(lambda x: directional_curvature(a, g, x[None]))(U)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(U, U)
        result = directional_curvature(a, g, dual)
        tangent = torch.autograd.forward_ad.unpack_dual(result).tangent
        assert torch.allclose(tangent, 2 * result, rtol=1e-5)
    directional_curvature(a, g, torch.randn(2, 4, 3, dtype=torch.complex64).mT.conj().imag)
    assert cpp == []
    directional_curvature(a, g, torch.nn.Parameter(U, requires_grad=False))
    assert len(cpp) == 1


def test_fake_tensors_reach_no_kernel(cpp):
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in arguments()]
        result = directional_curvature(*fakes)
    assert type(result) is torch._subclasses.FakeTensor
    assert result.shape == (2,)
    assert directional_curvature(*fakes).shape == (2,)  # outside of the mode, too
    assert directional_curvature(*(x.to("meta") for x in arguments())).is_meta
    assert cpp == []


def test_routes_lists_every_operation():
    report = routes()
    assert set(report) == set(_dispatch.OPS)
    for name, row in report.items():
        assert set(row) == {"reference", "cpu", "triton"}
        assert row["reference"] is None
        kernels = {kernel.route for kernel in _dispatch.OPS[name].kernels}
        for route in ("cpu", "triton"):
            expected = unavailable(route) if route in kernels else "no kernel for this operation"
            assert row[route] == expected

"""How far a result is from the truth: errors relative to fp64, with NaN and infinity in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def to_numpy(value: Any) -> np.ndarray:
    """Any tensor or array as fp64 numpy; 16-bit types widen exactly."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def relative_rms(result: Any, truth: Any) -> float:
    """Root mean square error over the root mean square of the truth (0 for two zeros)."""
    r, t = to_numpy(result), to_numpy(truth)
    assert r.shape == t.shape, f"shape {r.shape}, expected {t.shape}"
    error, size = np.linalg.norm((r - t).ravel()), np.linalg.norm(t.ravel())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / size)


def max_relative(result: Any, truth: Any) -> float:
    """Largest elementwise relative error (an exact zero must be met exactly)."""
    r, t = to_numpy(result), to_numpy(truth)
    assert r.shape == t.shape, f"shape {r.shape}, expected {t.shape}"
    error = np.abs(r - t)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(error == 0, 0.0, error / np.abs(t))
    return float(relative.max(initial=0.0))


def assert_rms(result: Any, truth: Any, bound: float) -> None:
    """The finite parts agree to ``bound`` in relative RMS; NaN and infinity sit where they should.

    Use it for sums of products, whose error scales with the size of the whole.
    """
    r, t = to_numpy(result), to_numpy(truth)
    _same_special(r, t)
    finite = np.isfinite(t)
    error = relative_rms(r[finite], t[finite])
    assert error <= bound, f"relative RMS error {error:.3g} > {bound:.3g}"


def assert_relative(result: Any, truth: Any, bound: float) -> None:
    """Every finite element agrees to relative ``bound``; NaN and infinity sit where they should."""
    r, t = to_numpy(result), to_numpy(truth)
    _same_special(r, t)
    finite = np.isfinite(t)
    error = max_relative(r[finite], t[finite])
    assert error <= bound, f"relative error {error:.3g} > {bound:.3g}"


def _same_special(r: np.ndarray, t: np.ndarray) -> None:
    assert r.shape == t.shape, f"shape {r.shape}, expected {t.shape}"
    np.testing.assert_array_equal(np.isnan(r), np.isnan(t), err_msg="NaN elsewhere")
    for sign in (np.inf, -np.inf):
        np.testing.assert_array_equal(r == sign, t == sign, err_msg=f"{sign} elsewhere")

"""How far a training drifts from what gradient flow would conserve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.gauge.balance import balance
from deaddir_fast.gauge.base import Gauge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drift:
    """Records during a training how far the conserved quantities move from where they started.

    The drift of a gauge is ‖Q(t) − Q(0)‖ / max_s≤t ‖P(s)‖, Q what is conserved and P the sum of
    the absolute parts it is made of (‖in_j‖² + ‖out_j‖² per unit, the trace of W_in W_inᵀ +
    W_outᵀ W_out per block, Σ|W_k| per class column). It does not change when all parameters are
    multiplied by one number, is 0 where Q is conserved or all parts are zero, and at most 2.

    Gradient flow keeps it at zero, gradient descent with step η lets it grow like η (twice as fast
    with twice the step over the same time); weight decay, momentum and Adam make it of order one.

    Example::

        drift = dd.gauge.Drift(model, dd.gauge.find(model))
        for epoch in range(epochs):
            ...
            drift.update()
        json.dump(drift.report(), file)

    Args:
        model: the module trained; its parameters are read at construction and at each update.
        gauges: as returned by ``find``; leave out those of another likelihood.

    Raises:
        TypeError: ``model`` is not a module, or ``gauges`` holds something else.
        ValueError: a gauge moves a parameter that the model does not have.
    """

    def __init__(self, model: nn.Module, gauges: Sequence[Gauge]) -> None:
        if not isinstance(model, nn.Module):
            raise _check.fail("model", model, "a torch.nn.Module", TypeError)
        self._model = model
        self._gauges: list[Gauge] = []
        self._without: list[Gauge] = []
        self._start: list[Tensor] = []
        sizes = []
        state = self._state()
        for gauge in gauges:
            found = balance(gauge, state)
            if found is None:
                self._without.append(gauge)
            else:
                self._gauges.append(gauge)
                self._start.append(found[0])
                sizes.append(found[1].norm())
        self._largest = _to_host(sizes)
        self._times: list[float] = [0.0]
        self._drifts: list[list[float]] = [[0.0] for _ in self._gauges]

    def _state(self) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in self._model.named_parameters()}

    def update(self, time: float | None = None) -> list[float]:
        """Record the present parameters: one pass over those that gauges move, one transfer.

        Args:
            time: where on the time axis; one more than the last by default.

        Returns:
            The drift of each gauge that conserves something, in the order of ``report``.

        Raises:
            ValueError: ``time`` is not finite.
        """
        at = self._times[-1] + 1.0 if time is None else _check.real("time", time)
        state = self._state()
        moves, sizes = [], []
        for gauge, start in zip(self._gauges, self._start, strict=True):
            found = balance(gauge, state)
            assert found is not None
            moves.append((found[0] - start.to(found[0].device)).norm())
            sizes.append(found[1].norm())
        moved = _to_host(moves)
        self._largest = [_larger(a, b) for a, b in zip(self._largest, _to_host(sizes), strict=True)]
        self._times.append(at)
        for history, move, size in zip(self._drifts, moved, self._largest, strict=True):
            history.append(0.0 if move == 0 else move / size)
        return [history[-1] for history in self._drifts]

    def report(self) -> dict[str, Any]:
        """What was recorded, of plain types that JSON knows.

        Returns:
            ``times``; ``gauges``: name, group, parameters, ``drift`` at each time and ``last``
            (None where parameters were not finite); ``without``: names of the gauges that conserve
            nothing in closed form.
        """
        rows = []
        for gauge, history in zip(self._gauges, self._drifts, strict=True):
            drift = [d if math.isfinite(d) else None for d in history]
            rows.append(
                {
                    "name": gauge.name,
                    "group": gauge.group,
                    "parameters": list(gauge.parameters),
                    "drift": drift,
                    "last": drift[-1],
                }
            )
        return {
            "times": list(self._times),
            "gauges": rows,
            "without": [g.name for g in self._without],
        }

    def plot(self) -> Figure:
        """Drift against time, one line a gauge; see :func:`plot_drift`."""
        return plot_drift(self.report())


def _to_host(scalars: list[Tensor]) -> list[float]:
    """One transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, s in enumerate(scalars):
        by_device.setdefault(s.device, []).append(i)
    out = [0.0] * len(scalars)
    for index in by_device.values():
        for i, value in zip(index, torch.stack([scalars[i] for i in index]).tolist(), strict=True):
            out[i] = value
    return out


def _larger(a: float, b: float) -> float:
    """The larger one; NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def plot_drift(report: Mapping[str, Any]) -> Figure:
    """A figure of a drift report: relative drift on a logarithmic axis over time.

    Args:
        report: as returned by ``Drift.report``, or read back from JSON.

    Raises:
        ImportError: matplotlib is missing (``pip install deaddir_fast[plot]``).
    """
    from deaddir_fast.gauge.plots import drift_figure

    return drift_figure(report)

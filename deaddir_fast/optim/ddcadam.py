"""DDCAdam: an Adam whose trajectory does not depend on the gauge of its starting point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deaddir_fast import _check
from deaddir_fast._backend import backend, unavailable
from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.discover import find
from deaddir_fast.optim.claims import Claim, treat
from deaddir_fast.optim.plan import make
from deaddir_fast.optim.stepper import Stepper


class DDCAdam(Optimizer):
    """Adam on the quotient of parameter space by a model's symmetries.

    From gauge equivalent starts, theta and h theta, the trajectories stay gauge equivalent for
    every symmetry in ``claims`` that is claimed; AdamW's drift apart. Moments are taken of
    quantities that no symmetry changes, so the state needs no transport. Parameters in no gauge
    get AdamW's step with the same betas, eps, bias correction and decoupled decay.

    How each kind of symmetry is treated (``deaddir_fast.optim.claims``):

    - Rescalings of units (ReLU networks, gated units, scales of normalisation layers), however
      they overlap: Adam in the path-norm frame, where every hidden unit's incoming weights have
      norm 1. An isolated rescaling, whose parameters no other symmetry meets: the paper's step for
      pairs, radial and tangential.
    - Attention heads (queries and keys, values and outputs) and other general linear gauges:
      scales by the frame, rotations by one second moment per head and row (our extension). Rotary
      heads: the whole commuting group. Shears within a head are not claimed.
    - Permutations of units: any such step respects them.
    - Class shifts: the shifted weights are not decayed.
    - Biases that a softmax takes back (of keys) stay where they are.
    - Shifts of a bias taken back by a later bias are not claimed.

    The learning rate means what it means for AdamW: at a balanced start the first steps are close
    to AdamW's (``deaddir_fast.optim.balance``).

    Args:
        model: a module; or, without gauges of its own, parameters or param groups as for any
            optimizer (then name them, ``model.named_parameters()``, if ``gauges`` is a list).
        lr: step length, a float or a 0-d tensor.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        gauges: ``"auto"`` finds them (``deaddir_fast.gauge.find``), ``"layerwise"`` finds them
            and uses one scale per hidden layer (the paper's chain step where layers form a
            chain); or a sequence of gauges; an empty one is AdamW.
        params: param groups over the parameters of ``model``; all trainable ones by default.
        inputs: passed to ``deaddir_fast.gauge.find``; needed where none can be made up.
        likelihood: ``"categorical"`` if the loss is a softmax cross-entropy over the last
            dimension of the outputs: shifts over classes are then symmetries. ``"gaussian"`` for
            any other loss.
        maximize: step up the gradient.
        foreach: True runs the plain torch route; the default chooses a kernel.
        fused: True demands compiled kernels and raises where there are none, False avoids them.
        capturable: keep step counts on the device, so that a step can be captured in a CUDA graph
            after the first one.
        vertical: let the pair and chain steps move along the gauge modes as well. Their gradient
            is zero up to rounding, which Adam amplifies: for comparison only.
        stochastic_rounding: round bf16 parameters stochastically; their state is fp32 anyway.
        seed: of stochastic rounding.

    A block of weights whose norm is exactly zero has no direction: it is stepped as AdamW would,
    and trajectories through such points are not promised to agree. Sharded parameters
    (``fully_shard``, DTensors with Shard or Replicate placements) work, with pairs treated in the
    frame; find the gauges before sharding and pass them. Gradients of float16 training go through
    ``torch.amp.GradScaler`` as usual.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; parameters that are sparse or complex.
        RuntimeError: ``fused=True`` without a compiled kernel; a sparse gradient in ``step``.

    Source: "Dead Directions" (arXiv 2606.05957), DDCAdam; the frame, the shared moment, the rules
    for overlaps and the constants are our choice.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gauges: str | Sequence[Gauge] = "auto",
        *,
        params: Iterable[Any] | None = None,
        inputs: Any = None,
        likelihood: str = "categorical",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        vertical: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        _check_numbers(lr, betas, eps, weight_decay)
        if foreach and fused:
            raise ValueError("fused: expected False or None where foreach is True, got True")
        _check.integer("seed", seed, 0)
        _check.choice("likelihood", likelihood, ("categorical", "gaussian"))
        if isinstance(gauges, str):
            _check.choice("gauges", gauges, ("auto", "layerwise"))
        else:
            gauges = list(gauges)
            for gauge in gauges:
                if not isinstance(gauge, Gauge):
                    raise _check.fail("gauges", gauge, "'auto', 'layerwise' or Gauges", TypeError)
        self._known: dict[str, Tensor] = {}
        if isinstance(model, nn.Module):
            self._known = dict(model.named_parameters())
            trainable = (p for p in model.parameters() if p.requires_grad)
            groups = trainable if params is None else params
        elif params is not None:
            raise _check.fail("model", model, "a torch.nn.Module where params is given", TypeError)
        else:
            groups = model
        self._layerwise = gauges == "layerwise"
        self._stepper: Stepper | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "vertical": vertical,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(groups, defaults)
        if isinstance(gauges, str):
            if isinstance(model, nn.Module):
                gauges = find(model, inputs)
            else:
                warnings.warn(
                    "DDCAdam was given parameters and no model, so no symmetry is known and its "
                    "step is AdamW's; pass the model, or gauges=deaddir_fast.gauge.find(model)",
                    UserWarning,
                    stacklevel=2,
                )
                gauges = []
        self.gauges: tuple[Gauge, ...] = tuple(
            g for g in gauges if g.likelihood in (None, likelihood)
        )
        self._ready()

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What is promised for each gauge, and how."""
        return self._ready().plan.claims

    def _ready(self) -> Stepper:
        """The laid-out step, made anew after param groups were added or the optimizer copied."""
        if self._stepper is None:
            names = self._named()
            owners = {
                names[id(p)]: n
                for n, group in enumerate(self.param_groups)
                for p in group["params"]
            }
            treatment = treat(self.gauges, self._known, owners, layerwise=self._layerwise)
            plan = make(treatment, self._known, list(owners))
            self._stepper = Stepper(plan, self._known, owners)
        return self._stepper

    def _named(self) -> dict[int, str]:
        """Names of all parameters by identity: the model's, else those given, else numbers."""
        names = {id(p): n for n, p in self._known.items()}
        count = 0
        for group in self.param_groups:
            given = group.get("param_names", [None] * len(group["params"]))
            for p, name in zip(group["params"], given, strict=True):
                names.setdefault(id(p), name or f"#{count}")
                self._known.setdefault(names[id(p)], p)
                count += 1
        return names

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that belong to no gauge of the optimizer get AdamW's step."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex() or p.is_sparse:
                kind = "complex" if p.is_complex() else "sparse"
                raise ValueError(f"params: expected real dense parameters, got a {kind} one")
        self._stepper = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stepper": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; moments keep their own dtype, whatever that of the parameters."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (p, group) in zip(numbers, owners, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    at_home = key == "step" and not group["capturable"]
                    device = torch.device("cpu") if at_home else p.device
                    self.state[p][key] = value.detach().to(device, copy=True)
        self._stepper = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss, or None.

        Parameters without a gradient stay as they are; within a pair or a chain a missing gradient
        counts as zero once another one is there.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepper = self._ready()
        with self._route():
            stepper.take(self.param_groups, self.state)
        return loss

    def _route(self) -> Any:
        group = self.param_groups[0]
        if group["fused"] is False or group["foreach"]:
            return backend("reference")
        if group["fused"]:
            device = group["params"][0].device.type
            route = "cpu" if device == "cpu" else "triton"
            problem = unavailable(route)
            if problem is not None:
                raise RuntimeError(f"fused: compiled kernels are demanded, but {problem}")
            return backend(route)
        return nullcontext()


def _check_numbers(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise _check.fail("lr", lr, "a number or a tensor of one element")
    else:
        _check.positive("lr", lr, allow_zero=True)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise _check.fail("betas", betas, "two numbers in [0, 1)")
    for n, beta in enumerate(betas):
        if not 0 <= _check.real(f"betas[{n}]", beta) < 1:
            raise _check.fail(f"betas[{n}]", beta, "a number in [0, 1)")
    _check.positive("eps", eps, allow_zero=True)
    _check.positive("weight_decay", weight_decay, allow_zero=True)

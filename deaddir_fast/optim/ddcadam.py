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
from deaddir_fast.optim.claims import NONE, Claim, treat
from deaddir_fast.optim.plan import make
from deaddir_fast.optim.state import restored
from deaddir_fast.optim.stepper import Stepper


class DDCAdam(Optimizer):
    """Adam on the quotient of parameter space by a model's symmetries.

    From gauge equivalent starts, theta and h theta, the trajectories stay gauge equivalent for
    every symmetry in ``claims`` that is claimed; AdamW's drift apart. Moments are taken of
    quantities that no positive scale changes, so the state needs no transport along these
    (rotations and changes of sign turn first moments along with the weights). Parameters in no
    gauge get AdamW's step with the same betas, eps, bias correction and decoupled decay.

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
            after the first one, on the same gradient tensors (``zero_grad(set_to_none=False)``).
            A rate that replays are to follow has to be a tensor on the device.
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
        _check.choice("likelihood", likelihood, ("categorical", "gaussian"))
        if isinstance(gauges, str):
            _check.choice("gauges", gauges, ("auto", "layerwise"))
        else:
            given = list(gauges) if isinstance(gauges, Iterable) else [gauges]
            for gauge in given:
                if not isinstance(gauge, Gauge):
                    raise _check.fail("gauges", gauge, "'auto', 'layerwise' or Gauges", TypeError)
            gauges = given
        self._known: dict[str, Tensor] = {}
        self.gauges: tuple[Gauge, ...] = ()
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
                try:
                    gauges = find(model, inputs)
                except ValueError as error:
                    raise ValueError(
                        f"{error}; give DDCAdam inputs=, a batch the model accepts, or gauges=: "
                        "a list from deaddir_fast.gauge.find, or [] for AdamW"
                    ) from error
            else:
                warnings.warn(
                    "DDCAdam was given parameters and no model, so no symmetry is known and its "
                    "step is AdamW's; pass the model, or gauges=deaddir_fast.gauge.find(model)",
                    UserWarning,
                    stacklevel=2,
                )
                gauges = []
        self.gauges = tuple(g for g in gauges if g.likelihood in (None, likelihood))
        self._ready()

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What is promised for each gauge, and how."""
        return self._ready().plan.claims

    def describe(self) -> str:
        """A table of the gauges and how each is treated, and how many parameters have none."""
        plan = self._ready().plan
        rows = [("gauge", "group", "treatment", "note")]
        rows += [(c.gauge.name, c.gauge.group, c.treatment, c.note) for c in plan.claims]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        inside = {p for c in plan.claims if c.treatment != NONE for p in c.gauge.parameters}
        free = [name for name in plan.entries if name not in inside]
        count = len(plan.entries)
        lines.append(f"{len(free)} of {count} parameters are in no claimed gauge: AdamW's step")
        return "\n".join(line.rstrip() for line in lines)

    def _ready(self) -> Stepper:
        """The laid-out step.

        Made anew where param groups were added, the optimizer was copied, or a parameter was
        moved to another device or dtype, frozen or thawed.
        """
        if self._stepper is None or not self._stepper.fits():
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
                if id(p) not in names:
                    # A name that the model, or another group, has given to another parameter
                    # says nothing about this one.
                    names[id(p)] = f"#{count}" if name is None or name in self._known else name
                    self._known[names[id(p)]] = p
                count += 1
        return names

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that belong to no gauge of the optimizer get AdamW's step.

        Raises:
            TypeError, ValueError: as the constructor; ``foreach`` or ``fused`` other than those
                of the groups before, which would have to be stepped in two ways at once.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.param_groups[0])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._stepper = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stepper": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of AdamW lacks options of ours
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._stepper = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; moments keep their own dtype, whatever that of the parameters.

        Load the parameters of that moment as well: the moments belong to them, or to any point
        that positive scales of claimed gauges move them to. A state of ``torch.optim.AdamW`` fits
        where no gauge is general linear; its moments are then taken as they are. Constants of a
        frame that are not in the state are made anew at the next step.

        Raises:
            ValueError: the state of other parameters or of other gauges.
        """
        before = self.state, self.param_groups
        given: list[dict[str, Any]] = []

        def see(_: Optimizer, changed: dict[str, Any]) -> None:
            given.append(changed)

        def restore(_: Optimizer) -> None:
            self._restore(given[0])

        # After the user's hooks that change the dictionary, before those that see the result.
        first = self.register_load_state_dict_pre_hook(see)
        then = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        except ValueError:
            self.state, self.param_groups = before
            raise
        finally:
            first.remove()
            then.remove()
            self._stepper = None

    def _restore(self, state_dict: dict[str, Any]) -> None:
        forms = self._ready().plan.forms
        names = self._named()
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (p, group) in zip(numbers, owners, strict=True):
            saved = state_dict["state"].get(number, {})
            self.state[p] = restored(
                names[id(p)], p, saved, forms[names[id(p)]], capturable=group["capturable"]
            )
            if not self.state[p]:
                del self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss, or None.

        Parameters without a gradient stay as they are; within a pair or a chain a missing gradient
        counts as zero once another one is there. Under ``torch.compile`` the step runs outside of
        graphs, with the same kernels.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            for group in self.param_groups:
                if not group["capturable"]:
                    raise _check.fail(
                        "capturable", False, "True where a step is captured in a graph"
                    )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _outside_graphs(self._take)
        return loss

    def _take(self) -> None:
        stepper = self._ready()
        with self._route():
            stepper.take(self.param_groups, self.state)

    def _route(self) -> Any:
        group = self.param_groups[0]
        if group["fused"] is False or group["foreach"]:
            return backend("reference")
        if group["fused"]:
            devices = {p.device.type for g in self.param_groups for p in g["params"]}
            route = "cpu" if devices == {"cpu"} else "triton"
            problem = unavailable(route)
            if problem is not None:
                raise RuntimeError(f"fused: compiled kernels are demanded, but {problem}")
            return backend(route)
        return nullcontext()


@torch._disable_dynamo
def _outside_graphs(take: Callable[[], None]) -> None:
    """Run what torch.compile would break into pieces: it asks for addresses and reuses memory.

    ``torch.compiler.disable`` would import the compiler together with this module.
    """
    take()


def _check_group(group: dict[str, Any], first: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_complex()):
        raise _check.fail("lr", lr, "a number or a real tensor of one element")
    if not isinstance(lr, Tensor):
        _check.positive("lr", lr, allow_zero=True)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise _check.fail("betas", betas, "two numbers in [0, 1)")
    for n, beta in enumerate(betas):
        if not 0 <= _check.real(f"betas[{n}]", beta) < 1:
            raise _check.fail(f"betas[{n}]", beta, "a number in [0, 1)")
    _check.positive("eps", group["eps"], allow_zero=True)
    _check.positive("weight_decay", group["weight_decay"], allow_zero=True)
    _check.integer("seed", group["seed"], 0)
    if group["foreach"] and group["fused"]:
        raise ValueError("fused: expected False or None where foreach is True, got True")
    for key in ("foreach", "fused"):
        if group[key] != first[key]:
            raise _check.fail(key, group[key], f"{first[key]}, as in the first param group")
    for p in group["params"]:
        if p.is_complex() or p.layout != torch.strided:
            kind = "complex" if p.is_complex() else str(p.layout)
            raise ValueError(f"params: expected real dense parameters, got a {kind} one")

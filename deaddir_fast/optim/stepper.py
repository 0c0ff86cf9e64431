"""The step itself: scales and factors first, then one launch per kind of matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets.sharded import spread
from deaddir_fast.ops._adam import hyper as hyper_parameters
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.scaled_adam import scaled_adam
from deaddir_fast.optim import blocks as blocked
from deaddir_fast.optim.balance import constants
from deaddir_fast.optim.blocks import Blocks
from deaddir_fast.optim.layout import Layout
from deaddir_fast.optim.plan import FramePart, Plan
from deaddir_fast.optim.split import split_shared_adam
from deaddir_fast.optim.state import Matrices, addresses, matrices, new_state

Factor = tuple[Tensor | None, Tensor | None]


@dataclass
class _Call:
    """One launch: matrices that share their hyper-parameters."""

    hyper: Tensor
    maximize: bool
    seed: int
    lists: tuple[list[Any], ...] = field(default_factory=lambda: tuple([] for _ in range(8)))

    def add(self, *values: Any) -> None:
        for into, value in zip(self.lists, values, strict=True):
            into.append(value)


class Stepper:
    """Takes the steps of a plan.

    Args:
        plan: what to do with each parameter.
        parameters: name to parameter, those outside the optimizer included.
        owners: number of the param group of every stepped parameter.
    """

    def __init__(
        self, plan: Plan, parameters: Mapping[str, Tensor], owners: Mapping[str, int]
    ) -> None:
        self.plan = plan
        self._parameters = parameters
        self._owners = owners
        self._number = {name: n for n, name in enumerate(owners)}
        self._kinds = self._kinds_now()
        self._factor: dict[tuple[str, int | None, int], Tensor] = {}
        self._counts: dict[str, int] = {}
        self._held: dict[str, Matrices] = {}
        self._where: dict[int, list[Tensor]] = {}

    def take(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """One step of all parameters that have a gradient."""
        active = self._active()
        if not active:
            return
        for name in active:
            p = self._parameters[name]
            if "step" not in state[p]:  # it may hold the constants of a frame already
                capturable = groups[self._owners[name]]["capturable"]
                state[p].update(new_state(p, self.plan.forms[name], capturable=capturable))
        self._count(active, state)
        held = {name: self._matrices(name, state) for name in active}
        factors = self._factors(held, state)
        hypers = _Hypers(groups, self._owners, self._counts, state, self._parameters)
        calls: dict[Any, _Call] = {}
        for name in active:
            if name not in self.plan.in_blocks:
                self._collect(name, held[name], factors, hypers, calls)
        for (_, _, _, grouped, _), each in calls.items():
            ws, gs, ms, vs, rows, cols, row_groups, col_groups = each.lists
            # Past the checks of the public functions: these lists were made to fit.
            last = (each.hyper, each.maximize, each.seed)
            if grouped:
                call("shared_adam_", ws, gs, ms, vs, rows, cols, row_groups, col_groups, *last)
            else:
                call("scaled_adam_", ws, gs, ms, vs, rows, cols, *last)
        for number, block in enumerate(self.plan.blocks):
            if block.anchor in held:
                self._take_block(number, block, held, groups, hypers, state)
        for name, there in held.items():
            if not there.views:
                p = self._parameters[name]
                there.write(p, state[p], self.plan.entries[name])

    def _kinds_now(self) -> list[Any]:
        stepped = (self._parameters[name] for name in self._owners)
        return [(p.device, p.dtype, p.requires_grad) for p in stepped]

    def fits(self) -> bool:
        """Whether device, dtype and trainability of the parameters are those laid out for."""
        return self._kinds == self._kinds_now()

    def _active(self) -> list[str]:
        """Parameters to step: those with a gradient, and all of a block that has one."""
        active: dict[str, None] = {}
        for name in self._owners:
            gradient = self._parameters[name].grad
            if gradient is not None:
                if gradient.layout != torch.strided:
                    raise RuntimeError(
                        f"DDCAdam: expected dense gradients, got a {gradient.layout} one for "
                        f"{name!r}; use sparse=False, or torch.optim.SparseAdam"
                    )
                active[name] = None
        for block in self.plan.blocks:
            if any(name in active for name in block.names):
                active.update(dict.fromkeys(block.names))
        return list(active)

    def _count(self, active: Sequence[str], state: dict[Tensor, dict[str, Any]]) -> None:
        steps = []
        for name in active:
            step = state[self._parameters[name]]["step"]
            if name not in self._counts:
                self._counts[name] = int(step)
            self._counts[name] += 1
            steps.append(step)
        torch._foreach_add_(steps, 1)

    def _matrices(self, name: str, state: dict[Tensor, dict[str, Any]]) -> Matrices:
        p = self._parameters[name]
        known = self._held.get(name)
        if known is None or not known.views or known.key != addresses(p, state[p]):
            known = self._held[name] = matrices(p, state[p], self.plan.entries[name])
        return known

    def _factors(
        self, held: Mapping[str, Matrices], state: dict[Tensor, dict[str, Any]]
    ) -> dict[tuple[str, int | None], Factor]:
        """Factors along rows and columns of every framed matrix, at the present parameters.

        They stay in the same memory from step to step, which a captured graph relies on.
        """
        found: dict[tuple[str, int | None], Factor] = {}
        into: dict[Any, list[Tensor]] = {}
        new: dict[Any, list[Tensor]] = {}
        for part in self.plan.parts:
            if not any(name in held for name in part.names):
                continue
            here: dict[str, list[Tensor]] = {n: there.ws for n, there in held.items()}
            values = []
            for layout in part.layouts:
                if layout.name not in here:
                    p = self._parameters[layout.name]
                    own = [lay for lay in part.layouts if lay.name == layout.name]
                    here[layout.name] = [lay.matrix(p) for lay in own]
                values.append(here[layout.name][layout.place])
            scales = part.frame.scales(values) * self._constants(part, values, state)
            for n, row, col in part.frame.factors(scales):
                layout = part.layouts[n]
                where = (layout.name, layout.index)
                dtype = accumulation(self._parameters[layout.name])
                kept = []
                for side, factor in enumerate((row, col)):
                    if factor is not None:
                        known = self._factor.get((*where, side))
                        if known is None:
                            known = self._factor[*where, side] = factor.to(dtype, copy=True)
                        into.setdefault((factor.device, dtype), []).append(known)
                        new.setdefault((factor.device, dtype), []).append(factor)
                    kept.append(None if factor is None else known)
                found[where] = (kept[0], kept[1])
        for key, factors in new.items():
            torch._foreach_copy_(into[key], factors)
        return found

    def _constants(
        self, part: FramePart, values: list[Tensor], state: dict[Tensor, dict[str, Any]]
    ) -> Tensor:
        """(units + 1,): the constant of every unit's gauge, made at the first step.

        They are kept in the state of the first parameter of the frame that the optimizer steps.
        """
        anchor = next(name for name in part.names if name in self._owners)
        kept = state[self._parameters[anchor]]
        frame = part.frame
        if kept.get("frame_constants") is None or kept["frame_constants"].numel() != len(
            frame.order
        ):
            kept["frame_constants"] = constants(
                frame,
                values,
                part.layouts,
                self._parameters,
                self.plan.shifted,
                self.plan.still,
            ).to(frame.device)
        per_unit = kept["frame_constants"][frame.gauge_of]
        return torch.cat([per_unit, per_unit.new_ones(1)]).to(frame.dtype)

    def _collect(
        self,
        name: str,
        held: Matrices,
        factors: Mapping[tuple[str, int | None], Factor],
        hypers: _Hypers,
        calls: dict[Any, _Call],
    ) -> None:
        """Put the matrices of a parameter on the list of the launch they belong to."""
        p = self._parameters[name]
        decay = name not in self.plan.undecayed
        for n, entry in enumerate(self.plan.entries[name]):
            w, m, v = held.ws[n], held.ms[n], held.vs[n]
            row, col = factors.get((name, entry.layout.index), (None, None))
            if entry.still is not None:
                col = entry.still if col is None else col.mul_(entry.still)
            g = _gradient(p, entry.layout)
            hyper, where = hypers.of(name, decay=decay)
            seed = hypers.seed(name, self._number[name])
            if entry.split:
                split_shared_adam(
                    w,
                    g,
                    m,
                    v,
                    row,
                    col,
                    entry.row_groups,
                    entry.col_groups,
                    hyper,
                    entry.split,
                    maximize=hypers.maximize(name),
                    seed=seed,
                )
                continue
            # Random bits go by the place in a list: processes that hold the same shard need the
            # same list, whatever else they hold.
            key = (where, p.device, p.dtype, entry.groups is not None, _spread_over(p))
            each = calls.get(key)
            if each is None:
                each = calls[key] = _Call(hyper, hypers.maximize(name), seed)
            each.add(w, g, m, v, row, col, entry.row_groups, entry.col_groups)

    def _take_block(
        self,
        number: int,
        block: Blocks,
        held: Mapping[str, Matrices],
        groups: list[dict[str, Any]],
        hypers: _Hypers,
        state: dict[Tensor, dict[str, Any]],
    ) -> None:
        anchor = self._parameters[block.anchor]
        kept = state[anchor]
        dtype = accumulation(anchor)
        vertical = groups[self._owners[block.anchor]]["vertical"]
        shapes: dict[str, tuple[int, ...]] = {"radial": (block.units,)}
        if vertical:
            shapes["vertical"] = (block.units, block.length - 1)
        for key, shape in shapes.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                kept.setdefault(
                    f"{key}_{moment}", torch.zeros(shape, dtype=dtype, device=anchor.device)
                )
        if number not in self._where:
            self._where[number] = [b.to(anchor.device) for b in block.blocks]
        names = [layout.name for layout in block.layouts]
        hyper, _ = hypers.of(block.anchor, decay=True)
        seed = hypers.seed(block.anchor, self._number[block.anchor])
        maximize = hypers.maximize(block.anchor)
        reach = blocked.step(
            block,
            self._where[number],
            [held[n].ws[0] for n in names],
            [
                _gradient(self._parameters[n], lay)
                for n, lay in zip(names, block.layouts, strict=True)
            ],
            [held[n].ms[0] for n in names],
            [held[n].vs[0] for n in names],
            (kept["radial_exp_avg"], kept["radial_exp_avg_sq"]),
            (kept["vertical_exp_avg"], kept["vertical_exp_avg_sq"]) if vertical else None,
            hyper,
            maximize=maximize,
            seed=seed,
        )
        if block.biases:
            later = [n for n, _ in block.biases]
            scale = reach.where(reach > 0, 1).cumprod(0)
            entries = [self.plan.entries[n][0] for n in later]
            scaled_adam(
                [held[n].ws[0] for n in later],
                [
                    _gradient(self._parameters[n], e.layout)
                    for n, e in zip(later, entries, strict=True)
                ],
                [held[n].ms[0] for n in later],
                [held[n].vs[0] for n in later],
                [scale[length - 1].reshape(1) for _, length in block.biases],
                [None] * len(later),
                hyper,
                maximize=maximize,
                seed=hypers.seed(later[0], self._number[later[0]]),
            )


def _spread_over(p: Tensor) -> Any:
    given: Any = p
    return (given.device_mesh, given.placements) if spread(p) else None


def _gradient(p: Tensor, layout: Layout) -> Tensor:
    """The gradient as a matrix; zero where there is none."""
    g: Any = p.grad
    if g is None:
        return torch.zeros(layout.rows, layout.cols, dtype=p.dtype, device=p.device)
    if spread(p) and spread(g) and g.placements != p.placements:  # type: ignore[attr-defined]
        g = g.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return layout.matrix(g if g.dtype == p.dtype else g.to(p.dtype))


class _Hypers:
    """Hyper-parameters of each parameter, made once per group and step count."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        owners: Mapping[str, int],
        counts: Mapping[str, int],
        state: dict[Tensor, dict[str, Any]],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._groups = groups
        self._owners = owners
        self._counts = counts
        self._state = state
        self._parameters = parameters
        self._made: dict[Any, Tensor] = {}

    def of(self, name: str, *, decay: bool) -> tuple[Tensor, Any]:
        """The hyper-parameter tensor, and what tells it apart from others."""
        number = self._owners[name]
        group = self._groups[number]
        p = self._parameters[name]
        key = (number, self._counts[name], decay, p.device)
        if key not in self._made:
            step = self._state[p]["step"] if group["capturable"] else self._counts[name]
            self._made[key] = hyper_parameters(
                step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"] if decay else 0.0,
                device=p.device,
            )
        return self._made[key], key

    def maximize(self, name: str) -> bool:
        """Whether the parameter steps up its gradient."""
        return bool(self._groups[self._owners[name]]["maximize"])

    def seed(self, name: str, first: int) -> int:
        """Seed of stochastic rounding for a launch by its first parameter, -1 without."""
        group = self._groups[self._owners[name]]
        if not group["stochastic_rounding"]:
            return -1
        return int((group["seed"] * 1_000_003 + first * 7919) & 0x7FFFFFFF)

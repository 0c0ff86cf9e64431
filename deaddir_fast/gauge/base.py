"""What a gauge is: a group acting on the parameters that leaves the model's law unchanged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Gauge(ABC):
    """A symmetry group of a model's parameters: a Lie group, or a finite one of dimension 0.

    Along the orbit curves ``act(state, exp(t X))`` the model's law does not change, so their
    tangents are exactly Fisher-null and their KL order is infinite ("Dead Directions", arXiv
    2606.05957: gauge directions are classified apart from singular ones).

    Attributes:
        name: kind of the symmetry and the modules it ties together.
        group: the group, e.g. ``"(R_>0)^8"``, ``"GL(4)"``, ``"R^3"``, ``"S_8"``.
        parameters: names of the parameters it moves, in model order.
        shape: shape of an element, a plain tensor.
        likelihood: None where outputs stay exactly as they are; ``"categorical"`` where they move
            by a constant over classes, which only a softmax over the last dimension cannot see.
    """

    name: str
    group: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    likelihood: str | None

    @property
    def dimension(self) -> int:
        """Dimension of the group (its orbits may be smaller: see ``orthonormal_tangents``)."""
        return math.prod(self.shape)

    @property
    def algebra_shape(self) -> tuple[int, ...]:
        """Shape of an algebra element, a plain tensor: that of an element, (0,) if finite."""
        return self.shape

    @abstractmethod
    def identity(self) -> Tensor:
        """The neutral element, fp64."""

    @abstractmethod
    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """A well-conditioned element of order one, fp64."""

    @abstractmethod
    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """The element that acts as ``first`` and then ``second``."""

    @abstractmethod
    def exp(self, algebra: Tensor) -> Tensor:
        """The element at the end of the one-parameter subgroup of ``algebra``."""

    @abstractmethod
    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        """New values of the parameters moved by ``element``."""

    @abstractmethod
    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        """Derivative of ``_act(state, exp(t algebra))`` at t = 0, linear in ``algebra``."""

    def _check_element(self, element: Tensor) -> Tensor:
        return self._check_shape("element", element)

    def _check_shape(self, argument: str, value: Tensor) -> Tensor:
        _check.tensor(argument, value)
        if tuple(value.shape) != self.shape:
            raise _check.fail(argument, value, f"shape {self.shape} for {self.name!r}")
        return value

    def _check_algebra(self, algebra: Tensor) -> Tensor:
        _check.tensor("algebra", algebra)
        if tuple(algebra.shape) != self.algebra_shape:
            raise _check.fail("algebra", algebra, f"shape {self.algebra_shape} for {self.name!r}")
        return algebra

    def _check_state(self, state: State) -> State:
        for name in self.parameters:
            if name not in state:
                raise ValueError(f"state: no parameter called {name!r}, needed by {self.name!r}")
        return state

    def act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        """Move a state along its orbit.

        Args:
            state: parameter name to tensor; entries the gauge does not move pass through.
            element: a group element of ``shape``.

        Returns:
            A new dict; ``act(act(s, e1), e2)`` is ``act(s, compose(e1, e2))``.

        Raises:
            ValueError: a parameter is missing from ``state``, or ``element`` is not in the group.
        """
        self._check_state(state)
        return {**state, **self._act(state, self._check_element(element))}

    def curve(self, state: State, algebra: Tensor, t: float | Tensor) -> dict[str, Tensor]:
        """The orbit curve ``act(state, exp(t algebra))``: exactly flat for the likelihood."""
        return self.act(state, self.exp(self._check_algebra(algebra) * t))

    def velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        """Velocity at ``state`` of the orbit curve of ``algebra``; only moved parameters."""
        self._check_state(state)
        return self._velocity(state, self._check_algebra(algebra))

    def tangents(self, state: State) -> dict[str, Tensor]:
        """Orbit tangents at ``state``.

        Returns:
            {name: (dimension, *shape)} for the parameters the gauge moves: velocities along the
            unit vectors of the algebra. Dense: ``dimension`` copies of those parameters.
        """
        self._check_state(state)
        basis = torch.eye(self.dimension, dtype=torch.float64).reshape(-1, *self.shape)
        return torch.vmap(lambda x: self._velocity(state, x))(basis)


def spread(values: Tensor, slot_of: Tensor, rest: float) -> Tensor:
    """``values[slot_of]``, with ``rest`` where ``slot_of`` points past the end."""
    padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), rest)], -1)
    return padded[..., slot_of.to(values.device)]


def along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """View a vector so that it broadcasts along one axis of an ``ndim``-dimensional tensor."""
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])

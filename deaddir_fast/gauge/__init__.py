"""Symmetry groups of a model's parameters: discovery, action, orbit tangents, quotient."""

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.discover import find
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.quotient import orthonormal_tangents, project_out
from deaddir_fast.gauge.rescaling import Rescaling
from deaddir_fast.gauge.shift import ClassShift, Translation

__all__ = [
    "ClassShift",
    "Gauge",
    "GeneralLinear",
    "Permutation",
    "Rescaling",
    "Translation",
    "find",
    "orthonormal_tangents",
    "project_out",
]

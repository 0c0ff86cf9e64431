"""Symmetry groups of a model's parameters: discovery, action, orbit tangents, quotient."""

from deaddir_fast.gauge.balance import conserved
from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.counts import QuotientDimension, quotient_dimension
from deaddir_fast.gauge.discover import find
from deaddir_fast.gauge.drift import Drift, plot_drift
from deaddir_fast.gauge.frame import Frame, frame
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.quotient import orthonormal_tangents, project_out
from deaddir_fast.gauge.rescaling import Rescaling
from deaddir_fast.gauge.shift import ClassShift, Translation

__all__ = [
    "ClassShift",
    "ComplexRescaling",
    "Drift",
    "Frame",
    "Gauge",
    "GeneralLinear",
    "Permutation",
    "QuotientDimension",
    "Rescaling",
    "Translation",
    "conserved",
    "find",
    "frame",
    "orthonormal_tangents",
    "plot_drift",
    "project_out",
    "quotient_dimension",
]

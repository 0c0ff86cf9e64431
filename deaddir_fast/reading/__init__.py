"""Readings of a network at its own parameters: dead directions and Watanabe's triple."""

from deaddir_fast.reading.dead import DeadCounts, DeadDirections, dead_directions
from deaddir_fast.reading.freeze import FreezeProbe, FrozenLayer, freeze_probe
from deaddir_fast.reading.leading import leading_scores
from deaddir_fast.reading.prior import PriorExponents, prior_exponents
from deaddir_fast.reading.schur import SchurCurvature, schur_curvature
from deaddir_fast.reading.sectional import curvature_ray, sectional_curvature
from deaddir_fast.reading.triple import Triple, read_triple
from deaddir_fast.reading.weighted import WeightedBound, weighted_bound

__all__ = [
    "DeadCounts",
    "DeadDirections",
    "FreezeProbe",
    "FrozenLayer",
    "PriorExponents",
    "SchurCurvature",
    "Triple",
    "WeightedBound",
    "curvature_ray",
    "dead_directions",
    "freeze_probe",
    "leading_scores",
    "prior_exponents",
    "read_triple",
    "schur_curvature",
    "sectional_curvature",
    "weighted_bound",
]

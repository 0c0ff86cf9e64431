"""Readings of a network at its own parameters: dead directions and Watanabe's triple."""

from deaddir_fast.reading.dead import DeadDirections, dead_directions
from deaddir_fast.reading.prior import PriorExponents, prior_exponents
from deaddir_fast.reading.schur import SchurCurvature, schur_curvature
from deaddir_fast.reading.triple import Triple, read_triple

__all__ = [
    "DeadDirections",
    "PriorExponents",
    "SchurCurvature",
    "Triple",
    "dead_directions",
    "prior_exponents",
    "read_triple",
    "schur_curvature",
]

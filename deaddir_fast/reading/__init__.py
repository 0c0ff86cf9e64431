"""Readings of a network at its own parameters: dead directions and Watanabe's triple."""

from deaddir_fast.reading.dead import DeadDirections, dead_directions
from deaddir_fast.reading.triple import Triple, read_triple
from deaddir_fast.reading.weighted import WeightedBound, weighted_bound

__all__ = [
    "DeadDirections",
    "Triple",
    "WeightedBound",
    "dead_directions",
    "read_triple",
    "weighted_bound",
]

"""Exact values of singular learning theory: thresholds, fluctuations and volume laws."""

from deaddir_fast.theory.arrangement import arrangement
from deaddir_fast.theory.deep_linear import deep_linear
from deaddir_fast.theory.fluctuation import fluctuation_limits, singular_fluctuation
from deaddir_fast.theory.log_threshold import LogThreshold
from deaddir_fast.theory.monomial import monomial_ideal, newton_weights
from deaddir_fast.theory.normal_crossing import additive, normal_crossing
from deaddir_fast.theory.odd_two_layer import odd_two_layer
from deaddir_fast.theory.perfect_sampler import perfect_sampler
from deaddir_fast.theory.quartet import Quartet, quartet
from deaddir_fast.theory.reduced_rank import reduced_rank_local, reduced_rank_regression
from deaddir_fast.theory.sampled_estimate import sampled_estimate
from deaddir_fast.theory.volume import VolumeLaw, volume_law

__all__ = [
    "LogThreshold",
    "Quartet",
    "VolumeLaw",
    "additive",
    "arrangement",
    "deep_linear",
    "fluctuation_limits",
    "monomial_ideal",
    "newton_weights",
    "normal_crossing",
    "odd_two_layer",
    "perfect_sampler",
    "quartet",
    "reduced_rank_local",
    "reduced_rank_regression",
    "sampled_estimate",
    "singular_fluctuation",
    "volume_law",
]

"""Exact values of singular learning theory: thresholds, fluctuations, volume laws, rates."""

from deaddir_fast.rates import primitives
from deaddir_fast.rates.predict import BlockRate, LayerRate, Rates, predict
from deaddir_fast.theory.arrangement import arrangement
from deaddir_fast.theory.curvature_ray import CurvatureRate, CurvatureRay
from deaddir_fast.theory.curvature_volume import curvature_volume
from deaddir_fast.theory.deep_linear import deep_linear
from deaddir_fast.theory.fluctuation import fluctuation_limits, singular_fluctuation
from deaddir_fast.theory.gauss import SectionalCurvature
from deaddir_fast.theory.leading import LeadingScores, leading_scores
from deaddir_fast.theory.log_threshold import LogThreshold
from deaddir_fast.theory.monomial import monomial_ideal, newton_weights
from deaddir_fast.theory.normal_crossing import additive, normal_crossing
from deaddir_fast.theory.odd_two_layer import odd_two_layer
from deaddir_fast.theory.perfect_sampler import perfect_sampler
from deaddir_fast.theory.quartet import Quartet, quartet
from deaddir_fast.theory.reduced_rank import reduced_rank_local, reduced_rank_regression
from deaddir_fast.theory.sampled_estimate import sampled_estimate
from deaddir_fast.theory.sectional import curvature_ray, sectional_curvature
from deaddir_fast.theory.volume import VolumeLaw, volume_law

__all__ = [
    "BlockRate",
    "CurvatureRate",
    "CurvatureRay",
    "LayerRate",
    "LeadingScores",
    "LogThreshold",
    "Quartet",
    "Rates",
    "SectionalCurvature",
    "VolumeLaw",
    "additive",
    "arrangement",
    "curvature_ray",
    "curvature_volume",
    "deep_linear",
    "fluctuation_limits",
    "leading_scores",
    "monomial_ideal",
    "newton_weights",
    "normal_crossing",
    "odd_two_layer",
    "perfect_sampler",
    "predict",
    "primitives",
    "quartet",
    "reduced_rank_local",
    "reduced_rank_regression",
    "sampled_estimate",
    "sectional_curvature",
    "singular_fluctuation",
    "volume_law",
]

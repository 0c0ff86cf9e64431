"""Dead directions of neural networks and Watanabe's (λ, m, ν), from forward and backward passes."""

from deaddir_fast import gauge, ops, optim, theory
from deaddir_fast._backend import backend
from deaddir_fast.fisher.factors import KronFactors, LayerFactors
from deaddir_fast.fisher.kron import kron_factors
from deaddir_fast.fisher.point import PointCurvature, point_curvature
from deaddir_fast.fisher.probe import LayerCurvature, layer_curvature
from deaddir_fast.nets.likelihood import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
)
from deaddir_fast.nets.orders import RayOrders, ray_orders
from deaddir_fast.nets.rays import RayCurvature, ray_curvature
from deaddir_fast.nets.weights import RankOne
from deaddir_fast.reading import (
    DeadDirections,
    FreezeProbe,
    PriorExponents,
    SchurCurvature,
    Triple,
    WeightedBound,
    curvature_ray,
    dead_directions,
    freeze_probe,
    leading_scores,
    prior_exponents,
    read_triple,
    schur_curvature,
    sectional_curvature,
    weighted_bound,
)
from deaddir_fast.scan.run import scan
from deaddir_fast.scan.scan_report import ScanReport
from deaddir_fast.theory.rate import RateFit, fit_rate

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "DeadDirections",
    "FreezeProbe",
    "Gaussian",
    "KronFactors",
    "LayerCurvature",
    "LayerFactors",
    "Likelihood",
    "PointCurvature",
    "Poisson",
    "PriorExponents",
    "RankOne",
    "RateFit",
    "RayCurvature",
    "RayOrders",
    "ScanReport",
    "SchurCurvature",
    "Triple",
    "WeightedBound",
    "backend",
    "curvature_ray",
    "dead_directions",
    "fit_rate",
    "freeze_probe",
    "gauge",
    "kron_factors",
    "layer_curvature",
    "leading_scores",
    "ops",
    "optim",
    "point_curvature",
    "prior_exponents",
    "ray_curvature",
    "ray_orders",
    "read_triple",
    "scan",
    "schur_curvature",
    "sectional_curvature",
    "theory",
    "weighted_bound",
]

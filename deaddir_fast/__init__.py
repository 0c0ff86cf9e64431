"""Dead directions of neural networks and Watanabe's (λ, m, ν), from forward and backward passes."""

from deaddir_fast import gauge, ops, theory
from deaddir_fast._backend import backend
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
    Triple,
    WeightedBound,
    dead_directions,
    read_triple,
    weighted_bound,
)
from deaddir_fast.theory.rate import RateFit, fit_rate

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "DeadDirections",
    "Gaussian",
    "Likelihood",
    "Poisson",
    "RankOne",
    "RateFit",
    "RayCurvature",
    "RayOrders",
    "Triple",
    "WeightedBound",
    "backend",
    "dead_directions",
    "fit_rate",
    "gauge",
    "ops",
    "ray_curvature",
    "ray_orders",
    "read_triple",
    "theory",
    "weighted_bound",
]

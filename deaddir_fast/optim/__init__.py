"""Optimizers that respect the symmetries of a model."""

from deaddir_fast.optim.claims import Claim
from deaddir_fast.optim.ddcadam import DDCAdam

__all__ = ["Claim", "DDCAdam"]

"""Maps of a likelihood's outputs into flat space that pull the Fisher metric back.

For outputs z there is φ(z) with |dφ|² = dzᵀ H(z) dz, H the Fisher of the likelihood: means over √
variance; 2√p for classes (a sphere of radius 2 for each sample, Amari 2016, *Information Geometry
and Its Applications*, section 2); 2√rate for counts; an angle, 2 arctan e^(z/2), for each binary
output. φ is applied to every sample and token; over √n, all of them together embed the model, and
its sectional curvature is that of the image (the spheres' own curvature included, as their second
fundamental form is part of the image's).
"""

from __future__ import annotations

from deaddir_fast import _check
from deaddir_fast.nets import series
from deaddir_fast.nets.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from deaddir_fast.nets.series import Series


def embed(likelihood: Likelihood, z: Series) -> Series:
    """φ(z), coefficient by coefficient; shapes are kept.

    Raises:
        TypeError: for a likelihood without a known embedding.
    """
    if isinstance(likelihood, Categorical):
        half = series.log_softmax(z, -1).map(lambda x: x / 2)
        return series.exp(half).map(lambda x: 2 * x)
    if isinstance(likelihood, Gaussian):
        return z.map(lambda x: likelihood.whiten(z.base, x))
    if isinstance(likelihood, Poisson):
        return series.exp(z.map(lambda x: x / 2)).map(lambda x: 2 * x)
    if isinstance(likelihood, Bernoulli):
        half = z.map(lambda x: x / 2)
        _, cosh = series.sinh_cosh(half)
        # dφ/dz = √(p(1-p)) = 1 / (2 cosh(z/2)).
        return series.primitive(half, 2 * half.base.exp().atan(), series.reciprocal(cosh))
    raise _check.fail(
        "likelihood", likelihood, "categorical, gaussian, bernoulli or poisson", TypeError
    )

"""CDFs and survival functions on half lines, with full relative precision in both tails.

Far in the upper tail a CDF rounds to 1. In single precision, the largest number below 1 is the
normal CDF at 5.2. In this tail the survival function 1 - CDF is small, so that it keeps full
relative precision.

Public names: `Tails`, `tails_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import ndtr, ndtri
from numpyro.distributions.truncated import LeftTruncatedDistribution


class Tails(NamedTuple):
    """CDF and survival function (`sf`), with their inverses `icdf` and `isf`."""

    cdf: Callable[[Array], Array]
    icdf: Callable[[Array], Array]
    sf: Callable[[Array], Array]
    isf: Callable[[Array], Array]


def tails_of(base: dist.Distribution) -> Tails | None:
    """Return the `Tails` of an elementwise distribution; None if they are not implemented.

    Example:
        >>> import numpyro.distributions as dist
        >>> print(f"{float(tails_of(dist.Exponential(2.0)).sf(20.0)):.2e}")
        4.25e-18
    """
    kind = type(base)
    if kind is dist.Exponential:
        return _exponential(base)
    if kind is dist.HalfNormal:
        return _half_normal(base)
    if kind is dist.HalfCauchy:
        return _half_cauchy(base)
    if kind is LeftTruncatedDistribution and type(base.base_dist) is dist.Normal:
        return _truncated_below(base)
    return None


def _exponential(base: dist.Exponential) -> Tails:
    return Tails(
        cdf=lambda t: -jnp.expm1(-base.rate * t),
        icdf=lambda u: -jnp.log1p(-u) / base.rate,
        sf=lambda t: jnp.exp(-base.rate * t),
        isf=lambda u: -jnp.log(u) / base.rate,
    )


def _half_normal(base: dist.HalfNormal) -> Tails:
    return Tails(
        cdf=base.cdf,
        icdf=base.icdf,
        sf=lambda t: 2.0 * ndtr(-t / base.scale),
        isf=lambda u: -base.scale * ndtri(0.5 * u),
    )


def _half_cauchy(base: dist.HalfCauchy) -> Tails:
    return Tails(
        cdf=lambda t: jnp.arctan2(t, base.scale) / (0.5 * math.pi),
        icdf=lambda u: base.scale * jnp.tan(0.5 * math.pi * u),
        sf=lambda t: jnp.arctan2(base.scale, t) / (0.5 * math.pi),
        isf=lambda u: base.scale / jnp.tan(0.5 * math.pi * u),
    )


def _truncated_below(base: LeftTruncatedDistribution) -> Tails:
    loc, scale = base.base_dist.loc, base.base_dist.scale
    low = (base.low - loc) / scale
    mass = ndtr(-low)

    def cdf(t: Array) -> Array:
        z = (t - loc) / scale
        # subtract the smaller probabilities, which lose less precision
        return jnp.where(low > 0, mass - ndtr(-z), ndtr(z) - ndtr(low)) / mass

    def icdf(u: Array) -> Array:
        z = jnp.where(low > 0, -ndtri(mass * (1.0 - u)), ndtri(ndtr(low) + u * mass))
        return loc + scale * z

    return Tails(
        cdf=cdf,
        icdf=icdf,
        sf=lambda t: ndtr((loc - t) / scale) / mass,
        isf=lambda u: loc - scale * ndtri(u * mass),
    )

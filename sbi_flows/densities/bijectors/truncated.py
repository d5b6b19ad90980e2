"""Gaussian autoregression truncated to a box: an exact map from noise in R^d into the box.

Given entries 0 to i - 1, entry i of the data is normal, truncated to an interval. Its mean is a
linear function of entries 0 to i - 1. Far from the faces of the box the map is affine. Data that
follow a normal distribution truncated by a face are mapped to exactly normal noise. In the limit of
large scales the data are uniform in the box.

Public names: `TruncatedAutoregression`.
"""

from __future__ import annotations

from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.networks.shapes import align
from sbi_flows.prior.maps import HALF_WIDTH, positive

_MAX_SIGMAS = 8.0
"""Distance from the mean, in standard deviations, beyond which the map is linear."""

_MAX_SIGMAS_OUTSIDE = 3.0
"""Maximum distance of a mean outside its interval, in standard deviations."""


class TruncatedAutoregression(distrax.Bijector):
    """Bijector from noise (*, d) to data (*, d), data_i ~ N(mean_i + data @ chain_i, scale_i^2).

    Args:
        mean: Part of the mean that depends on the context, shape (*, d).
        chain: Regression coefficients, shape (d, d): column i holds the coefficients of entry i on
            the entries before it. Coefficients on and below the diagonal are ignored.
        log_scale: Logarithm of scale_i for each entry, shape (d,).
        bounded: Which entries are truncated to (-sqrt 3, sqrt 3); the others are affine.
    """

    def __init__(
        self, mean: Array, chain: Array, log_scale: Array, bounded: tuple[bool, ...]
    ) -> None:
        """Store the parameters."""
        super().__init__(event_ndims_in=1)
        self._mean, self._chain = mean, jnp.triu(chain, 1)
        self._scale, self._bounded = jnp.exp(log_scale), bounded

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map data (*, d) to noise (*, d), all entries at once; the log determinant is (*)."""
        mean = align(self._mean, y) + y @ self._chain
        noise, log_slope = _to_noise(y, mean, self._scale, jnp.asarray(self._bounded))
        return noise, jnp.sum(log_slope, axis=-1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map noise (*, d) to data (*, d), entry after entry; the log determinant is (*)."""
        from_context = jnp.broadcast_to(align(self._mean, x), x.shape)
        bounded = jnp.asarray(self._bounded)

        def step(i: Array, y: Array) -> Array:
            mean = from_context[..., i] + y @ self._chain[:, i]
            return y.at[..., i].set(_from_noise(x[..., i], mean, self._scale[i], bounded[i]))

        y = jax.lax.fori_loop(0, x.shape[-1], step, jnp.zeros_like(x))
        return y, -self.inverse_and_log_det(y)[1]

    def log_prob(self, y: Array) -> Array:
        """Return the log density (*) of data (*, d) whose noise is standard normal.

        This is cheaper than `inverse_and_log_det`, because no normal quantile is computed.
        """
        mean = align(self._mean, y) + y @ self._chain
        scale = align(self._scale, y)
        affine = norm.logpdf((y - mean) / scale)
        box = _standardised_box(mean, scale)
        mass = ndtr(box.high) - ndtr(box.low)
        truncated = norm.logpdf((y - box.mean) / scale * box.sign) - jnp.log(mass)
        bounded = align(jnp.asarray(self._bounded), y)
        return jnp.sum(jnp.where(bounded, truncated, affine) - jnp.log(scale), axis=-1)


def _to_noise(y: Array, mean: Array, scale: Array, bounded: Array) -> tuple[Array, Array]:
    """Map data to noise; return noise and log derivative, both with the shape (*, d) of y."""
    scale = align(scale, y)
    affine, affine_slope = (y - mean) / scale, -jnp.log(jnp.broadcast_to(scale, y.shape))
    mean, low, high, sign = _standardised_box(mean, scale)
    t = (y - mean) / scale * sign
    near = jnp.clip(t, jnp.maximum(low, -_MAX_SIGMAS), jnp.minimum(high, _MAX_SIGMAS))
    noise = _quantile(near, low, high)
    slope = norm.logpdf(near) - norm.logpdf(noise) - jnp.log(ndtr(high) - ndtr(low))
    bounded = align(bounded, y)
    noise = jnp.where(bounded, sign * (noise + t - near), affine)
    return noise, affine_slope + jnp.where(bounded, slope, 0.0)


def _quantile(t: Array, low: Array, high: Array) -> Array:
    """Return the normal quantile of F(t), where F is the CDF of a normal truncated to (low, high).

    t, low and high are in standard deviations from the mean.
    """
    mass = ndtr(high) - ndtr(low)
    below = (ndtr(t) - ndtr(low)) / mass
    above = jnp.where(t > 0, ndtr(-t) - ndtr(-high), ndtr(high) - ndtr(t)) / mass
    # use the smaller tail probability, which is more accurate
    quantile = ndtri(positive(jnp.minimum(below, above)))
    return jnp.where(below < above, quantile, -quantile)


def _from_noise(x: Array, mean: Array, scale: Array, bounded: Array) -> Array:
    """Map noise to data, both of shape (*), for one entry."""
    affine = mean + scale * x
    mean, low, high, sign = _standardised_box(mean, scale)
    x = sign * x
    mass = ndtr(high) - ndtr(low)
    # Compute each half from the face on its side, as a lower tail: small numbers are accurate.
    share = mass * ndtr(-jnp.abs(x))
    upper = x > 0
    p = jnp.where(
        upper, jnp.where(high > 0, ndtr(-high) + share, ndtr(high) - share), ndtr(low) + share
    )
    t = ndtri(p) * jnp.where(upper & (high > 0), -1.0, 1.0)
    # Beyond _MAX_SIGMAS continue as a straight line, from the same point as the inverse does.
    edge = jnp.where(upper, _MAX_SIGMAS, -_MAX_SIGMAS)
    line = edge + x - _quantile(jnp.clip(edge, low, high), low, high)
    t = jnp.where(jnp.isfinite(t) & (jnp.abs(t) < _MAX_SIGMAS), t, line)
    y = jnp.clip(mean + scale * sign * t, -HALF_WIDTH, HALF_WIDTH)
    return jnp.where(bounded, y, affine)


class _Box(NamedTuple):
    """Interval of each entry, in standard deviations from its mean.

    Attributes:
        mean: Mean, clipped so that it is at most `_MAX_SIGMAS_OUTSIDE` outside the interval.
        low: Lower end of the interval.
        high: Upper end of the interval.
        sign: -1 where the interval is mirrored so that most of it lies below the mean, else 1.
    """

    mean: Array
    low: Array
    high: Array
    sign: Array


def _standardised_box(mean: Array, scale: Array) -> _Box:
    """Express the interval (-sqrt 3, sqrt 3) in standard deviations from the mean.

    The interval is mirrored if most of it lies above the mean, because lower-tail probabilities
    below the mean are small numbers, which floating point represents accurately.
    """
    reach = HALF_WIDTH + _MAX_SIGMAS_OUTSIDE * scale
    mean = jnp.clip(mean, -reach, reach)
    sign = jnp.where(mean < 0, -1.0, 1.0).astype(mean.dtype)
    low = (-HALF_WIDTH - sign * mean) / scale
    high = (HALF_WIDTH - sign * mean) / scale
    return _Box(mean, low, high, sign)

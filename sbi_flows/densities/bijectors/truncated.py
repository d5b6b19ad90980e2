"""A Gaussian autoregression, truncated to a box: noise in R^d to data inside the box, exactly.

Entry i of the data is normal around a linear function of the entries before it, truncated to its
interval. Far from the faces the map is affine; a posterior that presses on a face is mapped to a
normal exactly; with a very large scale it is the prior's CDF to a standard normal.
"""

from __future__ import annotations

import distrax
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.networks.shapes import align
from sbi_flows.prior.maps import HALF_WIDTH, positive

_FAR = 8.0
"""Standard deviations from the mean beyond which the map continues as a straight line."""

_OUTSIDE = 3.0
"""Standard deviations that a mean may lie outside its interval."""


class TruncatedAutoregression(distrax.Bijector):
    """Forward: noise (*, d) to data (*, d), data_i ~ N(mean_i + data @ chain_i, scale_i).

    Args:
        mean: Shape (*, d), the part of the mean that the context gives.
        chain: Shape (d, d); entries on and below the diagonal are ignored.
        log_scale: Shape (d,).
        bounded: Which entries are truncated to (-sqrt 3, sqrt 3); the others are affine.
    """

    def __init__(
        self, mean: Array, chain: Array, log_scale: Array, bounded: tuple[bool, ...]
    ) -> None:
        """Hold the parameters."""
        super().__init__(event_ndims_in=1)
        self._mean, self._chain = mean, jnp.triu(chain, 1)
        self._scale, self._bounded = jnp.exp(log_scale), bounded

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, d) to noise (*, d), all entries at once, with the log determinant (*)."""
        mean = align(self._mean, y) + y @ self._chain
        noise, log_slope = self._to_noise(y, mean, self._scale, jnp.asarray(self._bounded))
        return noise, jnp.sum(log_slope, axis=-1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, d) to data (*, d), entry after entry, with the log determinant (*)."""
        from_context = jnp.broadcast_to(align(self._mean, x), x.shape)
        bounded = jnp.asarray(self._bounded)

        def step(i: Array, y: Array) -> Array:
            mean = from_context[..., i] + y @ self._chain[:, i]
            return y.at[..., i].set(_from_noise(x[..., i], mean, self._scale[i], bounded[i]))

        y = jax.lax.fori_loop(0, x.shape[-1], step, jnp.zeros_like(x))
        return y, -self.inverse_and_log_det(y)[1]

    def log_prob(self, y: Array) -> Array:
        """Log density (*) of data (*, d) whose noise is standard normal; no quantile is needed."""
        mean = align(self._mean, y) + y @ self._chain
        scale = align(self._scale, y)
        affine = norm.logpdf((y - mean) / scale)
        near, low, high, sign = _faces(mean, scale)
        mass = ndtr(high) - ndtr(low)
        truncated = norm.logpdf((y - near) / scale * sign) - jnp.log(mass)
        bounded = align(jnp.asarray(self._bounded), y)
        return jnp.sum(jnp.where(bounded, truncated, affine) - jnp.log(scale), axis=-1)

    @staticmethod
    def _to_noise(y: Array, mean: Array, scale: Array, bounded: Array) -> tuple[Array, Array]:
        scale = align(scale, y)
        affine, affine_slope = (y - mean) / scale, -jnp.log(jnp.broadcast_to(scale, y.shape))
        mean, low, high, sign = _faces(mean, scale)
        t = (y - mean) / scale * sign
        near = jnp.clip(t, jnp.maximum(low, -_FAR), jnp.minimum(high, _FAR))
        noise = _quantile(near, low, high)
        slope = norm.logpdf(near) - norm.logpdf(noise) - jnp.log(ndtr(high) - ndtr(low))
        bounded = align(bounded, y)
        noise = jnp.where(bounded, sign * (noise + t - near), affine)
        return noise, affine_slope + jnp.where(bounded, slope, 0.0)


def _quantile(t: Array, low: Array, high: Array) -> Array:
    """Normal quantile of the truncated normal's CDF at t, between its faces."""
    mass = ndtr(high) - ndtr(low)
    below = (ndtr(t) - ndtr(low)) / mass
    above = jnp.where(t > 0, ndtr(-t) - ndtr(-high), ndtr(high) - ndtr(t)) / mass
    # the smaller of the two tails keeps its digits
    quantile = ndtri(positive(jnp.minimum(below, above)))
    return jnp.where(below < above, quantile, -quantile)


def _from_noise(x: Array, mean: Array, scale: Array, bounded: Array) -> Array:
    affine = mean + scale * x
    mean, low, high, sign = _faces(mean, scale)
    x = sign * x
    mass = ndtr(high) - ndtr(low)
    # each half from its own face, and in the lower tail, so that no digits are lost
    share = mass * ndtr(-jnp.abs(x))
    upper = x > 0
    p = jnp.where(
        upper, jnp.where(high > 0, ndtr(-high) + share, ndtr(high) - share), ndtr(low) + share
    )
    t = ndtri(p) * jnp.where(upper & (high > 0), -1.0, 1.0)
    # beyond _FAR a straight line goes on, from where the inverse lets it begin
    far = jnp.where(upper, _FAR, -_FAR)
    line = far + x - _quantile(jnp.clip(far, low, high), low, high)
    t = jnp.where(jnp.isfinite(t) & (jnp.abs(t) < _FAR), t, line)
    y = jnp.clip(mean + scale * sign * t, -HALF_WIDTH, HALF_WIDTH)
    return jnp.where(bounded, y, affine)


def _faces(mean: Array, scale: Array) -> tuple[Array, Array, Array, Array]:
    """The mean kept near the box, its faces in standard deviations, and the side to work on.

    The sign turns the interval so that most of it lies below the mean: tails are small numbers
    there and keep their digits.
    """
    reach = HALF_WIDTH + _OUTSIDE * scale
    mean = jnp.clip(mean, -reach, reach)
    sign = jnp.where(mean < 0, -1.0, 1.0).astype(mean.dtype)
    low = (-HALF_WIDTH - sign * mean) / scale
    high = (HALF_WIDTH - sign * mean) / scale
    return mean, low, high, sign

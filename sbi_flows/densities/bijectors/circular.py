"""Bijectors of circular entries, whose ends -sqrt 3 and sqrt 3 are the same point.

Source: Rezende et al. 2020, "Normalizing Flows on Tori and Spheres" (arXiv:2002.02428), section
2.1.1, for splines on the circle.

Public names: `Rotation`, `NormalToCircle`, `CircularSpline`.
"""

from __future__ import annotations

import math

import distrax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.densities.bijectors.spline import RationalQuadraticSpline
from sbi_flows.networks.shapes import align
from sbi_flows.prior.circular import HALF_WIDTH, wrap

PHASE_PARAMS = 2
"""Number of parameters of the phase of a circular spline."""


class Rotation(distrax.Bijector):
    """Bijector that adds an offset to each circular entry, and wraps the sum.

    Args:
        offset: Offset of each entry, shape (*, d).
        circular: Which of the d entries are circular; the others do not change.
    """

    def __init__(self, offset: Array, circular: tuple[bool, ...]) -> None:
        """Store the offsets."""
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)
        self._offset, self._circular = offset, circular

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Rotate entries (*, d) by the offset; the log determinant (*) is zero."""
        return self._rotated(x, 1.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Rotate entries (*, d) back; the log determinant (*) is zero."""
        return self._rotated(y, -1.0)

    def _rotated(self, x: Array, sign: float) -> tuple[Array, Array]:
        circular = align(jnp.asarray(self._circular), x)
        turned = wrap(x + sign * align(self._offset, x))
        return jnp.where(circular, turned, x), jnp.zeros(x.shape[:-1], x.dtype)


class NormalToCircle(distrax.Bijector):
    """Bijector that maps circular entries from R to (-sqrt 3, sqrt 3) by the normal CDF.

    It maps a standard normal to the uniform distribution on the circle.

    Args:
        circular: Which of the d entries are circular; the others do not change.
    """

    def __init__(self, circular: tuple[bool, ...]) -> None:
        """Store which entries are circular."""
        super().__init__(event_ndims_in=1)
        self._circular = np.asarray(circular)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map x (*, d) to the circle; the log determinant has shape (*)."""
        circular = align(jnp.asarray(self._circular), x)
        y = jnp.where(circular, HALF_WIDTH * (2.0 * ndtr(x) - 1.0), x)
        return y, self._log_det(x)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map y (*, d) on the circle to R; the log determinant has shape (*)."""
        tiny = jnp.finfo(y.dtype).eps
        share = jnp.clip(0.5 * (y / HALF_WIDTH + 1.0), tiny, 1.0 - tiny)
        x = jnp.where(align(jnp.asarray(self._circular), y), ndtri(share), y)
        return x, -self._log_det(x)

    def _log_det(self, x: Array) -> Array:
        slopes = norm.logpdf(x) + math.log(2 * HALF_WIDTH)
        return jnp.sum(jnp.where(align(jnp.asarray(self._circular), x), slopes, 0.0), axis=-1)


class CircularSpline(distrax.Bijector):
    """Elementwise spline: on the circle for circular entries, on R for the others.

    A spline on the circle is a rotation by a phase, and then a monotone spline on the interval
    whose slopes at both ends are equal. The phase is the angle of a vector, so that it can wind
    around the circle when the context does.

    Args:
        params: Parameters (3 K + 2, D, *): those of a `RationalQuadraticSpline`, two parameters of
            the phase, and a flag that is 1 for circular entries and 0 for the others. If all but
            the flags are zero, the spline is the identity.
        bound: Half width of the interval of the spline.

    References:
        Normalizing Flows on Tori and Spheres, arXiv:2002.02428.
    """

    def __init__(self, params: Array, bound: float) -> None:
        """Split the parameters."""
        super().__init__(event_ndims_in=0)
        spline, (cos, sin, flag) = params[:-3], params[-3:]
        self._spline, self._bound = RationalQuadraticSpline(spline, bound), bound
        self._circular = flag > 0.5
        self._phase = jnp.arctan2(sin, 1.0 + cos) * (bound / math.pi)
        self._scale = jnp.where(self._circular, bound / HALF_WIDTH, 1.0)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map entries (D, *); the log derivative has the same shape."""
        turned = wrap(x * self._scale + self._phase, self._bound)
        y, log_det = self._spline.forward_and_log_det(jnp.where(self._circular, turned, x))
        return y / self._scale, log_det

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Invert the map of entries (D, *); the log derivative has the same shape."""
        x, log_det = self._spline.inverse_and_log_det(y * self._scale)
        turned = wrap(x - self._phase, self._bound) / self._scale
        return jnp.where(self._circular, turned, x), log_det

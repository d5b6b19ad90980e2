"""Monotone rational-quadratic spline with linear tails, elementwise.

Source: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032), equations 4-8.

The K bins of all elements stand on the FIRST axis of the parameters: reductions over a short
leading axis vectorise over the long ones.
"""

from __future__ import annotations

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MIN_BIN = 1e-3
"""Smallest width and height of a bin, as a fraction of the box."""

MIN_SLOPE = 1e-3
"""Smallest slope at a knot."""

_SLOPE_OFFSET = float(np.log(np.expm1(1.0 - MIN_SLOPE)))  # softplus of it + MIN_SLOPE is 1


class RationalQuadraticSpline(distrax.Bijector):
    """Elementwise spline on (-bound, bound), the identity outside.

    Args:
        params: Unconstrained parameters of shape (3 K - 1, *shape): K widths, K heights, K - 1
            inner slopes. All zeros give the identity.
        bound: Half width B of the box.

    Raises:
        ValueError: The first axis is not 3 K - 1 for some K >= 2.

    References:
        Neural Spline Flows, arXiv:1906.04032.

    Example:
        >>> import jax.numpy as jnp
        >>> spline = RationalQuadraticSpline(jnp.zeros((3 * 8 - 1, 2)), bound=4.0)
        >>> bool(jnp.allclose(spline.forward(jnp.array([0.5, 9.0])), jnp.array([0.5, 9.0])))
        True
    """

    def __init__(self, params: Array, bound: float = 5.0) -> None:
        """Compute the knots once for both directions."""
        super().__init__(event_ndims_in=0)
        bins, extra = divmod(params.shape[0] + 1, 3)
        if extra or bins < 2:
            raise ValueError(
                f"params: expected a first axis of 3 K - 1 with K >= 2, got {params.shape}"
            )
        self._bound = bound
        self._widths = _fractions(params[:bins]) * (2 * bound)
        self._heights = _fractions(params[bins : 2 * bins]) * (2 * bound)
        inner = jax.nn.softplus(params[2 * bins :] + _SLOPE_OFFSET) + MIN_SLOPE
        edge = jnp.ones_like(inner[:1])
        self._slopes = jnp.concatenate([edge, inner, edge])

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """The spline and its log derivative, both of x's shape."""
        inside = jnp.abs(x) < self._bound
        # clipped before the arithmetic: a `where` after it would leave NaN gradients outside
        clipped = jnp.clip(x, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._select(clipped, self._widths)
        slope, t = h / w, (clipped - x0) / w
        y, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, y, x), jnp.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """The inverse spline (equations 6-8) and its log derivative."""
        inside = jnp.abs(y) < self._bound
        clipped = jnp.clip(y, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._select(clipped, self._heights)
        slope, rise = h / w, clipped - y0
        bend = d0 + d1 - 2 * slope
        a = h * (slope - d0) + rise * bend
        b = h * d0 - rise * bend
        c = -slope * rise
        root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0.0))
        t = jnp.clip(2 * c / (-b - root), 0.0, 1.0)
        _, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, x0 + t * w, y), jnp.where(inside, -log_det, 0.0)

    def _select(self, value: Array, steps: Array) -> tuple[Array, ...]:
        """Left knot, sizes and slopes of the bin that holds each value along `steps`."""
        lefts = _left_knots(steps, self._bound)
        above = (value[None] >= lefts).at[0].set(True)
        beyond = jnp.concatenate([above[1:], jnp.zeros_like(above[:1])])
        chosen = (above & ~beyond).astype(value.dtype)

        def pick(table: Array) -> Array:
            return jnp.sum(table * chosen, axis=0)

        return (
            pick(_left_knots(self._widths, self._bound)),
            pick(self._widths),
            pick(_left_knots(self._heights, self._bound)),
            pick(self._heights),
            pick(self._slopes[:-1]),
            pick(self._slopes[1:]),
        )


def _fractions(logits: Array) -> Array:
    """Positive fractions of at least MIN_BIN that sum to one over the first axis."""
    return MIN_BIN + (1.0 - MIN_BIN * logits.shape[0]) * jax.nn.softmax(logits, axis=0)


def _left_knots(steps: Array, bound: float) -> Array:
    """Exclusive running sum over the first axis, as one small matrix product."""
    lower = jnp.asarray(np.tril(np.ones((len(steps), len(steps))), -1), steps.dtype)
    return jnp.tensordot(lower, steps, axes=1) - bound


def _rational_quadratic(
    t: Array, slope: Array, y0: Array, h: Array, d0: Array, d1: Array
) -> tuple[Array, Array]:
    """Equations 4 and 5 at the fraction t of a bin."""
    mixed = t * (1.0 - t)
    denominator = slope + (d0 + d1 - 2 * slope) * mixed
    y = y0 + h * (slope * t * t + d0 * mixed) / denominator
    gradient = d1 * t * t + 2 * slope * mixed + d0 * (1.0 - t) ** 2
    return y, 2 * jnp.log(slope / denominator) + jnp.log(gradient)

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
        """Split the parameters; each direction computes what it needs of them."""
        super().__init__(event_ndims_in=0)
        bins, extra = divmod(params.shape[0] + 1, 3)
        if extra or bins < 2:
            raise ValueError(
                f"params: expected a first axis of 3 K - 1 with K >= 2, got {params.shape}"
            )
        self._bound = bound
        self._widths = _exponentials(params[:bins])
        self._heights = _exponentials(params[bins : 2 * bins])
        self._slopes = params[2 * bins :]

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """The spline and its log derivative, both of x's shape."""
        inside = jnp.abs(x) < self._bound
        # clipped before the arithmetic: a `where` after it would leave NaN gradients outside
        clipped = jnp.clip(x, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._bin(self._index(clipped, self._widths))
        slope, t = h / w, (clipped - x0) / w
        y, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, y, x), jnp.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """The inverse spline (equations 6-8) and its log derivative."""
        inside = jnp.abs(y) < self._bound
        clipped = jnp.clip(y, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._bin(self._index(clipped, self._heights))
        slope, rise = h / w, clipped - y0
        bend = d0 + d1 - 2 * slope
        a = h * (slope - d0) + rise * bend
        b = h * d0 - rise * bend
        c = -slope * rise
        root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0.0))
        t = jnp.clip(2 * c / (-b - root), 0.0, 1.0)
        _, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, x0 + t * w, y), jnp.where(inside, -log_det, 0.0)

    def _index(self, value: Array, sizes: Array) -> Array:
        """Number of the bin that holds each value, along `sizes`; no gradient passes."""
        value, sizes = jax.lax.stop_gradient((value, sizes))
        bins = len(sizes)
        # running sums of all but the last bin as one small matrix product: the inner knots
        lower = jnp.asarray(np.tril(np.ones((bins - 1, bins))), sizes.dtype)
        sums = jnp.tensordot(lower, sizes, axes=1)
        number = _along(np.arange(1, bins), sums)
        knots = self._length(sums, jnp.sum(sizes, axis=0, keepdims=True), number) - self._bound
        return jnp.sum(value[None] >= knots, axis=0)

    def _bin(self, index: Array) -> tuple[Array, ...]:
        """Left knot, width, lower knot, height and both slopes of the bins of these numbers."""
        x0, w = self._edge_and_size(index, self._widths)
        y0, h = self._edge_and_size(index, self._heights)
        # a logit of zero is a slope of one, which is what both ends of the box have
        number = _along(np.arange(len(self._slopes)), self._slopes)
        left = jnp.sum(jnp.where(number == index[None] - 1, self._slopes, 0.0), axis=0)
        right = jnp.sum(jnp.where(number == index[None], self._slopes, 0.0), axis=0)
        return x0, w, y0, h, _slope(left), _slope(right)

    def _edge_and_size(self, index: Array, sizes: Array) -> tuple[Array, Array]:
        number, total = _along(np.arange(len(sizes)), sizes), jnp.sum(sizes, axis=0)
        before = jnp.sum(jnp.where(number < index[None], sizes, 0.0), axis=0)
        here = jnp.sum(jnp.where(number == index[None], sizes, 0.0), axis=0)
        left = self._length(before, total, index.astype(sizes.dtype)) - self._bound
        return left, self._length(here, total, jnp.ones_like(here))

    def _length(self, part: Array, total: Array, count: Array) -> Array:
        """Length of `count` bins whose unnormalised sizes add up to `part` of `total`."""
        free = 1.0 - MIN_BIN * len(self._widths)
        return 2 * self._bound * (MIN_BIN * count + free * (part / total))


def _exponentials(logits: Array) -> Array:
    """Positive sizes whose shares over the first axis are the softmax of the logits."""
    return jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=0, keepdims=True)))


def _along(numbers: np.ndarray, like: Array) -> Array:
    """Numbers of the bins on the first axis, with as many axes as `like`."""
    return jnp.asarray(numbers, like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))


def _slope(logit: Array) -> Array:
    return jax.nn.softplus(logit + _SLOPE_OFFSET) + MIN_SLOPE


def _rational_quadratic(
    t: Array, slope: Array, y0: Array, h: Array, d0: Array, d1: Array
) -> tuple[Array, Array]:
    """Equations 4 and 5 at the fraction t of a bin."""
    mixed = t * (1.0 - t)
    denominator = slope + (d0 + d1 - 2 * slope) * mixed
    y = y0 + h * (slope * t * t + d0 * mixed) / denominator
    gradient = d1 * t * t + 2 * slope * mixed + d0 * (1.0 - t) ** 2
    return y, 2 * jnp.log(slope / denominator) + jnp.log(gradient)

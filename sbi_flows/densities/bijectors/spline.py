"""Monotone rational-quadratic spline with linear tails, elementwise.

Source: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032), equations 4-8.

The K bins of all elements stand on the FIRST axis of the parameters: reductions over a short
leading axis vectorise over the long ones.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from functools import partial

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import FULL

MIN_BIN = 1e-3
"""Smallest width and height of a bin, as a fraction of the box."""

MIN_SLOPE = 1e-3
"""Smallest slope at a knot."""

_LIMIT = 30.0  # of logits: a bin that is e^30 times as large as another fills the box

_WIDTHS, _HEIGHTS = 0, 1

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
        """Hold the parameters; each direction computes what it needs of them."""
        super().__init__(event_ndims_in=0)
        bins, extra = divmod(params.shape[0] + 1, 3)
        if extra or bins < 2:
            raise ValueError(
                f"params: expected a first axis of 3 K - 1 with K >= 2, got {params.shape}"
            )
        self._params, self._bins, self._bound = params, bins, bound

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """The spline and its log derivative, both of x's shape."""
        inside = jnp.abs(x) < self._bound
        # clipped before the arithmetic: a `where` after it would leave NaN gradients outside
        clipped = jnp.clip(x, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._bin(clipped, _WIDTHS)
        slope, t = h / w, (clipped - x0) / w
        y, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, y, x), jnp.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """The inverse spline (equations 6-8) and its log derivative."""
        inside = jnp.abs(y) < self._bound
        clipped = jnp.clip(y, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._bin(clipped, _HEIGHTS)
        slope, rise = h / w, clipped - y0
        bend = d0 + d1 - 2 * slope
        a = h * (slope - d0) + rise * bend
        b = h * d0 - rise * bend
        c = -slope * rise
        root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0.0))
        t = jnp.clip(2 * c / (-b - root), 0.0, 1.0)
        _, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, x0 + t * w, y), jnp.where(inside, -log_det, 0.0)

    def _bin(self, value: Array, given: int) -> tuple[Array, ...]:
        """Left knot, width, lower knot, height and both slopes of the bin that holds each value."""
        box, free = 2 * self._bound, 1.0 - MIN_BIN * self._bins
        number, before, here, slopes = _look_up(given, self._params, value / box + 0.5)
        edge = box * (MIN_BIN * number[None] + free * before) - self._bound
        size = box * (MIN_BIN + free * here)
        return edge[0], size[0], edge[1], size[1], _slope(slopes[0]), _slope(slopes[1])


Sum = Callable[[Array], Array]
"""Sums over the bins, which are the second axis."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look_up(given: int, params: Array, place: Array) -> tuple[Array, Array, Array, Array]:
    """Find the bin of each value, and what its parameters say.

    Args:
        given: Whether the values lie along the widths or along the heights.
        params: As for the spline, shape (3 K - 1, *).
        place: Where the values lie, from 0 to 1 along the box, shape (*).

    Returns:
        The bin's number from 0 (*); the sum of the softmax over the widths and over the heights of
        the bins before it (2, *), and its own (2, *); the logits of its slopes, left and right
        (2, *).
    """
    return _looked_up(_written_out, given, params, place)[0]


def _looked_up(total: Sum, given: int, params: Array, place: Array) -> tuple[tuple, Array]:
    """What `_look_up` returns, and both softmaxes (2, K, *)."""
    sizes, slopes = _parts(params)
    bins = sizes.shape[1]
    # limits take the place of the largest, which would be found anew for each bin; the derivative
    # goes on beyond them, so that training comes back from there
    powers = jnp.exp(jnp.clip(sizes, -_LIMIT, _LIMIT))
    shares = powers / total(powers)[:, None]
    # running sums of all but the last bin as one small matrix product: the inner knots
    lengths = MIN_BIN + (1.0 - MIN_BIN * bins) * shares[given]
    lower = jnp.asarray(np.tril(np.ones((bins - 1, bins))), lengths.dtype)
    knots = jnp.tensordot(lower, lengths, axes=1, precision=FULL)
    number = total((place[None] >= knots).astype(place.dtype)[None])[0]
    return (number, *_of_bin(total, number, shares, slopes)), shares


def _of_bin(total: Sum, number: Array, sizes: Array, slopes: Array) -> tuple[Array, Array, Array]:
    """Linear in sizes (2, K, *) and slopes (K - 1, *): sums before a bin, at it, and its slopes.

    A slope that is not there is zero, which as a logit is the slope of one at the ends of the box.
    """
    bins, inner = _along(sizes.shape[1], number), _along(len(slopes), number)
    before = total(jnp.where((bins < number[None])[None], sizes, 0.0))
    here = total(jnp.where((bins == number[None])[None], sizes, 0.0))
    ends = [total(jnp.where(inner == number[None] - i, slopes, 0.0)[None])[0] for i in (1, 0)]
    return before, here, jnp.stack(ends)


@_look_up.defjvp
def _look_up_tangents(given: int, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """The derivative of a softmax is linear in what it is summed over: nothing else is stored."""
    out, shares = _looked_up(_looped, given, *primals)
    number, before, here, _ = out
    sizes, slopes = _parts(tangents[0])
    weighted = shares * sizes
    whole = _looped(weighted)
    d_before, d_here, d_slopes = _of_bin(_looped, number, weighted, slopes)
    d_before, d_here = d_before - before * whole, d_here - here * whole
    return out, (jnp.zeros_like(number), d_before, d_here, d_slopes)


def _parts(params: Array) -> tuple[Array, Array]:
    """Widths and heights (2, K, *) and slopes (K - 1, *) of all parameters (3 K - 1, *)."""
    count = 2 * ((len(params) + 1) // 3)
    return params[:count].reshape(2, -1, *params.shape[1:]), params[count:]


def _written_out(values: Array) -> Array:
    """Sum over the bins, the second axis: on a CPU the faster way for the rows of an evaluation."""
    return functools.reduce(operator.add, (values[:, i] for i in range(values.shape[1])))


def _looped(values: Array) -> Array:
    """The same by a loop of XLA: the faster way for the batches of a training."""
    return jnp.sum(values, axis=1)


def _along(count: int, like: Array) -> Array:
    """Numbers of the bins on a new first axis, with one axis more than `like`."""
    return jnp.arange(count, dtype=like.dtype).reshape((-1,) + (1,) * like.ndim)


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

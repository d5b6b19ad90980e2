"""Elementwise monotone rational-quadratic spline with linear tails.

Source: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032), equations 4-8.

The spline acts in the box (-bound, bound) x (-bound, bound). The first axis of the parameters runs
over the K bins: a sum over this short leading axis vectorises over the long axes that follow it.

Public names: `RationalQuadraticSpline`, `MIN_BIN`, `MIN_SLOPE`.
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
"""Minimum width and height of a bin, as fractions of the box."""

MIN_SLOPE = 1e-3
"""Minimum slope at a knot."""

_MAX_LOGIT = 30.0  # with this logit one bin fills the box; larger logits might overflow

_WIDTHS, _HEIGHTS = 0, 1

_SLOPE_OFFSET = float(np.log(np.expm1(1.0 - MIN_SLOPE)))  # a logit of zero gives slope one


class RationalQuadraticSpline(distrax.Bijector):
    """Elementwise monotone spline on (-bound, bound); the identity outside.

    Args:
        params: Unconstrained parameters of shape (3 K - 1, *shape): K widths, K heights and K - 1
            inner slopes of the bins. All zeros give the identity.
        bound: Half width of the interval (-bound, bound), for inputs and outputs.

    Raises:
        ValueError: The length of the first axis is not 3 K - 1 for some K >= 2.

    References:
        Neural Spline Flows, arXiv:1906.04032.

    Example:
        >>> import jax.numpy as jnp
        >>> spline = RationalQuadraticSpline(jnp.zeros((3 * 8 - 1, 2)), bound=4.0)
        >>> bool(jnp.allclose(spline.forward(jnp.array([0.5, 9.0])), jnp.array([0.5, 9.0])))
        True
    """

    def __init__(self, params: Array, bound: float = 5.0) -> None:
        """Store the parameters and check their shape."""
        super().__init__(event_ndims_in=0)
        bins, extra = divmod(params.shape[0] + 1, 3)
        if extra or bins < 2:
            raise ValueError(
                f"params: expected a first axis of 3 K - 1 with K >= 2, got {params.shape}"
            )
        self._params, self._bins, self._bound = params, bins, bound

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map values of any shape; the log derivative has the same shape."""
        inside = jnp.abs(x) < self._bound
        # Clip before the arithmetic: a `where` after it would leave NaN gradients outside.
        clipped = jnp.clip(x, -self._bound, self._bound)
        x0, w, y0, h, d0, d1 = self._bin(clipped, _WIDTHS)
        slope, t = h / w, (clipped - x0) / w
        y, log_det = _rational_quadratic(t, slope, y0, h, d0, d1)
        return jnp.where(inside, y, x), jnp.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Invert the spline by equations 6-8; the log derivative has the shape of y."""
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

    def _bin(self, value: Array, side: int) -> tuple[Array, ...]:
        """Return left knot, width, lower knot, height and both slopes of the bin of each value."""
        box, free = 2 * self._bound, 1.0 - MIN_BIN * self._bins
        index, before, share, slopes = _look_up(side, self._params, value / box + 0.5)
        edge = box * (MIN_BIN * index[None] + free * before) - self._bound
        size = box * (MIN_BIN + free * share)
        return edge[0], size[0], edge[1], size[1], _slope(slopes[0]), _slope(slopes[1])


BinSum = Callable[[Array], Array]
"""Function that sums over the bins, the second axis."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look_up(side: int, params: Array, position: Array) -> tuple[Array, Array, Array, Array]:
    """Find the bin of each value and the parameters of that bin.

    Args:
        side: `_WIDTHS` if the values lie along the horizontal axis, `_HEIGHTS` if along the
            vertical one.
        params: Parameters of the spline, shape (3 K - 1, *).
        position: Position of each value in the box, from 0 to 1, shape (*).

    Returns:
        Four arrays. Index of the bin, counted from 0, shape (*). Sum of the softmax of widths and
        of heights over the bins before that bin, shape (2, *). Softmax of the width and of the
        height of the bin, shape (2, *). Logits of the slopes at the bin's left and right end, shape
        (2, *).
    """
    return _search(_sum_unrolled, side, params, position)[0]


def _search(total: BinSum, side: int, params: Array, position: Array) -> tuple[tuple, Array]:
    """Return the result of `_look_up`, and the softmax of widths and of heights (2, K, *)."""
    sizes, slopes = _split(params)
    bins = sizes.shape[1]
    # Clip at a fixed limit instead of subtracting the largest logit, whose search costs time. The
    # derivative ignores the clip, so that training can move a logit back below the limit.
    powers = jnp.exp(jnp.clip(sizes, -_MAX_LOGIT, _MAX_LOGIT))
    shares = powers / total(powers)[:, None]
    # the inner knots: running sums over all bins but the last, as one small matrix product
    lengths = MIN_BIN + (1.0 - MIN_BIN * bins) * shares[side]
    lower = jnp.asarray(np.tril(np.ones((bins - 1, bins))), lengths.dtype)
    knots = jnp.tensordot(lower, lengths, axes=1, precision=FULL)
    index = total((position[None] >= knots).astype(position.dtype)[None])[0]
    return (index, *_select_bin(total, index, shares, slopes)), shares


def _select_bin(
    total: BinSum, index: Array, sizes: Array, slopes: Array
) -> tuple[Array, Array, Array]:
    """Return the sum of sizes before a bin, the size of the bin, and its slopes: (2, *) each.

    The result is linear in the sizes (widths and heights) (2, K, *) and the slopes (K - 1, *). The
    slope logit at the ends of the box is zero, which means slope one.
    """
    bins, inner = _indices(sizes.shape[1], index), _indices(len(slopes), index)
    before = total(jnp.where((bins < index[None])[None], sizes, 0.0))
    share = total(jnp.where((bins == index[None])[None], sizes, 0.0))
    ends = [total(jnp.where(inner == index[None] - i, slopes, 0.0)[None])[0] for i in (1, 0)]
    return before, share, jnp.stack(ends)


@_look_up.defjvp
def _look_up_tangents(side: int, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Compute the tangents of `_look_up`; reverse mode then stores only the softmaxes."""
    out, shares = _search(_sum_loop, side, *primals)
    index, before, share, _ = out
    sizes, slopes = _split(tangents[0])
    weighted = shares * sizes
    change = _sum_loop(weighted)
    d_before, d_share, d_slopes = _select_bin(_sum_loop, index, weighted, slopes)
    d_before, d_share = d_before - before * change, d_share - share * change
    return out, (jnp.zeros_like(index), d_before, d_share, d_slopes)


def _split(params: Array) -> tuple[Array, Array]:
    """Split parameters (3 K - 1, *) into widths and heights (2, K, *) and slopes (K - 1, *)."""
    count = 2 * ((len(params) + 1) // 3)
    return params[:count].reshape(2, -1, *params.shape[1:]), params[count:]


def _sum_unrolled(values: Array) -> Array:
    """Sum over the second axis term by term: faster on a CPU when no derivative is taken."""
    return functools.reduce(operator.add, (values[:, i] for i in range(values.shape[1])))


def _sum_loop(values: Array) -> Array:
    """Sum over the second axis by one reduction: faster in training."""
    return jnp.sum(values, axis=1)


def _indices(count: int, like: Array) -> Array:
    """Return the indices 0 to count - 1, shape (count, 1, ...), with one more axis than `like`."""
    return jnp.arange(count, dtype=like.dtype).reshape((-1,) + (1,) * like.ndim)


def _slope(logit: Array) -> Array:
    return jax.nn.softplus(logit + _SLOPE_OFFSET) + MIN_SLOPE


def _rational_quadratic(
    t: Array, slope: Array, y0: Array, h: Array, d0: Array, d1: Array
) -> tuple[Array, Array]:
    """Evaluate equations 4 and 5 at the fraction t of a bin: value and log derivative."""
    mixed = t * (1.0 - t)
    denominator = slope + (d0 + d1 - 2 * slope) * mixed
    y = y0 + h * (slope * t * t + d0 * mixed) / denominator
    gradient = d1 * t * t + 2 * slope * mixed + d0 * (1.0 - t) ** 2
    return y, 2 * jnp.log(slope / denominator) + jnp.log(gradient)

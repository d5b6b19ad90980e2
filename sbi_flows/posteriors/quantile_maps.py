"""Increasing piecewise linear maps through quantiles of draws.

Public names: `Quantiles`, `quantiles_of`, `quantile_map`, `increasing`.

The score of a value is its rank among draws, expressed as a normal quantile. Outside the range of
the draws, ranks carry no information. There the maps are extrapolated as straight lines, so that
the score of a value grows with its distance from the draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

MIN_DRAWS_OUTSIDE = 5
"""Minimum number of draws beyond the outermost knot on each side, to locate it precisely."""

SPACING = 0.5
"""Maximum distance between knots, in standard deviations of the normal score."""

FURTHEST = 3.0
"""Maximum absolute normal score of the outermost knots."""


class Quantiles(NamedTuple):
    """Increasing piecewise linear map through K knots, or a batch of such maps.

    Attributes:
        scores: Normal scores at the knots, increasing, shape (*, K).
        values: Quantiles at the knots, increasing, shape (*, K).
    """

    scores: Array
    values: Array

    def value(self, score: Array) -> tuple[Array, Array]:
        """Map scores (*, n) to values; return values and log derivatives, both (*, n)."""
        return _through(self.scores, self.values, score)

    def score(self, value: Array) -> tuple[Array, Array]:
        """Map values (*, n) to scores; return scores and log derivatives, both (*, n)."""
        return _through(self.values, self.scores, value)


def quantiles_of(
    draws: Array, *, spacing: float = SPACING, furthest: float = FURTHEST
) -> Quantiles:
    """Build the map from normal scores to the quantiles of draws.

    If all draws are equal, the map still increases, with a very small slope.

    Args:
        draws: Draws, shape (*, n); n must be at least 20.
        spacing: Maximum distance between knots, in standard deviations of the normal score.
        furthest: Maximum absolute normal score of the outermost knots.

    Example:
        >>> import jax
        >>> own = quantiles_of(2.0 * jax.random.normal(jax.random.key(0), (10_000,)))
        >>> own.value(jnp.array([-1.0, 0.0, 4.0]))[0].round(0) + 0.0
        Array([-2.,  0.,  8.], dtype=float32)
    """
    inner = _knots(draws.shape[-1], spacing, furthest)
    values = _quantiles(draws, inner)
    scores = jnp.asarray(np.r_[inner[0] - 1.0, inner, inner[-1] + 1.0], values.dtype)
    return Quantiles(jnp.broadcast_to(scores, values.shape), values)


def quantile_map(source: Array, target: Array) -> Quantiles:
    """Build the map from quantiles of draws `source` (*, m) to quantiles of `target` (*, n)."""
    inner = _knots(min(source.shape[-1], target.shape[-1]), SPACING, FURTHEST)
    return Quantiles(_quantiles(source, inner), _quantiles(target, inner))


def _knots(n: int, spacing: float, furthest: float) -> np.ndarray:
    """Return evenly spaced normal scores for knots, in the range where n draws give quantiles."""
    outer = min(furthest, -float(special.ndtri(MIN_DRAWS_OUTSIDE / (n + 1))))
    half = max(2, math.ceil(outer / spacing))
    return np.linspace(-outer, outer, 2 * half + 1)


def _quantiles(draws: Array, inner: np.ndarray) -> Array:
    """Compute the quantiles of draws (*, n) at the normal scores `inner`.

    One extrapolated knot is added at each end, so that the shape is (*, len(inner) + 2).
    """
    n = draws.shape[-1]
    ordered = jnp.sort(draws, axis=-1)
    places = np.clip((n + 1) * special.ndtr(inner) - 1.0, 0.0, n - 1.0)
    below = np.minimum(places.astype(int), n - 2)
    part = np.asarray(places - below, ordered.dtype)
    part = part.reshape((1,) * (draws.ndim - 1) + part.shape)
    values = (1.0 - part) * ordered[..., below] + part * ordered[..., below + 1]
    quarter = (len(inner) - 1) // 4
    step = 1.0 / (inner[quarter] - inner[0])
    first = values[..., :1] - step * (values[..., quarter, None] - values[..., :1])
    last = values[..., -1:] + step * (values[..., -1:] - values[..., -1 - quarter, None])
    return increasing(jnp.concatenate([first, values, last], axis=-1))


def increasing(values: Array) -> Array:
    """Make sorted values (*, K) strictly increasing: separate equal neighbours slightly."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    least = 16.0 * jnp.finfo(values.dtype).eps * jnp.maximum(largest, 1e-30)
    steps = jnp.maximum(jnp.diff(values, axis=-1), least)
    return jnp.concatenate([values[..., :1], values[..., :1] + jnp.cumsum(steps, axis=-1)], axis=-1)


def _through(xs: Array, ys: Array, points: Array) -> tuple[Array, Array]:
    """Interpolate linearly between knots at points (*, n); return values and log slopes."""
    return jnp.vectorize(_line, signature="(k),(k),(n)->(n),(n)")(xs, ys, points)


def _line(xs: Array, ys: Array, points: Array) -> tuple[Array, Array]:
    at = jnp.clip(jnp.searchsorted(xs, points, side="right") - 1, 0, len(xs) - 2)
    slope = (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at])
    return ys[at] + slope * (points - xs[at]), jnp.log(slope)

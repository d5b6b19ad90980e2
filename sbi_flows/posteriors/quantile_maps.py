"""Monotone maps between quantiles, piecewise linear and straight at both ends.

Public names: `Quantiles`, `quantiles_of`, `quantile_map`, `increasing`.

The ends go on beyond all draws, where the rank among them says no more: a truth that far out still
has a score that tells how far.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

OUTSIDE = 5
"""Draws beyond the outermost knot on each side: fewer do not say where it is."""

SPACING = 0.5
"""Normal scores between knots, at the most."""

FURTHEST = 3.0
"""Normal score of the outermost knot, at the most."""


class Quantiles(NamedTuple):
    """An increasing map through knots, or many of them.

    Attributes:
        scores: Knots, increasing, shape (*, K); the normal scores of quantiles, say.
        values: What they are mapped to, increasing, shape (*, K).
    """

    scores: Array
    values: Array

    def value(self, score: Array) -> tuple[Array, Array]:
        """Values (*, n) at scores (*, n), and the log derivatives there."""
        return _through(self.scores, self.values, score)

    def score(self, value: Array) -> tuple[Array, Array]:
        """Scores (*, n) of values (*, n), and the log derivatives there."""
        return _through(self.values, self.scores, value)


def quantiles_of(
    draws: Array, *, spacing: float = SPACING, furthest: float = FURTHEST
) -> Quantiles:
    """The quantiles of draws (*, n), 20 of them or more, by their normal scores.

    Draws that are all equal still give an increasing map, a very steep one.

    Args:
        draws: Draws, shape (*, n).
        spacing: Normal scores between knots, at the most.
        furthest: Normal score of the outermost knot, at the most.

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
    """The map that takes the quantiles of draws (*, m) to those of others (*, n)."""
    inner = _knots(min(source.shape[-1], target.shape[-1]), SPACING, FURTHEST)
    return Quantiles(_quantiles(source, inner), _quantiles(target, inner))


def _knots(n: int, spacing: float, furthest: float) -> np.ndarray:
    """Evenly spaced normal scores that n draws know the quantiles at."""
    outer = min(furthest, -float(special.ndtri(OUTSIDE / (n + 1))))
    half = max(2, math.ceil(outer / spacing))
    return np.linspace(-outer, outer, 2 * half + 1)


def _quantiles(draws: Array, inner: np.ndarray) -> Array:
    """Quantiles (*, K) at normal scores, and a knot more at each end on the line of the last."""
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
    """Set equal neighbours (*, K) apart by what the numbers can just hold."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    least = 16.0 * jnp.finfo(values.dtype).eps * jnp.maximum(largest, 1e-30)
    steps = jnp.maximum(jnp.diff(values, axis=-1), least)
    return jnp.concatenate([values[..., :1], values[..., :1] + jnp.cumsum(steps, axis=-1)], axis=-1)


def _through(xs: Array, ys: Array, points: Array) -> tuple[Array, Array]:
    """The line through knots at points (*, n), and the log of its slope."""
    return jnp.vectorize(_line, signature="(k),(k),(n)->(n),(n)")(xs, ys, points)


def _line(xs: Array, ys: Array, points: Array) -> tuple[Array, Array]:
    at = jnp.clip(jnp.searchsorted(xs, points, side="right") - 1, 0, len(xs) - 2)
    slope = (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at])
    return ys[at] + slope * (points - xs[at]), jnp.log(slope)

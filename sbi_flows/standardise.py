"""Observations as flat, robustly standardised feature vectors.

Public names: `Standardiser`, `fit_standardiser`, `flatten_rows`, `unflatten_rows`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.typing import Obs

Shapes: TypeAlias = tuple[tuple[int, ...], ...]

_NORMAL_IQR = 1.349
_LINEAR = 3.0
"""Features are linear within this many scales of the median and logarithmic beyond."""


class Standardiser(NamedTuple):
    """Median and scale of each feature of a flattened observation.

    Heavy tails are compressed, never cut: the map is monotone and keeps all information.

    Attributes:
        center: Medians, shape (C,).
        scale: Interquartile range over 1.349; the standard deviation where that range is zero, as
            it is for sparse counts; 1 where the feature is constant. Shape (C,).
    """

    center: Array
    scale: Array

    def __call__(self, x: Obs) -> Array:
        """A batch of observations (B, *event) to features (B, C)."""
        s = (flatten_rows(x) - self.center[None]) / self.scale[None]
        # a finite number over a small scale may overflow; its logarithm does not
        largest = jnp.finfo(s.dtype).max
        s = jnp.clip(s, -largest, largest)
        beyond = jnp.maximum(jnp.abs(s) - _LINEAR, 0.0)
        return jnp.clip(s, -_LINEAR, _LINEAR) + jnp.sign(s) * jnp.log1p(beyond)


def fit_standardiser(x: Obs) -> Standardiser:
    """Medians and scales of a batch of finite observations (N, *event)."""
    return Standardiser(*_quantiles(flatten_rows(x)))


def flatten_rows(x: Obs) -> Array:
    """Join all leaves (B, *event) into one floating-point array (B, C)."""
    rows = [jnp.reshape(a, (a.shape[0], -1)) for a in jax.tree.leaves(x)]
    return jnp.concatenate([r.astype(jnp.result_type(float)) for r in rows], axis=-1)


def unflatten_rows(rows: Array, tree: Any, shapes: Shapes) -> Obs:
    """Split (B, C) into leaves (B, *shape): the inverse of `flatten_rows`."""
    parts, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(jnp.reshape(rows[:, start : start + size], (len(rows), *shape)))
        start += size
    return jax.tree.unflatten(tree, parts)


@jax.jit
def _quantiles(rows: Array) -> tuple[Array, Array]:
    low, center, high = jnp.quantile(rows, jnp.asarray([0.25, 0.5, 0.75]), axis=0)
    # the standard deviation of differences from the median, on a scale that cannot overflow
    spread = (high - low) / _NORMAL_IQR
    size = jnp.maximum(jnp.max(jnp.abs(rows - center[None]), axis=0), 1e-30)
    deviation = size * jnp.sqrt(jnp.mean(((rows - center[None]) / size[None]) ** 2, axis=0))
    # differences at the rounding error of the values themselves carry nothing
    floor = 1e-6 * jnp.abs(center)
    scale = jnp.where(spread > floor, spread, deviation)
    return center, jnp.where(scale > jnp.maximum(floor, 1e-30), scale, 1.0)

"""Observations as flat, robustly standardised feature vectors.

Public names: `Standardiser`, `fit_standardiser`, `flatten_rows`, `unflatten_rows`, `entry_labels`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.typing import Obs

Shapes: TypeAlias = tuple[tuple[int, ...], ...]

_NORMAL_IQR = 1.349
_LESS_SKEW = 0.7
"""Logarithms are taken of positive arrays whose mean skewness falls to this share of it."""


class Standardiser(NamedTuple):
    """Median and scale of each feature of a flattened observation, or of its logarithm.

    Logarithms are taken of arrays (leaves of an observation) that are positive throughout, and
    less skew so. Heavy tails are compressed, never cut: the map is monotone and keeps all
    information.

    Attributes:
        center: Medians, shape (C,).
        scale: Interquartile range over 1.349; the standard deviation where that range is zero, as
            it is for sparse counts; 1 where the feature is constant. Shape (C,).
        floor: Number below which the logarithm goes on as a straight line, shape (C,); zero where
            no logarithm is taken.
        linear: Features are linear within this many scales of the median and logarithmic beyond.
    """

    center: Array
    scale: Array
    floor: Array
    linear: float = 3.0

    def __call__(self, x: Obs) -> Array:
        """A batch of observations (B, *event) to features (B, C)."""
        rows = _logarithms(flatten_rows(x), self.floor)
        s = (rows - self.center[None]) / self.scale[None]
        # a finite number over a small scale may overflow; its logarithm does not
        largest = jnp.finfo(s.dtype).max
        s = jnp.clip(s, -largest, largest)
        beyond = jnp.maximum(jnp.abs(s) - self.linear, 0.0)
        return jnp.clip(s, -self.linear, self.linear) + jnp.sign(s) * jnp.log1p(beyond)

    def of(self, places: tuple[int, ...] | None) -> Standardiser:
        """The same for some entries of a flattened observation alone; for all of them if None."""
        if places is None:
            return self
        at = np.asarray(places)
        return Standardiser(self.center[at], self.scale[at], self.floor[at], self.linear)

    def inverse(self, features: Array) -> Array:
        """Features (B, C) to flattened observations (B, C)."""
        beyond = jnp.maximum(jnp.abs(features) - self.linear, 0.0)
        s = jnp.clip(features, -self.linear, self.linear) + jnp.sign(features) * jnp.expm1(beyond)
        rows = s * self.scale[None] + self.center[None]
        return _exponentials(rows, self.floor)


def fit_standardiser(x: Obs) -> Standardiser:
    """Medians and scales of a batch of finite observations (N, *event)."""
    return Standardiser(*_fitted(x))


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


def entry_labels(like: Obs) -> tuple[str, ...]:
    """Names of the entries of a flattened observation, given its shapes (`jax.ShapeDtypeStruct`).

    They are x[0], x[1], ..., or by the keys of a dict; x for a single number.
    """
    names: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "x"
        places = list(np.ndindex(leaf.shape))
        names += [f"{name}[{', '.join(map(str, p))}]" if p else name for p in places]
    return tuple(names)


def _logarithms(rows: Array, floor: Array) -> Array:
    """Logarithms of the columns whose floor is positive, going on as a line below the floor."""
    taken, safe = floor[None] > 0, jnp.where(floor > 0, floor, 1.0)[None]
    logarithms = jnp.log(jnp.maximum(rows, safe)) + jnp.minimum(rows / safe - 1.0, 0.0)
    return jnp.where(taken, logarithms, rows)


def _exponentials(rows: Array, floor: Array) -> Array:
    """The inverse of `_logarithms`."""
    taken, safe = floor[None] > 0, jnp.where(floor > 0, floor, 1.0)[None]
    above = rows - jnp.log(safe)
    large = jnp.exp(jnp.maximum(above, 0.0) + jnp.log(safe))  # the product could overflow
    exponentials = jnp.where(above > 0, large, safe * (1.0 + above))
    return jnp.where(taken, exponentials, rows)


def _floors(rows: Array) -> Array:
    """Half the least number of each column, if all are less skew as logarithms; zero otherwise."""
    least = jnp.min(rows, axis=0)
    tails = jnp.quantile(rows, jnp.asarray([0.01, 0.5, 0.99]), axis=0)
    logarithms = jnp.log(jnp.maximum(tails, jnp.finfo(rows.dtype).tiny))
    # of all columns together: entries of a series or an image stay comparable
    better = jnp.mean(_skewness(logarithms)) < _LESS_SKEW * jnp.mean(_skewness(tails))
    return jnp.where(jnp.all(least > 0) & better, 0.5 * least, 0.0)


def _skewness(tails: Array) -> Array:
    """How far the median (second row) is from halfway between both tails: 0 to 1."""
    low, center, high = tails
    width = jnp.maximum(high - low, jnp.finfo(tails.dtype).tiny)
    return jnp.abs(high + low - 2 * center) / width


@jax.jit
def _fitted(x: Obs) -> tuple[Array, Array, Array]:
    floor = jnp.concatenate([_floors(flatten_rows(leaf)) for leaf in jax.tree.leaves(x)])
    rows = _logarithms(flatten_rows(x), floor)
    low, center, high = jnp.quantile(rows, jnp.asarray([0.25, 0.5, 0.75]), axis=0)
    # the standard deviation of differences from the median, on a scale that cannot overflow
    spread = (high - low) / _NORMAL_IQR
    size = jnp.maximum(jnp.max(jnp.abs(rows - center[None]), axis=0), 1e-30)
    deviation = size * jnp.sqrt(jnp.mean(((rows - center[None]) / size[None]) ** 2, axis=0))
    # differences at the rounding error of the values themselves carry nothing
    least = 1e-6 * jnp.abs(center)
    scale = jnp.where(spread > least, spread, deviation)
    return center, jnp.where(scale > jnp.maximum(least, 1e-30), scale, 1.0), floor

"""Standardisation: map observations to flat feature vectors with a robust location and scale.

Missing entries are NaN in an observation. Their features are zero, and a mask of zeros and ones
follows the features. Entries along a shared axis (pixels, time steps, trials) have one location and
one scale.

Public names: `Standardiser`, `fit_standardiser`, `uncompressed`, `features_of`, `flatten_rows`,
`rows_on_host`, `unflatten_rows`, `entry_labels`, `entry_count`, `NEVER`, `HIDDEN`, `LACKING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.compilation import compiled_per_size
from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.typing import Obs
from sbi_flows.observations.origin import Origin, fit_origin
from sbi_flows.observations.shared import SharedAxes, pool, unpool

Shapes: TypeAlias = tuple[tuple[int, ...], ...]

MAX_SHARED_ENTRIES = 2**23
"""Number of entries of an array with shared axes from which location and scale are computed."""

LINEAR_RANGE = 3.0
"""Number of scales from the median beyond which features are logarithmic."""

NEVER, HIDDEN, LACKING = 0, 1, 2
"""Codes that say whether and why an entry can be missing."""

_NORMAL_IQR = 1.349
_LESS_SKEW = 0.7
"""Logarithms are taken if they reduce the skewness to less than this fraction of its value."""


class Standardiser(NamedTuple):
    """Map from observations to standardised features, with robust location and scale.

    If an array (a leaf of an observation) is positive in all simulations, it is replaced by its
    logarithm when this makes it clearly less skewed. This is decided once for the whole array; for
    an array with shared axes (trials, points, pixels), it is decided for each channel. Heavy tails
    are compressed: the map is linear within `linear` scales of the median and logarithmic beyond.
    It is monotone and loses no information.

    Attributes:
        center: Medians, shape (C,).
        scale: Scale of each feature, shape (C,): the interquartile range divided by 1.349, which
            equals the standard deviation for a normal feature. If the interquartile range is
            zero (sparse counts), the scale is the root mean square deviation from the median. For a
            constant feature it is 1.
        floor: Value below which a straight line replaces the logarithm, shape (C,); zero if no
            logarithm is taken.
        linear: Half-width of the linear range, in units of `scale`.
        origin: Location and scale that are removed first, in double precision; None if the
            observations are in JAX's precision.
        can_miss: Whether each entry can be missing (NaN): `NEVER`, `HIDDEN` (only by the random
            pattern of the fit) or `LACKING` (in simulations), shape (C,); None if observations
            must be complete. If it is not None, features have shape (B, 2 C): the standardised
            entries, zero where missing, then the mask, one where present.
    """

    center: Array
    scale: Array
    floor: Array
    linear: float = LINEAR_RANGE
    origin: Origin | None = None
    can_miss: Array | None = None

    def __call__(self, x: Obs) -> Array:
        """Map a batch of observations (B, *event) to features (B, C), or (B, 2 C) with a mask."""
        rows = flatten_rows(self.subtract_origin(x))
        if self.can_miss is None:
            return self._standardised(rows)
        present = ~jnp.isnan(rows)
        # filled before the arithmetic, so that gradients are finite as well
        s = self._standardised(jnp.where(present, rows, 1.0))
        return jnp.concatenate([jnp.where(present, s, 0.0), present.astype(s.dtype)], axis=-1)

    def _standardised(self, rows: Array) -> Array:
        rows = _logarithms(rows, self.floor)
        s = (rows - self.center[None]) / self.scale[None]
        # a finite number divided by a small scale may overflow
        largest = jnp.finfo(s.dtype).max
        s = jnp.clip(s, -largest, largest)
        beyond = jnp.maximum(jnp.abs(s) - self.linear, 0.0)
        return jnp.clip(s, -self.linear, self.linear) + jnp.sign(s) * jnp.log1p(beyond)

    def log_det(self, x: Obs) -> Array:
        """Compute the log density of x minus that of its features, in nats, shape (B,).

        It is the log absolute determinant of the Jacobian of the map from the present entries of
        x (B, *event) to their features; missing entries do not count.
        """
        rows = flatten_rows(self.subtract_origin(x))
        present = jnp.ones(rows.shape, bool) if self.can_miss is None else ~jnp.isnan(rows)
        rows = jnp.where(present, rows, 1.0)
        safe = jnp.where(self.floor > 0, self.floor, 1.0)[None]
        slope = jnp.where(self.floor[None] > 0, -jnp.log(jnp.maximum(rows, safe)), 0.0)
        s = (_logarithms(rows, self.floor) - self.center[None]) / self.scale[None]
        slope -= jnp.log(self.scale)[None] + jnp.log1p(jnp.maximum(jnp.abs(s) - self.linear, 0.0))
        if self.origin is not None:
            slope -= (math.log(2.0) * self.origin.exponent)[None]
        return jnp.sum(jnp.where(present, slope, 0.0), axis=-1)

    def of(self, places: tuple[int, ...] | None) -> Standardiser:
        """Return the standardiser of the entries with indices `places`; None means all entries."""
        if places is None:
            return self
        at = np.asarray(places)
        origin = None if self.origin is None else self.origin.of(at)
        can_miss = None if self.can_miss is None else self.can_miss[at]
        arrays = self.center[at], self.scale[at], self.floor[at]
        return Standardiser(*arrays, self.linear, origin, can_miss)

    def subtract_origin(self, x: Obs) -> Obs:
        """Subtract the origin from observations (B, *event); the result is in JAX's precision."""
        return x if self.origin is None else self.origin.subtract(x)

    def inverse(self, features: Array) -> Array | np.ndarray:
        """Map features back to flattened observations (B, C); missing entries are NaN.

        With an origin, the result is a NumPy array of float64, unless the features are traced.
        """
        features, mask = jnp.split(features, [len(self.center)], axis=-1)
        s = uncompressed(features, self.linear)
        rows = s * self.scale[None] + self.center[None]
        rows = _exponentials(rows, self.floor)
        rows = rows if self.can_miss is None else jnp.where(mask > 0.5, rows, jnp.nan)
        return rows if self.origin is None else self.origin.restore(rows)


def fit_standardiser(
    x: Obs, shared: SharedAxes | None = None, *, has_missing: bool = False
) -> Standardiser:
    """Fit a standardiser to a batch of observations (N, *event).

    Args:
        x: The observations; finite, except for missing entries, which are NaN.
        shared: For each array, the axes of one observation whose entries have one location and one
            scale; None if each entry has its own.
        has_missing: Whether entries can be missing.
    """
    origin = fit_origin(x, shared)
    relative = x if origin is None else origin.subtract(x)
    *arrays, can_miss = _fitted(relative, shared, has_missing)
    return Standardiser(*arrays, origin=origin, can_miss=can_miss)


def uncompressed(features: Array, linear: Array | float = LINEAR_RANGE) -> Array:
    """Undo the compression of heavy tails; `linear` is that of the standardiser.

    The result is an affine function of the observation, or of its logarithm.
    """
    beyond = jnp.maximum(jnp.abs(features) - linear, 0.0)
    return jnp.clip(features, -linear, linear) + jnp.sign(features) * jnp.expm1(beyond)


def features_of(standardiser: Standardiser, x: Obs) -> Array:
    """Compute the features (B, C) of observations (B, *event) in one compiled program.

    The origin is subtracted from arrays in double precision on the host, because `jax.jit` would
    round them before the subtraction.
    """
    if standardiser.origin is None or is_traced(x):
        return _features(standardiser, x)
    return _features(standardiser._replace(origin=None), standardiser.subtract_origin(x))


def flatten_rows(x: Obs) -> Array:
    """Join all leaves (B, *event) into one floating-point array (B, C)."""
    rows = [jnp.reshape(a, (a.shape[0], -1)) for a in jax.tree.leaves(x)]
    return jnp.concatenate([r.astype(jnp.result_type(float)) for r in rows], axis=-1)


def rows_on_host(x: Obs) -> np.ndarray:
    """Join all leaves (B, *event) into one NumPy array (B, C) of float64."""
    rows = [np.asarray(a, np.float64).reshape(len(a), -1) for a in jax.tree.leaves(x)]
    return np.concatenate(rows, axis=-1)


def unflatten_rows(rows: Array, tree: Any, shapes: Shapes) -> Obs:
    """Split rows (B, C) into a tree of leaves (B, *shape); inverse of `flatten_rows`."""
    parts, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(jnp.reshape(rows[:, start : start + size], (len(rows), *shape)))
        start += size
    return jax.tree.unflatten(tree, parts)


def entry_count(like: Obs) -> int:
    """Return the number C of entries of a flattened observation, given its shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))


def entry_labels(like: Obs) -> tuple[str, ...]:
    """Return a name for each entry of a flattened observation.

    The names are x[0], x[1], ... for an array; x for a single number; and key[0], key[1], ... for
    an array in a dict.

    Args:
        like: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
    """
    names: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "x"
        places = list(np.ndindex(leaf.shape))
        names += [f"{name}[{', '.join(map(str, p))}]" if p else name for p in places]
    return tuple(names)


def _logarithms(rows: Array, floor: Array) -> Array:
    """Take logarithms of columns with a positive floor; below the floor, use a straight line."""
    taken, safe = floor[None] > 0, jnp.where(floor > 0, floor, 1.0)[None]
    logarithms = jnp.log(jnp.maximum(rows, safe)) + jnp.minimum(rows / safe - 1.0, 0.0)
    return jnp.where(taken, logarithms, rows)


def _exponentials(rows: Array, floor: Array) -> Array:
    """Compute the inverse of `_logarithms`."""
    taken, safe = floor[None] > 0, jnp.where(floor > 0, floor, 1.0)[None]
    above = rows - jnp.log(safe)
    large = jnp.exp(jnp.maximum(above, 0.0) + jnp.log(safe))  # the product could overflow
    exponentials = jnp.where(above > 0, large, safe * (1.0 + above))
    return jnp.where(taken, exponentials, rows)


def _floors(
    rows: Array,
    is_empty: Array,
    minimum: Callable[..., Array],
    quantile: Callable[..., Array],
    *,
    per_column: bool,
) -> Array:
    """Choose whether to take logarithms of one array, given as rows (N, C).

    Args:
        rows: The array.
        is_empty: Whether a column has no present entry; it does not influence the choice.
        minimum: Function such as `jnp.min`, which may ignore missing entries.
        quantile: Function such as `jnp.quantile`, which may ignore missing entries.
        per_column: Whether to choose for each column, rather than once for all columns, which keeps
            them comparable.

    Returns:
        Floor of each column, shape (C,): half the minimum of the column if logarithms are to be
        taken, otherwise zero.
    """
    least = minimum(rows, axis=0)
    tails = quantile(rows, jnp.asarray([0.01, 0.5, 0.99]), axis=0)
    logarithms = jnp.log(jnp.maximum(tails, jnp.finfo(rows.dtype).tiny))
    before, after = (jnp.where(is_empty, 0.0, _skewness(t)) for t in (tails, logarithms))
    is_positive = (least > 0) | is_empty
    if not per_column:
        before, after, is_positive = jnp.mean(before), jnp.mean(after), jnp.all(is_positive)
    better = after < _LESS_SKEW * before
    return jnp.where(is_positive & better & ~is_empty, 0.5 * least, 0.0)


def _skewness(tails: Array) -> Array:
    """Compute skewness in [0, 1] from the 1%, 50% and 99% quantiles, `tails` of shape (3, C)."""
    low, center, high = tails
    width = jnp.maximum(high - low, jnp.finfo(tails.dtype).tiny)
    return jnp.abs(high + low - 2 * center) / width


@compiled_per_size
@jax.jit
@full_precision
def _features(standardiser: Standardiser, x: Obs) -> Array:
    return standardiser(x)


@compiled_per_size
@partial(jax.jit, static_argnums=(1, 2))
def _fitted(
    x: Obs, shared: SharedAxes | None, has_missing: bool
) -> tuple[Array, Array, Array, Array | None]:
    """Return center, scale, floor and, with missing entries, `can_miss`, shape (C,) each."""
    leaves = jax.tree.leaves(x)
    axes = ((),) * len(leaves) if shared is None else shared
    parts = [_fitted_leaf(leaf, own, has_missing) for leaf, own in zip(leaves, axes, strict=True)]
    joined = tuple(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    center, scale, floor, can_miss = joined
    return center, scale, floor, can_miss if has_missing else None


def _fitted_leaf(
    leaf: Array, shared: tuple[int, ...], has_missing: bool
) -> tuple[Array, Array, Array, Array]:
    """Fit one array (N, *event); return center, scale, floor and `can_miss`, flattened to (C,)."""
    pooled = pool(leaf, shared)
    rows = pooled[: max(MAX_SHARED_ENTRIES // pooled.shape[1], len(leaf))]
    rows = rows.astype(jnp.result_type(float))
    fitted = _location_and_scale(rows, has_missing, per_column=bool(shared))
    codes = jnp.where(jnp.any(jnp.isnan(pooled), axis=0), LACKING, NEVER).astype(jnp.uint8)
    center, scale, floor, can_miss = (
        unpool(columns, leaf.shape[1:], shared) for columns in (*fitted, codes)
    )
    return center, scale, floor, can_miss


def _location_and_scale(
    rows: Array, has_missing: bool, *, per_column: bool
) -> tuple[Array, Array, Array]:
    """Return center, scale and floor (C,) of rows (N, C); NaN is missing if `has_missing`.

    For `per_column`, see `_floors`.
    """
    quantile, mean = (jnp.nanquantile, jnp.nanmean) if has_missing else (jnp.quantile, jnp.mean)
    least, most = (jnp.nanmin, jnp.nanmax) if has_missing else (jnp.min, jnp.max)
    is_empty = jnp.zeros(rows.shape[1], bool)
    if has_missing:  # an entry that is never present gets location 0 and scale 1
        is_empty = jnp.all(jnp.isnan(rows), axis=0)
        rows = jnp.where(is_empty[None], 0.0, rows)
    floor = _floors(rows, is_empty, least, quantile, per_column=per_column)
    rows = _logarithms(rows, floor)
    low, center, high = quantile(rows, jnp.asarray([0.25, 0.5, 0.75]), axis=0)
    # root mean square deviation from the median, scaled so that it cannot overflow
    spread = (high - low) / _NORMAL_IQR
    smallest = 8.0 * jnp.finfo(rows.dtype).tiny
    size = jnp.maximum(most(jnp.abs(rows - center[None]), axis=0), smallest)
    deviation = size * jnp.sqrt(mean(((rows - center[None]) / size[None]) ** 2, axis=0))
    # differences as small as the rounding error of the values carry no information
    bound = 1e-6 * jnp.abs(center)
    scale = jnp.where(spread > bound, spread, deviation)
    return center, jnp.where(scale > jnp.maximum(bound, smallest), scale, 1.0), floor

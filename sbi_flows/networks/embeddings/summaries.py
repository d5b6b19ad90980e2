"""Fixed summaries of sets, series and images with missing entries.

Summaries are not learned. Each is passed through scale * arcsinh(x / scale), which is linear for
small numbers and logarithmic for large ones. All are finite, also if no entry is present. Groups of
summaries are taken in the order of their importance. A group that would exceed `MAX_SUMMARIES` in
total is replaced by a smaller one or by projections, if there are any, or left out.

Public names: `LINEAR`, `LOGARITHMIC`, `Statistic`, `set_statistics`, `series_statistics`,
`grid_statistics`, `labels_of`, `evaluate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.networks.embeddings.base import (
    MAX_SUMMARIES,
    any_present,
    fill,
    log_count,
    masked_mean,
    own_scale,
    project,
    soft_clip,
)
from sbi_flows.networks.embeddings.spectrum import (
    bin_edges,
    coarse_means,
    log_power,
    log_scaled,
)

_LAGS = (1, 2, 3, 5, 8, 13, 21, 34)
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Levels of quantiles; the extremes locate the ends of a support, such as a shortest time."""
_SHAPE_QUANTILES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
"""Levels of quantiles that show the shape of a distribution."""
_MANY = 500
"""Number of elements from which the shape of a distribution is well known."""
_SMALLEST_WIDTH = 1e-3
"""Added to the interquartile range, so that relative quantiles are finite."""
_LOG_SQUARE = "log squared deviation"
_SMALLEST_SQUARE = 1e-2
"""Added to squared deviations before the logarithm, so that values near the mean count little."""
_MOMENTS = ("mean", "mean square", "mean cube")
PROJECTIONS = 24
"""Number of directions onto which the moments of many columns are projected."""

_COARSE = {1: (8, 4, 2), 2: (4, 2), 3: (2,)}
"""Numbers of cells along each axis of the coarse version of a grid, by the number of axes."""

_BINS = {1: 16, 2: 20, 3: 12}
"""Maximum number of bins of the power spectrum, by the number of axes."""
_MAX_COLUMNS_OF_PRODUCTS = 8

LINEAR, LOGARITHMIC = 5.0, 1.0
"""Scales of `Statistic`: for locations and logarithms, and for powers and products."""

_MAX_VALUE = 1e4
"""Magnitude at which standardised values are clipped, so that their cubes do not overflow."""

Compute = Callable[[Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A group of summaries.

    Attributes:
        labels: Name of each summary.
        compute: Function that maps arrays (B, *grid, C), with zeros at missing entries, and their
            mask to (B, len(labels)).
        scale: Magnitude beyond which values enter logarithmically.
    """

    labels: tuple[str, ...]
    compute: Compute
    scale: float = LINEAR


def labels_of(statistics: Sequence[Statistic]) -> tuple[str, ...]:
    """Return the names of all summaries."""
    return tuple(label for statistic in statistics for label in statistic.labels)


def evaluate(statistics: Sequence[Statistic], x: Array, mask: Array | None) -> Array:
    """Compute all summaries.

    Args:
        statistics: Groups of summaries.
        x: Standardised observations (B, *grid, C), without compression of heavy tails.
        mask: Mask of the same shape, or None.

    Returns:
        Summaries (B, K).
    """
    x = fill(jnp.clip(x, -_MAX_VALUE, _MAX_VALUE), mask)
    values = [
        soft_clip(s.compute(x, mask).reshape(x.shape[0], len(s.labels)), s.scale)
        for s in statistics
    ]
    return jnp.concatenate(values, axis=1)


def set_statistics(shape: tuple[int, ...]) -> list[Statistic]:
    """Return the summaries of a set (n, C); they do not depend on the order of its elements."""
    columns = shape[-1]
    moments = [_moments(power, columns) for power in (1, 2, 3)]
    groups = [
        [_count()],
        *moments[:2],
        [_log_variance(columns)],
        [_products(columns)],
        [_quantiles(columns)],
        moments[2],
        [_shape(columns)] if shape[0] >= _MANY else [],
    ]
    return _choose(groups)


def series_statistics(shape: tuple[int, ...]) -> list[Statistic]:
    """Return the summaries of a series (T, C)."""
    length, columns = shape
    shorter = [lag for lag in _LAGS if lag < length]
    later = [[_lagged(0, lag, f"log variogram lag {lag}", columns)] for lag in shorter[1:]]
    lags = [[_successive(columns)], *later] if shorter else []
    of_squares = [
        [_lagged(0, lag, f"log variogram of {_LOG_SQUARE}, lag {lag}", columns, _log_square)]
        for lag in shorter
    ]
    curvature = [[_second_difference(columns)]] if length > 2 else []
    groups = [
        [_count()],
        *(_moments(power, columns) for power in (1, 2)),
        [_log_variance(columns)],
        *curvature,
        *lags[:3],
        _spectra(shape),
        _moments(3, columns),
        _coarse(shape),
        [_products(columns)],
        *lags[3:],
        [_log_squares(columns)],
        *of_squares,
    ]
    return _choose(groups)


def grid_statistics(shape: tuple[int, ...]) -> list[Statistic]:
    """Return the summaries of an array on a grid, (*grid, C)."""
    columns, grid = shape[-1], shape[:-1]
    neighbours = [
        [_lagged(axis, 1, f"log variogram axis {axis}", columns)]
        for axis, n in enumerate(grid)
        if n > 1
    ]
    moments = [_moments(power, columns) for power in (1, 2, 3)]
    variance = [_log_variance(columns)]
    groups = [[_count()], *moments, variance, *neighbours, _spectra(shape), _coarse(shape)]
    return _choose(groups)


def _choose(groups: Sequence[Sequence[Statistic]]) -> list[Statistic]:
    """Take from each group the first alternative that fits into the rest of the budget."""
    chosen, budget = [], MAX_SUMMARIES
    for group in groups:
        fitting = [s for s in group if 0 < len(s.labels) <= budget]
        chosen += fitting[:1]
        budget -= len(fitting[0].labels) if fitting else 0
    return chosen


def _moments(power: int, columns: int) -> list[Statistic]:
    """Moments of the columns or, for many columns, projections of the moments."""
    moment = _moment(power, columns)
    return [moment, _projected(moment)] if power < 3 else [moment]


def _projected(statistic: Statistic) -> Statistic:
    """Project the summaries of many columns onto fixed random directions."""
    columns = len(statistic.labels)
    name = statistic.labels[0].removesuffix("[0]")

    def compute(x: Array, mask: Array | None) -> Array:
        values = statistic.compute(x, mask).reshape(x.shape[0], columns)
        return project(values, PROJECTIONS)

    labels = tuple(f"{name}, projection {i}" for i in range(PROJECTIONS))
    return Statistic(labels, compute, statistic.scale)


def _named(name: str, columns: int) -> tuple[str, ...]:
    return tuple(f"{name}[{i}]" for i in range(columns)) if columns > 1 else (name,)


def _grid(x: Array) -> tuple[int, ...]:
    """Return the axes of the grid of an array (B, *grid, C)."""
    return tuple(range(1, x.ndim - 1))


def _count() -> Statistic:
    def compute(x: Array, mask: Array | None) -> Array:
        return log_count(x, any_present(mask, x.ndim - 1))

    return Statistic(("n",), compute)


def _moment(power: int, columns: int) -> Statistic:
    def compute(x: Array, mask: Array | None) -> Array:
        return masked_mean(x**power, mask, _grid(x))

    scale = LINEAR if power == 1 else LOGARITHMIC
    return Statistic(_named(_MOMENTS[power - 1], columns), compute, scale)


def _log_variance(columns: int) -> Statistic:
    """Variance of each column, on a logarithmic scale."""

    def compute(x: Array, mask: Array | None) -> Array:
        deviations = _deviations(x, mask)
        return log_scaled(masked_mean(deviations**2, mask, _grid(x)))

    return Statistic(_named("log variance", columns), compute)


def _products(columns: int) -> Statistic:
    """Mean products of each pair of columns, over the points where both are present."""
    is_small = columns <= _MAX_COLUMNS_OF_PRODUCTS
    pairs = [(i, j) for i in range(columns) for j in range(i)] if is_small else []

    def compute(x: Array, mask: Array | None) -> Array:
        first, second = (jnp.asarray(side) for side in zip(*pairs, strict=True))
        both = None if mask is None else mask[..., first] & mask[..., second]
        return masked_mean(x[..., first] * x[..., second], both, _grid(x))

    return Statistic(tuple(f"mean product[{j}, {i}]" for i, j in pairs), compute, LOGARITHMIC)


def _quantiles(columns: int) -> Statistic:
    extremes = {0.0: "minimum", 1.0: "maximum"}
    names = [_named(extremes.get(q, f"quantile {q}"), columns) for q in _QUANTILES]
    return Statistic(tuple(name for each in names for name in each), _masked_quantiles)


def _shape(columns: int) -> Statistic:
    """Interquartile range as a logarithm, and quantiles relative to it and to the median."""
    levels = (0.25, 0.5, 0.75, *_SHAPE_QUANTILES)

    def compute(x: Array, mask: Array | None) -> Array:
        low, centre, high, *others = jnp.moveaxis(_masked_quantiles(x, mask, levels), 1, 0)
        width = high - low
        relative = [(q - centre) / (width + _SMALLEST_WIDTH) for q in others]
        # tails enter logarithmically
        return jnp.stack([log_scaled(width**2), *(soft_clip(r) for r in relative)], axis=1)

    names = ["log interquartile range", *(f"relative quantile {q}" for q in _SHAPE_QUANTILES)]
    return Statistic(tuple(label for name in names for label in _named(name, columns)), compute)


def _masked_quantiles(x: Array, mask: Array | None, levels: Sequence[float] = _QUANTILES) -> Array:
    """Compute quantiles (B, Q, C) over axis 1 of the present entries; zeros if there are none."""
    if mask is None:
        mask = jnp.ones((1, *x.shape[1:]), bool)
    ordered = jnp.sort(jnp.where(mask, x, jnp.full_like(x, _MAX_VALUE)), axis=1)
    count = jnp.sum(mask, axis=1, keepdims=True)
    last = jnp.maximum(count - 1, 0)
    position = jnp.asarray(levels, x.dtype)[None, :, None] * last.astype(x.dtype)
    position = jnp.broadcast_to(position, (x.shape[0], *position.shape[1:]))
    lower = jnp.floor(position).astype(last.dtype)
    upper = jnp.minimum(lower + 1, last)
    below, above = (jnp.take_along_axis(ordered, index, axis=1) for index in (lower, upper))
    return fill(below + (position - lower.astype(x.dtype)) * (above - below), count > 0)


def _lagged(
    axis: int, lag: int, name: str, columns: int, transform: Compute = lambda x, mask: x
) -> Statistic:
    """Mean square difference of points that are `lag` apart, relative to the variance, as a log.

    It resolves correlations near 1, and uses all pairs in which both points are present.
    `transform` is applied to the points first.
    """

    def compute(x: Array, mask: Array | None) -> Array:
        standard = own_scale(transform(x, mask), mask, _grid(x))
        difference = _shifted(standard, axis, lag, lag) - _shifted(standard, axis, 0, lag)
        both = None
        if mask is not None:
            both = _shifted(mask, axis, 0, lag) & _shifted(mask, axis, lag, lag)
        return log_scaled(masked_mean(difference**2, both, _grid(x)))

    return Statistic(_named(name, columns), compute)


def _log_square(x: Array, mask: Array | None) -> Array:
    """Logarithm of the squared deviation from the mean, relative to the variance."""
    return jnp.log(own_scale(x, mask, _grid(x)) ** 2 + _SMALLEST_SQUARE)


def _log_squares(columns: int) -> Statistic:
    """Mean and log variance of log squared deviations, which show changes of the variance."""

    def compute(x: Array, mask: Array | None) -> Array:
        values = _log_square(x, mask)
        variance = masked_mean(_deviations(values, mask) ** 2, mask, _grid(x))
        return jnp.stack([masked_mean(values, mask, _grid(x)), log_scaled(variance)], axis=1)

    names = _named(f"mean {_LOG_SQUARE}", columns) + _named(
        f"log variance of {_LOG_SQUARE}", columns
    )
    return Statistic(names, compute)


def _successive(columns: int) -> Statistic:
    """Mean squared difference of successive present points, divided by their distance, as a log.

    Without gaps it is the variogram at lag 1. With gaps it also uses pairs across gaps.
    """
    neighbours = _lagged(0, 1, "log variogram of successive points", columns)

    def compute(x: Array, mask: Array | None) -> Array:
        if mask is None:
            return neighbours.compute(x, mask)
        standard, place = own_scale(x, mask, (1,)), jnp.arange(x.shape[1])[None, :, None]
        last = jax.lax.cummax(jnp.where(mask, place, -1), axis=1)
        previous = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-1)
        both = mask & (previous >= 0)
        before = jnp.take_along_axis(standard, jnp.maximum(previous, 0), axis=1)
        distance = jnp.where(both, place - previous, 1).astype(x.dtype)
        return log_scaled(masked_mean((standard - before) ** 2 / distance, both, 1))

    return dataclasses.replace(neighbours, compute=compute)


def _shifted(x: Array, axis: int, start: int, lag: int) -> Array:
    """Return the part of an axis of the grid that starts at `start` and is `lag` points shorter."""
    index = [slice(None)] * x.ndim
    index[axis + 1] = slice(start, start + x.shape[axis + 1] - lag)
    return x[tuple(index)]


def _deviations(x: Array, mask: Array | None) -> Array:
    """Subtract the mean of the present entries; missing entries stay zero."""
    return fill(x - masked_mean(x, mask, _grid(x), keepdims=True), mask)


def _second_difference(columns: int) -> Statistic:
    """Mean square of the second differences of a series, on a logarithmic scale."""

    def compute(x: Array, mask: Array | None) -> Array:
        for _ in range(2):
            x = _shifted(x, 0, 1, 1) - _shifted(x, 0, 0, 1)
            if mask is not None:
                mask = _shifted(mask, 0, 1, 1) & _shifted(mask, 0, 0, 1)
        return log_scaled(masked_mean(x**2, mask, 1))

    return Statistic(_named("log mean square second difference", columns), compute)


def _spectra(shape: tuple[int, ...]) -> list[Statistic]:
    """Power spectra, from many bins to few."""
    most = min(_BINS[len(shape) - 1], MAX_SUMMARIES // (2 * shape[-1]))
    return [_spectrum(shape, bins) for bins in (most, most // 2, most // 4)]


def _spectrum(shape: tuple[int, ...], bins: int) -> Statistic:
    """Logarithm of the power in bins of the frequency; missing entries count as the mean."""
    columns, grid = shape[-1], shape[:-1]
    edges = bin_edges(grid, bins)

    def compute(x: Array, mask: Array | None) -> Array:
        present = jnp.ones((1,) * x.ndim, x.dtype) if mask is None else mask.astype(x.dtype)
        fraction = jnp.mean(present, axis=_grid(x))
        return log_power(_deviations(x, mask), edges, fraction)

    names = [_named(f"spectrum {i}", columns) for i in range(len(edges))]
    return Statistic(tuple(name for each in names for name in each), compute)


def _coarse(shape: tuple[int, ...]) -> list[Statistic]:
    """Means over the cells of a coarse grid, in several resolutions from fine to coarse."""
    columns, grid = shape[-1], shape[:-1]
    return [_cells(tuple(min(k, n) for n in grid), columns) for k in _COARSE[len(grid)]]


def _cells(counts: tuple[int, ...], columns: int) -> Statistic:
    def compute(x: Array, mask: Array | None) -> Array:
        return coarse_means(x, mask, counts)

    cells = [()]
    for n in counts:
        cells = [(*cell, i) for cell in cells for i in range(n)]
    names = [_named(f"cell {' '.join(map(str, cell))}", columns) for cell in cells]
    return Statistic(tuple(name for each in names for name in each), compute)

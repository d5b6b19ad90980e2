"""Quantised observations, such as counts: add uniform noise, and round back to the grid.

Public names: `Grid`, `find_grid`, `dequantised`, `quantised`.

Source of the noise: Uria et al. 2013, "RNADE" (arXiv:1306.0186).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key

MAX_STEPS = 2**16
"""Maximum range of a grid in steps; beyond it, rounding makes any numbers look like a grid."""

ATOM = 0.01
"""The lowest (highest) value is a limit if at least this fraction of the rows is equal to it."""


class Grid(NamedTuple):
    """Grid of each column: values origin + k * step for integers k. All arrays have shape (C,).

    Attributes:
        step: Distance between values; zero for a continuous column, infinite for a constant one.
        origin: Lowest value in the column.
        low: Lower limit: the lowest value if many rows are equal to it; otherwise the first
            non-negative grid value if no value is negative; otherwise -inf.
        high: Upper limit: the highest value if many rows are equal to it, otherwise inf.
    """

    step: Array
    origin: Array
    low: Array
    high: Array


def find_grid(x: np.ndarray) -> Grid:
    """Find the grid of each column of x (N, C), which must be finite.

    Example:
        >>> import numpy as np
        >>> x = np.stack([[0.0, 5.0, 10.0, 10.0], [0.1, 0.27, 0.31, 0.4], [3.0, 3.0, 3.0, 3.0]], 1)
        >>> find_grid(x).step
        Array([ 5.,  0., inf], dtype=float32)
    """
    columns = [_column(values) for values in x.T]
    dtype = jnp.result_type(float)
    return Grid(*(jnp.asarray(np.array(part), dtype) for part in zip(*columns, strict=True)))


def _column(values: np.ndarray) -> tuple[float, float, float, float]:
    distinct, counts = np.unique(values.astype(float), return_counts=True)
    origin, span = distinct[0], distinct[-1] - distinct[0]
    if span == 0:
        return np.inf, origin, origin, origin
    step = np.diff(distinct).min()
    places = (distinct - origin) / step
    regular = np.max(np.abs(places - np.round(places))) < 0.01
    if len(distinct) == len(values) or span / step > MAX_STEPS or not regular:
        return 0.0, origin, -np.inf, np.inf
    low, high = (counts[i] >= ATOM * len(values) for i in (0, -1))
    # the lowest non-negative value of the grid
    least = origin - step * np.floor(origin / step + 0.01) if origin >= 0 else -np.inf
    return step, origin, origin if low else least, distinct[-1] if high else np.inf


def dequantised(grid: Grid, key: Key, x: Array) -> Array:
    """Add uniform noise of width `step` to rows (N, C); constant columns are not changed."""
    noise = jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)
    return x + noise * jnp.where(jnp.isinf(grid.step), 0.0, grid.step)[None]


def quantised(grid: Grid, x: Array) -> Array:
    """Round rows (N, C) to the grid within its limits; continuous columns are not changed."""
    stepped = (grid.step > 0) & jnp.isfinite(grid.step)
    step = jnp.where(stepped, grid.step, 1.0)[None]
    origin = grid.origin[None]
    rounded = origin + step * jnp.round((x - origin) / step)
    rounded = jnp.clip(rounded, grid.low[None], grid.high[None])
    fixed = jnp.where(jnp.isinf(grid.step)[None], origin, x)
    return jnp.where(stepped[None], rounded, fixed)

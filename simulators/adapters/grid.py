"""Draws from a density of two parameters by an adaptive grid.

Public names: `sample_grid`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from sbi_flows.core.typing import Key

CELLS = 128
"""Number of cells along each axis."""
ROUNDS = 4
MAX_LOG_RATIO = 16.0
"""Cells whose density is exp(-16) of the largest one or less are left out of the next grid."""


def sample_grid(
    key: Key, log_density: Callable[[Array], Array], low: Array, high: Array, n: int
) -> Array:
    """Draw from a density on a rectangle by an adaptive grid of 128 x 128 cells.

    The first grid covers the rectangle. Each of the next three grids covers the region in which the
    density is not negligible. Each draw is uniform within a cell of the last grid, and the cell's
    probability is proportional to the density at its centre. For a Gaussian density a cell is about
    0.1 standard deviations wide, so that variances are too large by about 1e-3.

    The density should have one mode, and not be narrower than a cell of the first grid.

    Args:
        key: Random key.
        log_density: Function of a vector (2,) that returns the log density up to a constant.
        low: Lower corner of the rectangle, shape (2,).
        high: Upper corner of the rectangle, shape (2,).
        n: Number of draws.

    Returns:
        Draws, shape (n, 2).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> normal = lambda theta: -0.5 * jnp.sum((theta / 0.1) ** 2)
        >>> draws = sample_grid(jax.random.key(0), normal, -jnp.ones(2), jnp.ones(2), 10_000)
        >>> print((100 * draws.std(axis=0)).round())
        [10. 10.]
    """

    def zoom(_: Array, corners: tuple[Array, Array]) -> tuple[Array, Array]:
        return _zoom(log_density, low, high, corners)

    first, last = lax.fori_loop(0, ROUNDS - 1, zoom, (low, high))
    cell_key, jitter_key = jax.random.split(key)
    density = _densities(log_density, first, last)
    cumulative = jnp.cumsum(jnp.exp(jnp.ravel(density - jnp.max(density))))
    level = cumulative[-1] * jax.random.uniform(cell_key, (n,))
    cell = jnp.minimum(jnp.searchsorted(cumulative, level, side="right"), CELLS**2 - 1)
    index = jnp.stack(jnp.divmod(cell, CELLS), axis=-1)
    place = (index + jax.random.uniform(jitter_key, (n, 2))) / CELLS
    return first[None] + place * (last - first)[None]


def _densities(log_density: Callable[[Array], Array], first: Array, last: Array) -> Array:
    """Compute the log densities at the centres of all cells, shape (CELLS, CELLS)."""
    middle = (jnp.arange(CELLS) + 0.5) / CELLS
    axes = first[None] + middle[:, None] * (last - first)[None]

    def row(a: Array) -> Array:
        return jax.vmap(lambda b: log_density(jnp.stack([a, b])))(axes[:, 1])

    return lax.map(row, axes[:, 0])


def _zoom(
    log_density: Callable[[Array], Array], low: Array, high: Array, corners: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Return the corners of the region with non-negligible density, with a margin of one cell."""
    first, last = corners
    density = _densities(log_density, first, last)
    is_high = density > jnp.max(density) - MAX_LOG_RATIO
    width = (last - first) / CELLS
    lower, upper = [], []
    for axis in (0, 1):
        is_kept = jnp.any(is_high, axis=1 - axis)
        lower.append(jnp.argmax(is_kept) - 1)
        upper.append(CELLS - jnp.argmax(is_kept[::-1]) + 1)
    start, end = first + width * jnp.stack(lower), first + width * jnp.stack(upper)
    return jnp.maximum(start, low), jnp.minimum(end, high)

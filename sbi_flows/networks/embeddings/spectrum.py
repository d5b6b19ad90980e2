"""Power spectra and coarse versions of arrays on a regular grid.

Public names: `log_scaled`, `bin_edges`, `log_power`, `coarse_means`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_LOG_FLOOR = 1e-6
_LOG_SCALE = 2.0


def log_scaled(power: Array) -> Array:
    """Compute log(power + 1e-6) / 2: finite, and of order one for standardised observations."""
    return jnp.log(power + _LOG_FLOOR) / _LOG_SCALE


def bin_edges(grid: tuple[int, ...], bins: int) -> np.ndarray:
    """Return the lower edges of logarithmic bins of the frequency, ascending, shape (K,).

    The frequency of a Fourier mode is the length of its wave vector, in cycles per grid point. The
    bins cover frequencies from one cycle per longest axis on; the last bin includes all higher
    ones. Each bin contains a mode along the longest axis.

    Args:
        grid: Shape of the grid.
        bins: Maximum number of bins.
    """
    longest = max(grid)
    frequencies = np.arange(1, longest // 2 + 1) / longest
    if not bins or not frequencies.size:
        return np.zeros(0)
    edges = np.geomspace(1.0 / longest, 0.5, bins + 1)[:-1] * (1.0 - 1e-9)
    return edges[np.unique(_bin_of(frequencies, edges))]


def _bin_of(frequencies: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(edges, frequencies, side="right") - 1, 0)


def _bins_of_modes(grid: tuple[int, ...], edges: np.ndarray) -> np.ndarray:
    """Return the bin of each mode of `jnp.fft.rfftn`; K, the number of bins, for the mean."""
    axes = [np.fft.fftfreq(n) for n in grid[:-1]] + [np.fft.rfftfreq(grid[-1])]
    squares = np.zeros(())
    for axis in axes:
        squares = np.add.outer(squares, axis**2)
    frequency = np.sqrt(squares.reshape(-1))
    return np.where(frequency > 0.0, _bin_of(frequency, edges), len(edges)).astype(np.int32)


def log_power(x: Array, edges: np.ndarray, fraction: Array) -> Array:
    """Compute the logarithm of the mean power in each bin of the frequency.

    White noise of variance 1 has power 1 at each frequency, also if entries are missing.

    Args:
        x: Array (B, *grid, C), with zeros at missing entries.
        edges: Lower edges of the K bins, from `bin_edges`.
        fraction: Fraction of entries that are present, shape (1 or B, 1 or C).

    Returns:
        Array (B, K, C), divided by 2 so that it is of order one.
    """
    grid = x.shape[1:-1]
    modes = jnp.fft.rfftn(x, axes=tuple(range(1, x.ndim - 1)))
    power = modes.real**2 + modes.imag**2
    power = power.reshape(x.shape[0], math.prod(modes.shape[1:-1]), x.shape[-1])
    index = _bins_of_modes(grid, edges)
    sums = jax.ops.segment_sum(jnp.moveaxis(power, 1, 0), jnp.asarray(index), len(edges) + 1)
    counts = np.bincount(index, minlength=len(edges) + 1) * math.prod(grid)
    means = jnp.moveaxis(sums[:-1], 0, 1) / jnp.asarray(counts[None, :-1, None], x.dtype)
    count = jnp.maximum(fraction, 0.1 / math.prod(grid))[:, None, :]
    return log_scaled(means / count)


def coarse_means(x: Array, mask: Array | None, counts: tuple[int, ...]) -> Array:
    """Average present entries over the cells of a coarse grid; an empty cell has mean zero.

    Args:
        x: Array (B, *grid, C), with zeros at missing entries.
        mask: Mask of the same shape, or None.
        counts: Number of cells along each axis; at most the number of grid points.

    Returns:
        Array (B, *counts, C).
    """
    weights = jnp.ones((1, *x.shape[1:]), x.dtype) if mask is None else mask.astype(x.dtype)
    return _cell_sums(x, counts) / jnp.maximum(_cell_sums(weights, counts), 1.0)


def _cell_sums(x: Array, counts: tuple[int, ...]) -> Array:
    for axis, count in enumerate(counts, start=1):
        n = x.shape[axis]
        cells = np.arange(n) * count // n
        members = jnp.asarray(cells[:, None] == np.arange(count)[None, :], x.dtype)
        x = jnp.moveaxis(jnp.tensordot(x, members, axes=((axis,), (0,))), -1, axis)
    return x

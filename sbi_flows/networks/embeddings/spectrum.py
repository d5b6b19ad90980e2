"""Power spectra and coarse versions of arrays on a regular grid.

Public names: `frequency_bins`, `log_power`, `coarse_means`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

_LOG_FLOOR = 1e-6
_LOG_SCALE = 4.0


def frequency_bins(grid: tuple[int, ...], bins: int) -> np.ndarray:
    """Return the averaging weights of logarithmic bins of the frequency.

    The frequency of a Fourier mode is the length of its wave vector, in cycles per grid point. The
    bins cover frequencies from one cycle per longest axis to 1/2; the last bin includes all higher
    ones. Bins without modes are left out.

    Args:
        grid: Shape of the grid.
        bins: Maximum number of bins.

    Returns:
        Weights (modes, bins), with one row for each mode of `jnp.fft.rfftn`.
    """
    axes = [np.fft.fftfreq(n) for n in grid[:-1]] + [np.fft.rfftfreq(grid[-1])]
    squares = [axis**2 for axis in np.meshgrid(*axes, indexing="ij")]
    frequency = np.sqrt(sum(squares)).reshape(-1)
    lowest = 1.0 / max(2, *grid, 2)
    edges = np.geomspace(lowest, 0.5, bins + 1) if bins else np.array([lowest])
    index = np.searchsorted(edges * (1.0 - 1e-9), frequency, side="right") - 1
    index = np.where(frequency > 0.0, np.clip(index, 0, bins - 1), -1)
    members = [index == i for i in range(bins)]
    weights = [member / member.sum() for member in members if member.any()]
    return np.stack(weights, axis=-1) if weights else np.zeros((frequency.size, 0))


def log_power(x: Array, bins: np.ndarray, fraction: Array) -> Array:
    """Compute the logarithm of the mean power in each bin of the frequency.

    White noise of variance 1 has power 1 at each frequency, also if entries are missing.

    Args:
        x: Array (B, *grid, C), with zeros at missing entries.
        bins: Weights of the modes in each bin, from `frequency_bins`.
        fraction: Fraction of entries that are present, shape (1 or B, 1 or C).

    Returns:
        Array (B, bins, C), divided by 4 so that it is of order one.
    """
    axes = tuple(range(1, x.ndim - 1))
    modes = jnp.fft.rfftn(x, axes=axes)
    power = (modes.real**2 + modes.imag**2).reshape(x.shape[0], len(bins), x.shape[-1])
    power = power / math.prod(x.shape[1:-1])
    means = jnp.einsum("bfc,fk->bkc", power, jnp.asarray(bins, x.dtype))
    count = jnp.maximum(fraction, 0.1 / math.prod(x.shape[1:-1]))[:, None, :]
    return jnp.log(means / count + _LOG_FLOOR) / _LOG_SCALE


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

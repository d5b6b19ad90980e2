"""Arrays in double precision on the host, for values that single precision cannot represent.

By default JAX computes in single precision (float32). A Julian date such as 2459000.54 would be
rounded to a quarter of a day, and 1e39 would become infinite. An array of such values stays a NumPy
array of float64 until a location is subtracted and the result is divided by a scale. If
`jax_enable_x64` is set, all arrays are JAX arrays.

Public names: `is_single_precision`, `is_double`, `needs_double`, `as_data_array`.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_array, as_real_array, require_real

MAX_ROUNDING = 1e-3
"""Maximum rounding error of single precision, in units of the interquartile range of a column."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Range of absolute values whose squares and quotients do not overflow or vanish in float32."""

LARGE = 1e5
"""Size from which values without a spread are kept exactly."""

HALF_ULP = 2.0**-24
"""Largest relative rounding error of single precision."""

_MAX_ROWS, _MAX_SAMPLE_ENTRIES = 4096, 2**20


def is_single_precision() -> bool:
    """Return whether JAX computes in single precision, which is the default."""
    return jnp.result_type(float) == np.float32


def is_double(array: Any) -> bool:
    """Return whether an array is a NumPy array of float64 that JAX would round to float32."""
    return isinstance(array, np.ndarray) and array.dtype == np.float64 and is_single_precision()


def needs_double(rows: np.ndarray) -> bool:
    """Return whether rounding the rows (N, ...) of an array to float32 loses information.

    The result is True if the rounding error of a column exceeds `MAX_ROUNDING` times its
    interquartile range, or if absolute values are outside `SMALLEST` to `LARGEST`. The range is
    estimated from evenly spaced rows. In a column of equal values, a value above `LARGE` must be
    exact.

    Example:
        >>> needs_double(2459000.5 + np.arange(8.0)[:, None] / 10)
        True
        >>> needs_double(np.arange(8.0)[:, None] / 10)
        False
    """
    if rows.ndim < 1 or not rows.size:
        return False
    width = rows.size // len(rows)
    step = -(-len(rows) // max(32, min(_MAX_ROWS, _MAX_SAMPLE_ENTRIES // width)))
    sample = np.asarray(rows[::step], np.float64)
    sample = sample.reshape(len(sample), width)
    finite = np.isfinite(sample)
    size = np.max(np.abs(np.where(finite, sample, 0.0)), axis=0)
    if np.any((size > 0) & (size < SMALLEST)) or _exceeds(rows, LARGEST):
        return True
    spread = _interquartile_range(sample, finite)
    is_rounded = (HALF_ULP / MAX_ROUNDING) * size > spread
    # without a spread (in a single row, for example), large values have to be exact
    first = np.where(finite, sample, 0.0)[0]
    is_rounded |= np.isinf(spread) & (size > LARGE) & (first != first.astype(np.float32))
    return bool(np.any(is_rounded))


def _interquartile_range(sample: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Return the interquartile range of each column of (n, C).

    If it is zero, the result is the standard deviation. For constant columns, which contain no
    information, it is infinite.
    """
    filled = sample if finite.all() else np.where(finite, sample, np.nan)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a finite value
        quantile, std = (np.quantile, np.std) if finite.all() else (np.nanquantile, np.nanstd)
        low, high = quantile(filled, [0.25, 0.75], axis=0)
        spread = np.where(high > low, high - low, std(filled, axis=0))
    return np.where(spread > 0, spread, np.inf)


def _exceeds(rows: np.ndarray, limit: float) -> bool:
    """Return whether the absolute value of any finite entry exceeds `limit`."""
    with np.errstate(invalid="ignore"):
        return bool(np.any((np.abs(rows) > limit) & np.isfinite(rows)))


def as_data_array(name: str, value: Any) -> Array | np.ndarray:
    """Convert rows of data to an array of real numbers, in double precision if necessary.

    Args:
        name: Name of the argument, for error messages.
        value: Rows (N, ...).

    Returns:
        A NumPy array of float64 if single precision would lose information (see `needs_double`);
        otherwise the result of `as_real_array`.

    Raises:
        ValueError: The value contains anything but real numbers, or needs more memory than the
            machine has.
    """
    array = as_array(name, value)
    require_real(name, array.dtype)
    if isinstance(array, np.ndarray) and is_single_precision():
        is_wide = array.dtype.kind in "fiu" and array.itemsize >= 4 and array.dtype != np.float32
        if is_wide and needs_double(array):
            return np.asarray(array, np.float64)
    return as_real_array(name, array)

"""Removal of a location and a scale from observations, in double precision.

The map is z = x / 2^exponent - offset. For arrays of float64 it is computed in float64 on the host,
and z is then rounded to single precision with a small error relative to its spread. For arrays that
single precision can represent, the offset and the exponent are 0.

Public names: `Origin`, `fit_origin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.doubles import HALF_ULP, MAX_ROUNDING, is_double, is_single_precision
from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.typing import Obs
from sbi_flows.observations.shared import SharedAxes, pool, unpool

_MAX_EXPONENT = 40
"""Maximum absolute exponent without a change of scale: from 2^-40 to 2^40, the exponent is 0."""


class Origin(NamedTuple):
    """Offset and exponent of each entry of a flattened observation.

    The offset is the sum of two numbers in single precision, so that it keeps about 48 significant
    bits when JAX copies it to a device.

    Attributes:
        high: Offset rounded to single precision, shape (C,).
        low: Remainder of the offset, shape (C,).
        exponent: Power of two by which the entry is divided first, shape (C,).
    """

    high: Array | np.ndarray
    low: Array | np.ndarray
    exponent: Array | np.ndarray

    def subtract(self, x: Obs) -> Obs:
        """Map observations (B, *event) to values in single precision, with the same structure.

        Inside a JAX transformation such as `jit`, x is in single precision, and so is the result.
        """
        if is_traced(x) or not is_single_precision():
            return self._by_leaf(x, _subtract)
        # slices of NumPy arrays compile no program
        return Origin(*map(np.asarray, self))._by_leaf(x, _subtract_on_host)

    def restore(self, rows: Array | np.ndarray) -> Array | np.ndarray:
        """Map flattened values (B, C) back to the units of x.

        The result is a NumPy array of float64. Inside a JAX transformation it is a JAX array.
        """
        if is_traced(rows):
            return jnp.ldexp((rows + self.low[None]) + self.high[None], self.exponent[None])
        offset = np.asarray(self.high, float) + np.asarray(self.low, float)
        return np.ldexp(np.asarray(rows, float) + offset, np.asarray(self.exponent))

    def of(self, places: np.ndarray) -> Origin:
        """Return the origin of the entries with indices `places`."""
        return Origin(self.high[places], self.low[places], self.exponent[places])

    def _by_leaf(self, x: Obs, subtract: Callable[..., Any]) -> Obs:
        leaves, tree = jax.tree.flatten(x)
        ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
        parts = []
        for leaf, end in zip(leaves, ends, strict=True):
            shape = leaf.shape[1:]
            entries = slice(end - math.prod(shape), end)
            arrays = (a[entries].reshape(1, *shape) for a in self)
            parts.append(subtract(leaf, *arrays))
        return jax.tree.unflatten(tree, parts)


def fit_origin(x: Obs, shared: SharedAxes | None = None) -> Origin | None:
    """Compute offset and exponent of each entry of a batch of observations (N, *event).

    Args:
        x: The observations.
        shared: For each array, the axes of one observation whose entries have one offset and one
            exponent; None if each entry has its own.

    Returns:
        The origin; None if no array is in double precision on the host (see `is_double`).
    """
    leaves = jax.tree.leaves(x)
    if is_traced(x) or not any(map(is_double, leaves)):
        return None
    axes = ((),) * len(leaves) if shared is None else shared
    parts = [_offset_and_exponent(leaf, own) for leaf, own in zip(leaves, axes, strict=True)]
    offset, exponent = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    high = offset.astype(np.float32)
    low = (offset - high.astype(float)).astype(np.float32)
    return Origin(jnp.asarray(high), jnp.asarray(low), jnp.asarray(exponent))


def _subtract(leaf: Array, high: Array, low: Array, exponent: Array) -> Array:
    return (jnp.ldexp(jnp.asarray(leaf, float), -exponent) - high) - low


def _subtract_on_host(leaf: Any, high: np.ndarray, low: np.ndarray, exponent: np.ndarray) -> Array:
    if not is_double(leaf):
        return jnp.asarray(leaf)
    z = np.ldexp(leaf, -exponent) - (high.astype(float) + low.astype(float))
    largest = np.finfo(np.float32).max
    return jnp.asarray(np.clip(z, -largest, largest), jnp.float32)


def _offset_and_exponent(leaf: Any, shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and exponent of each entry of one array (N, *shape), shape (C,) each."""
    width = math.prod(leaf.shape[1:])
    if not is_double(leaf):
        return np.zeros(width), np.zeros(width, np.int32)
    rows = pool(leaf, shared)
    missing = np.isnan(rows)
    rows = np.where(missing.all(axis=0)[None], 0.0, rows)  # a column without any value
    has_missing = bool(missing.any())
    quantile = np.nanquantile if has_missing else np.quantile
    most, mean = (np.nanmax, np.nanmean) if has_missing else (np.max, np.mean)
    low, middle, high = quantile(rows, [0.25, 0.5, 0.75], axis=0)
    largest = most(np.abs(rows - middle), axis=0)
    unit = np.where(largest > 0, largest, 1.0)
    deviation = unit * np.sqrt(mean(((rows - middle) / unit) ** 2, axis=0))
    spread = np.where(high > low, high - low, deviation)
    # without an offset, positive values stay positive, so that their logarithm can be taken
    is_far = HALF_ULP * np.abs(middle) > 0.1 * MAX_ROUNDING * spread
    size = np.where(is_far, spread, np.maximum(np.abs(middle), spread))
    exponent = np.frexp(np.where(size > 0, size, 1.0))[1]
    exponent = np.where(np.abs(exponent) > _MAX_EXPONENT, exponent, 0)
    offset = np.where(is_far, np.ldexp(middle, -exponent), 0.0)
    event = leaf.shape[1:]
    return unpool(offset, event, shared), unpool(exponent.astype(np.int32), event, shared)

"""Checks and conversions of the arrays of simulations.

Public names: `as_parameters`, `named_columns`, `require_rows`, `whole_numbers`, `row_index`,
`finite_rows`, `usable_rows`, `MAX_INDEX`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core import doubles
from sbi_flows.core.checks import as_array, as_real_array, require_memory, require_real
from sbi_flows.core.compilation import compiled_per_size
from sbi_flows.core.doubles import as_data_array
from sbi_flows.core.frames import frame_columns
from sbi_flows.core.typing import Obs
from sbi_flows.prior.base import labels

MAX_INDEX = 2**31 - 1
"""Maximum number of rows, and of entries in a row: the largest 32-bit index."""


def as_parameters(theta: Any, *, is_double: bool = False) -> Array | np.ndarray:
    """Convert theta to a finite float array (N, D).

    Args:
        theta: The parameters.
        is_double: Whether to keep float64 on the host in any case. Otherwise it is kept if single
            precision loses information.

    Raises:
        ValueError: theta is not a finite numeric array with two axes, or it is empty.
    """
    array = as_array("theta", theta)
    if array.ndim != 2 or array.dtype == np.bool_:
        raise ValueError(f"theta: expected a numeric array (N, D), got {array.dtype}{array.shape}")
    if not array.size:
        raise ValueError(f"theta: expected at least one row and column, got shape {array.shape}")
    require_real("theta", array.dtype)
    _require_sizes("theta", array.shape)
    values = np.asarray(array, float) if is_double else np.asarray(as_data_array("theta", array))
    if not doubles.is_double(values):
        values = values.astype(jnp.result_type(float), copy=False)
    not_finite = int(np.sum(~np.isfinite(values).all(axis=-1)))
    if not_finite:
        raise ValueError(f"theta: expected finite values, got {not_finite} rows with NaN or inf")
    return values if doubles.is_double(values) else jnp.asarray(values)


def named_columns(theta: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Return theta as one array or table, and the names of its columns; None without names.

    Raises:
        ValueError: theta is a dict of arrays with different numbers of rows.
    """
    if not isinstance(theta, Mapping):
        return theta, frame_columns(theta)
    if not all(isinstance(name, str) for name in theta):
        raise ValueError(f"theta: expected names as keys, got {list(theta)!s:.80}")
    arrays = {name: np.asarray(as_array(f"theta: {name}", a)) for name, a in theta.items()}
    rows = {a.shape[:1] for a in arrays.values()}
    if len(rows) != 1 or rows == {()}:
        shapes = {name: a.shape for name, a in arrays.items()}
        raise ValueError(
            f"theta: expected arrays with the same number of rows, got the shapes {shapes}"
        )
    for a in arrays.values():
        _require_sizes("theta", a.shape)
    columns = [a.reshape(len(a), math.prod(a.shape[1:])) for a in arrays.values()]
    names = [label for name, a in arrays.items() for label in labels(name, a.shape[1:])]
    return np.concatenate(columns, axis=1), tuple(names)


def require_rows(x: Obs, n: int) -> None:
    """Raise ValueError unless each leaf of x has n rows, and a row has at least one number."""
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(f"x: expected {n} rows as in theta, got shape {leaf.shape}")
        _require_sizes("x", leaf.shape)
    if not any(leaf.size for leaf in leaves):
        raise ValueError("x: expected at least one number in each row, got none")


def _require_sizes(name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the number of rows, or of entries in a row, exceeds `MAX_INDEX`."""
    if max(shape[0], math.prod(map(int, shape[1:]))) > MAX_INDEX:
        raise ValueError(
            f"{name}: expected at most {MAX_INDEX:,} rows, and numbers in each, got {shape}"
        )
    require_memory(f"{name}: a row", shape[1:], jnp.result_type(float))


def whole_numbers(name: str, value: Any, n: int, most: int) -> np.ndarray:
    """Check and return n integers from 0 to `most`."""
    array = np.asarray(as_real_array(name, value))
    if array.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), got {array.shape}")
    if not np.all((array >= 0) & (array <= most) & (array == np.floor(array))):
        raise ValueError(f"{name}: expected whole numbers from 0 to {most:,}, got others")
    return array


def row_index(rows: Any, n: int) -> np.ndarray | slice:
    """Convert an index array or a mask of n rows to an index array; return a slice unchanged."""
    if isinstance(rows, slice):
        try:
            rows.indices(n)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows: expected a slice of whole numbers, got {error}") from None
        return rows
    array = as_array("rows", rows)
    require_real("rows", array.dtype)
    array = np.asarray(array)
    if array.dtype == bool and array.shape == (n,):
        return np.flatnonzero(array)
    is_integer = array.dtype.kind in "iu" or not array.size
    if array.ndim != 1 or not is_integer:
        raise ValueError(
            f"rows: expected a slice or an index array, or {n} truth values, got "
            f"{array.dtype}{list(array.shape)}"
        )
    beyond = array[(array < -n) | (array >= n)]
    if beyond.size:
        raise ValueError(f"rows: expected numbers from {-n} to {n - 1}, got {beyond[0]}")
    return array.astype(np.int64)


def finite_rows(x: Obs, *, missing: bool = False) -> Array:
    """Return whether each of the N rows of x is usable, shape (N,).

    A row is usable if all entries are finite. With `missing`, it is usable if no entry is infinite
    and at least one entry is not NaN.
    """
    # JAX would round numbers in double precision, possibly to infinity
    return _finite_rows(jax.tree.map(_finiteness, x), missing)


def _finiteness(array: Any) -> Any:
    """Replace numbers in double precision: 0 if finite, infinity, or NaN; keep other arrays."""
    if not doubles.is_double(array):
        return array
    return np.where(np.isfinite(array), 0.0, array).astype(np.float32)


@compiled_per_size
@partial(jax.jit, static_argnums=1)
def _finite_rows(x: Obs, missing: bool) -> Array:
    leaves = jax.tree.leaves(x)

    def rows(test: Any, join: Any) -> Array:
        return join(
            jnp.stack([join(test(a), axis=tuple(range(1, a.ndim))) for a in leaves]), axis=0
        )

    if not missing:
        return rows(jnp.isfinite, jnp.all)
    return ~rows(jnp.isinf, jnp.any) & rows(lambda a: ~jnp.isnan(a), jnp.any)


def usable_rows(x: Mapping[str, np.ndarray], *, missing: bool) -> np.ndarray:
    """Return `finite_rows` for a dict of NumPy arrays, computed on the host, shape (N,)."""
    rows = [array.reshape(len(array), -1) for array in x.values()]
    if not missing:
        return np.all([np.isfinite(array).all(axis=1) for array in rows], axis=0)
    is_infinite = np.any([np.isinf(array).any(axis=1) for array in rows], axis=0)
    return ~is_infinite & np.any([(~np.isnan(array)).any(axis=1) for array in rows], axis=0)

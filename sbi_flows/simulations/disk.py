"""Arrays on disk, of which rows are read when they are asked for.

An array on disk has the dtype that the same array in memory would get: integers that JAX holds in
its present precision stay integers, all others become floats.

Public names: `LazyArray`, `ON_DISK`, `is_on_disk`, `keep_on_disk`, `finite_rows_on_disk`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_real_array, require_real
from sbi_flows.core.typing import Obs

MAX_READ_ENTRIES = 2**24
"""Maximum number of entries that are read from disk at once."""


class LazyArray(abc.ABC):
    """Abstract array whose rows are read when they are asked for.

    Attributes:
        shape: Its shape.
        dtype: Dtype of its entries.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @abc.abstractmethod
    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read the rows of a slice or of an index array."""


DiskArray: TypeAlias = np.memmap | LazyArray

ON_DISK = (np.memmap, LazyArray)
"""Types of arrays that are on disk."""


def is_on_disk(x: Obs) -> bool:
    """Return whether any array of x is on disk."""
    return any(isinstance(leaf, ON_DISK) for leaf in jax.tree.leaves(x))


def keep_on_disk(array: DiskArray) -> DiskArray:
    """Return an array on disk whose rows are read in the dtype that JAX holds them in.

    Integers of a dtype that JAX narrows are read once, to find whether all of them fit.

    Raises:
        ValueError: The entries are not real numbers.
    """
    require_real("x", array.dtype)
    dtype = _dtype_in_memory(array)
    return array if array.dtype == dtype and array.dtype.isnative else _Converted(array, dtype)


class _Converted(LazyArray):
    """An array on disk whose entries are converted to another dtype when they are read."""

    def __init__(self, array: DiskArray, dtype: np.dtype) -> None:
        self._array, self.shape, self.dtype = array, array.shape, dtype

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(self._array[rows]).astype(self.dtype)


def _dtype_in_memory(array: DiskArray) -> np.dtype:
    """Return the dtype that `as_real_array` gives the entries of an array."""
    without_entries = as_real_array("x", np.zeros(0, array.dtype)).dtype
    if without_entries.kind not in "iu" or without_entries == array.dtype.newbyteorder("="):
        return without_entries
    # the conversion of wide integers depends on their values
    dtypes = {as_real_array("x", array[rows]).dtype for rows in _slices([array])}
    return without_entries if dtypes <= {without_entries} else np.dtype(jnp.result_type(float))


def finite_rows_on_disk(x: Obs, finite_rows: Callable[[list[Array]], Array]) -> Array:
    """Apply a function that tells which rows are finite to all of x, some rows at a time."""
    leaves = jax.tree.leaves(x)
    parts = [finite_rows([jnp.asarray(a[rows]) for a in leaves]) for rows in _slices(leaves)]
    return jnp.concatenate(parts)


def _slices(leaves: list[Any]) -> Iterator[slice]:
    """Yield slices of rows that together have at most `MAX_READ_ENTRIES` entries."""
    row_entries = sum(math.prod(a.shape[1:]) for a in leaves)
    size = max(1, MAX_READ_ENTRIES // max(1, row_entries))
    for start in range(0, len(leaves[0]), size):
        yield slice(start, start + size)

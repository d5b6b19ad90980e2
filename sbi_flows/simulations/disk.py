"""Arrays on disk. Their rows are read from disk when they are indexed.

An array on disk has the same dtype as it would have in memory. Integers stay integers if JAX can
represent their values in its present precision; all other numbers become floats.

Public names: `LazyArray`, `PartedArray`, `JoinedArray`, `ON_DISK`, `is_on_disk`, `keep_on_disk`,
`to_pickle`, `from_pickle`, `finite_rows_on_disk`, `row_slices`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_real_array, require_real
from sbi_flows.core.doubles import is_single_precision, needs_double
from sbi_flows.core.typing import Obs

MAX_READ_ENTRIES = 2**24
"""Maximum number of entries that are read from disk at once."""

MAX_SAMPLE_ROWS = 1024
"""Maximum number of rows that are read to test whether an array needs double precision."""


class LazyArray(abc.ABC):
    """Abstract array on disk. Its rows are read when it is indexed.

    Attributes:
        shape: Shape of the array.
        dtype: Dtype of the entries.
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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all rows, for NumPy."""
        return np.asarray(self[:], dtype)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @abc.abstractmethod
    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read the rows of a slice or of an index array."""


DiskArray: TypeAlias = np.memmap | LazyArray

ON_DISK = (np.memmap, LazyArray)
"""Types of arrays on disk."""


def is_on_disk(x: Obs) -> bool:
    """Return whether any array of x is on disk."""
    return any(isinstance(leaf, ON_DISK) for leaf in jax.tree.leaves(x))


def keep_on_disk(array: DiskArray) -> DiskArray:
    """Return an array on disk whose rows are converted to JAX's dtype when they are read.

    If JAX has a narrower integer dtype than the array, all integers are read once, to find out
    whether they fit into JAX's dtype.

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

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy, with the array's location in its file."""
        return {**vars(self), "_array": to_pickle(self._array)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes and open the file."""
        vars(self).update(state, _array=from_pickle(state["_array"]))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(self._array[rows]).astype(self.dtype)


class PartedArray(LazyArray):
    """An array on disk whose rows lie in several parts, one after the other."""

    _ends: np.ndarray

    @abc.abstractmethod
    def _read(self, part: int, rows: np.ndarray) -> np.ndarray:
        """Read rows of one part; they are counted from the part's first row."""

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        part_of_row = np.searchsorted(self._ends, numbers, side="right")
        values = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for part in np.unique(part_of_row).tolist():
            selected, first = part_of_row == part, self._ends[part - 1] if part else 0
            values[selected] = self._read(part, numbers[selected] - first)
        return values


class JoinedArray(PartedArray):
    """Arrays on disk or in memory, joined row by row.

    Args:
        arrays: Arrays (N_i, *event) with the same shape of a row.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = [a if isinstance(a, ON_DISK) else np.asarray(a) for a in arrays]
        self._ends = np.cumsum([len(a) for a in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.dtype = np.result_type(*[a.dtype for a in arrays])

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy, with the arrays' locations in their files."""
        return {**vars(self), "_arrays": [to_pickle(a) for a in self._arrays]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes and open the files."""
        vars(self).update(state, _arrays=[from_pickle(a) for a in state["_arrays"]])

    def _read(self, part: int, rows: np.ndarray) -> np.ndarray:
        return self._arrays[part][rows]


def to_pickle(array: Any) -> Any:
    """Return the location of a memory-mapped array in its file, for pickle and copy.

    NumPy would write the whole content of the array into the pickle. The following are returned
    unchanged: other arrays, views that are not contiguous, and copy-on-write arrays (mode "c"),
    whose content may differ from the file.
    """
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        return array
    root: Any = array
    while isinstance(root.base, np.memmap):
        root = root.base
    is_mapped = isinstance(root.base, mmap.mmap) and root.filename is not None and root.mode != "c"
    if not is_mapped:
        return array
    offset = root.offset + array.ctypes.data - root.ctypes.data
    return _Mapped(str(root.filename), array.dtype, offset, array.shape)


def from_pickle(value: Any) -> Any:
    """Return the array from the result of `to_pickle`; open its file if the array is mapped."""
    return value.open() if isinstance(value, _Mapped) else value


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """Location of an array in a file.

    Attributes:
        path: Path of the file.
        dtype: Dtype of the array.
        offset: Position of the first entry in the file, in bytes.
        shape: Shape of the array.
    """

    path: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    def open(self) -> np.memmap:
        """Map the file into memory."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def _dtype_in_memory(array: DiskArray) -> np.dtype:
    """Return the dtype that `as_data_array` would give the array in memory."""
    if array.dtype.itemsize > 4 and is_single_precision() and needs_double(_sample_of(array)):
        return np.dtype(np.float64)
    without_entries = as_real_array("x", np.zeros(0, array.dtype)).dtype
    if without_entries.kind not in "iu" or without_entries == array.dtype.newbyteorder("="):
        return without_entries
    # 64-bit integers stay integers only if all values fit into 32 bits, so all must be read
    dtypes = {as_real_array("x", array[rows]).dtype for rows in row_slices([array])}
    return without_entries if dtypes <= {without_entries} else np.dtype(jnp.result_type(float))


def _sample_of(array: DiskArray) -> np.ndarray:
    """Read evenly spaced rows, at most `MAX_SAMPLE_ROWS` of them and `MAX_READ_ENTRIES` entries."""
    row_entries = max(1, math.prod(array.shape[1:]))
    count = max(1, min(MAX_SAMPLE_ROWS, MAX_READ_ENTRIES // row_entries, len(array)))
    return np.asarray(array[np.linspace(0, len(array) - 1, count).astype(int)])


def finite_rows_on_disk(x: Obs, finite_rows: Callable[[Obs], Array]) -> Array:
    """Return whether each row of x is finite, shape (N,): apply `finite_rows` to blocks of rows."""
    leaves = jax.tree.leaves(x)
    parts = [finite_rows([np.asarray(a[rows]) for a in leaves]) for rows in row_slices(leaves)]
    return jnp.concatenate(parts)


def row_slices(leaves: list[Any]) -> Iterator[slice]:
    """Yield slices that cover all rows, each with at most `MAX_READ_ENTRIES` entries."""
    row_entries = sum(math.prod(a.shape[1:]) for a in leaves)
    size = max(1, MAX_READ_ENTRIES // max(1, row_entries))
    for start in range(0, len(leaves[0]), size):
        yield slice(start, start + size)

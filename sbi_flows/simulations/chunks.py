"""The chunks of a store as they are read: nothing in a file is believed before it is checked.

Public names: `Sealed`, `sealed`, `Opened`, `opened`, `read`, `Column`, `reading`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sbi_flows.core.checks import require_memory
from sbi_flows.core.errors import SbiFlowsError, StoreSpoilt
from sbi_flows.simulations.simulations import MOST, Lazy

CODECS = {"BytesCodec", "ZstdCodec", "GzipCodec", "BloscCodec", "Crc32cCodec"}
"""Those of zarr that only turn bytes into numbers."""


class Sealed(NamedTuple):
    """A finished chunk.

    Attributes:
        start: Number of its first row.
        count: Its number of rows.
        checksum: Of its arrays.
        failed: Reasons of the rows that failed, by their numbers.
        group: Its group in the store.
    """

    start: int
    count: int
    checksum: str
    failed: dict[int, str]
    group: Any


@contextlib.contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Say of a store that it is spoilt, whatever a library says of its files.

    Raises:
        StoreSpoilt: What is done within fails.
    """
    try:
        yield
    except SbiFlowsError:
        raise
    # zarr and its codecs raise whatever comes of bytes that they were never made for
    except Exception as error:
        raise StoreSpoilt(
            f"{path}: expected {what} as they were written, got {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error


class Opened(NamedTuple):
    """A finished chunk whose arrays were looked at.

    Attributes:
        start: Number of its first row.
        count: Its number of rows.
        arrays: Its arrays by name, which are on disk.
    """

    start: int
    count: int
    arrays: dict[str, Any]


def sealed(path: str, rows: Any) -> list[Sealed]:
    """Finished chunks in the order of their rows; their arrays are not looked at.

    Args:
        path: Of the store, for errors.
        rows: Its group of chunks.

    Raises:
        StoreSpoilt: What a chunk says of itself cannot be.
    """
    with reading(path, "groups of rows"), warnings.catch_warnings():
        # a chunk whose first file a kill kept back is no group yet, and is not missed
        warnings.filterwarnings("ignore", "Object at .* is not recognized as a component")
        groups = sorted(rows.groups())
    found = []
    for name, group in groups:
        with reading(path, f"rows/{name:.40}"):
            seal = group.attrs.get("seal")
            if seal is None:
                continue
            chunk = _sealed(name, seal, group)
        if found and chunk.start < found[-1].start + found[-1].count:
            raise StoreSpoilt(f"{path}: expected each row once, rows/{name} has some again")
        found.append(chunk)
    return found


def opened(path: str, chunks: list[Sealed]) -> list[Opened]:
    """The arrays of chunks, all of one layout.

    Raises:
        StoreSpoilt: They are of several, or of one that cannot be.
    """
    found, first = [], None
    for chunk in chunks:
        name = f"rows/{chunk.start:012d}"
        with reading(path, name):
            own = Opened(chunk.start, chunk.count, dict(chunk.group.arrays()))
            layout = _layout(own)
        first = layout if first is None else first
        if layout != first:
            raise StoreSpoilt(f"{path}: expected chunks of one layout, {name} has another")
        found.append(own)
    return found


def read(path: str, chunk: Opened, name: str) -> np.ndarray:
    """An array of a chunk, in the order of bytes of this machine.

    Raises:
        StoreSpoilt: It cannot be read.
    """
    with reading(path, f"rows/{chunk.start:012d}/{name}"):
        array = chunk.arrays[name][:]
        return array.astype(array.dtype.newbyteorder("="), copy=False)


class Column(Lazy):
    """One array of the observations, over all chunks."""

    def __init__(self, path: str, chunks: list[Opened], name: str) -> None:
        self._path, self._chunks, self._name = path, chunks, name
        self._ends = np.cumsum([chunk.count for chunk in chunks])
        first = chunks[0].arrays[name]
        self.shape = (int(self._ends[-1]), *first.shape[1:])
        self.dtype = first.dtype.newbyteorder("=")

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice or of these numbers, in memory."""
        given = np.arange(len(self))[rows]
        places = np.searchsorted(self._ends, given, side="right")
        found = np.empty((len(given), *self.shape[1:]), self.dtype)
        for c in np.unique(places):
            own, chunk = places == c, self._chunks[c]
            first = self._ends[c] - chunk.count
            # a chunk is one object on disk: it is read as a whole in any case
            found[own] = read(self._path, chunk, self._name)[given[own] - first]
        return found


def _sealed(name: str, seal: Any, group: Any) -> Sealed:
    failed = {int(row): reason for row, reason in seal["failed"].items()}
    chunk = Sealed(int(name), seal["rows"], seal["sha256"], failed, group)
    rows = range(chunk.start, chunk.start + chunk.count)
    known = isinstance(chunk.checksum, str) and 0 <= chunk.start and 1 <= chunk.count <= MOST
    named = all(row in rows and isinstance(reason, str) for row, reason in failed.items())
    if not known or not named or isinstance(chunk.count, bool):
        raise ValueError("a seal that cannot be")
    return chunk


def _layout(chunk: Opened) -> dict[str, tuple]:
    """Shape of a row and dtype of each array, after a look at what zarr would do to read it."""
    found = {}
    for name, array in chunk.arrays.items():
        codecs = {type(codec).__name__ for codec in array.metadata.codecs}
        if not codecs <= CODECS or np.dtype(array.dtype).kind not in "biuf":
            raise ValueError(f"{name} of {array.dtype} by {sorted(codecs)}")
        if array.shape[:1] != (chunk.count,) or array.chunks != array.shape:
            raise ValueError(f"{name} of shape {array.shape} in chunks of {array.chunks}")
        require_memory(name, array.shape, array.dtype)
        found[name] = (array.shape[1:], np.dtype(array.dtype).newbyteorder("="))
    if not {"theta", "valid"} < found.keys() or found["valid"] != ((), np.dtype(bool)):
        raise ValueError(f"arrays {sorted(found)}")
    if len(found["theta"][0]) != 1 or not all(n.startswith("x.") for n in found.keys() - _OURS):
        raise ValueError(f"arrays {sorted(found)}")
    return found


_OURS = {"theta", "valid"}

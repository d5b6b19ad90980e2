"""Read the chunks of a store, and check the content of every file before it is used.

Public names: `SealedChunk`, `sealed_chunks`, `OpenChunk`, `open_chunks`, `read_array`, `Column`,
`spoilt_on_error`.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sbi_flows.core.checks import require_memory
from sbi_flows.core.errors import SbiFlowsError, StoreSpoilt
from sbi_flows.simulations.arrays import MAX_INDEX
from sbi_flows.simulations.disk import PartedArray

CODECS = {"BytesCodec", "ZstdCodec", "GzipCodec", "BloscCodec", "Crc32cCodec"}
"""Allowed zarr codecs. They only convert bytes to numbers and never run code from the file."""


class SealedChunk(NamedTuple):
    """A complete chunk, as its seal describes it.

    The seal is a JSON record, which is written after the arrays of the chunk.

    Attributes:
        start: Row number of the first row.
        count: Number of rows.
        checksum: Checksum of the arrays.
        failed: Dict from the row number of a failed row to the reason of the failure.
        group: Zarr group of the chunk.
        extension: Name and number of rows of the extension that the chunk belongs to; None for a
            chunk that the store simulated. An extension counts when all of its chunks are sealed.
    """

    start: int
    count: int
    checksum: str
    failed: dict[int, str]
    group: Any
    extension: tuple[str, int] | None = None


@contextlib.contextmanager
def spoilt_on_error(path: str, what: str) -> Iterator[None]:
    """Context manager that converts the errors of zarr and its codecs to `StoreSpoilt`.

    Args:
        path: Path of the store.
        what: Description of the data that are read, for the error message.

    Raises:
        StoreSpoilt: The `with` block raised an error other than `SbiFlowsError`.
    """
    try:
        yield
    except SbiFlowsError:
        raise
    # zarr and its codecs raise errors of any type on damaged files
    except Exception as error:
        raise StoreSpoilt(
            f"{path}: expected {what} as they were written, got {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error


class OpenChunk(NamedTuple):
    """A complete chunk whose arrays have a valid layout.

    Attributes:
        start: Row number of the first row.
        count: Number of rows.
        arrays: Zarr arrays on disk, by name.
    """

    start: int
    count: int
    arrays: dict[str, Any]


def sealed_chunks(path: str, rows: Any) -> list[SealedChunk]:
    """Return complete chunks in the order of their rows, without opening their arrays.

    Args:
        path: Path of the store, for error messages.
        rows: Zarr group that holds all chunks of the store.

    Raises:
        StoreSpoilt: A seal is invalid, or two chunks have rows in common.
    """
    with spoilt_on_error(path, "groups of rows"), warnings.catch_warnings():
        # a killed process may leave a folder without the file that makes it a zarr group
        warnings.filterwarnings("ignore", "Object at .* is not recognized as a component")
        groups = sorted(rows.groups())
    chunks: list[SealedChunk] = []
    for name, group in groups:
        with spoilt_on_error(path, f"rows/{name:.40}"):
            seal = group.attrs.get("seal")
            if seal is not None:
                chunks.append(_sealed_chunk(name, seal, group))
    chunks = _without_incomplete(chunks)
    for chunk, following in itertools.pairwise(chunks):
        if following.start < chunk.start + chunk.count:
            name = f"{following.start:012d}"
            raise StoreSpoilt(f"{path}: expected each row once, rows/{name} has some again")
    return chunks


def _without_incomplete(chunks: list[SealedChunk]) -> list[SealedChunk]:
    """Leave out chunks of extensions of which other chunks are missing: a process was killed."""
    rows: Counter[tuple[str, int]] = Counter()
    for chunk in chunks:
        if chunk.extension is not None:
            rows[chunk.extension] += chunk.count
    return [c for c in chunks if c.extension is None or rows[c.extension] == c.extension[1]]


def open_chunks(path: str, chunks: list[SealedChunk]) -> list[OpenChunk]:
    """Open the arrays of chunks; all chunks must have the same layout (row shapes and dtypes).

    Raises:
        StoreSpoilt: The layout of a chunk is invalid, or differs from the layout of the first
            chunk.
    """
    opened: list[OpenChunk] = []
    first_layout = None
    for chunk in chunks:
        name = f"rows/{chunk.start:012d}"
        with spoilt_on_error(path, name):
            # by name: the order of a folder's files differs between file systems
            arrays = dict(sorted(chunk.group.arrays()))
            layout = _layout(chunk.count, arrays)
        first_layout = layout if first_layout is None else first_layout
        if layout != first_layout:
            raise StoreSpoilt(f"{path}: expected chunks of one layout, {name} has another")
        opened.append(OpenChunk(chunk.start, chunk.count, arrays))
    return opened


def read_array(path: str, chunk: OpenChunk, name: str) -> np.ndarray:
    """Read an array of a chunk, in native byte order.

    Raises:
        StoreSpoilt: The array cannot be read.
    """
    with spoilt_on_error(path, f"rows/{chunk.start:012d}/{name}"):
        array = chunk.arrays[name][:]
        return array.astype(array.dtype.newbyteorder("="), copy=False)


class Column(PartedArray):
    """One array of the observations on disk, with the rows of all chunks.

    Args:
        path: Path of the store, for error messages.
        chunks: The chunks; they have the same layout.
        name: Name of the array in each chunk.
    """

    def __init__(self, path: str, chunks: list[OpenChunk], name: str) -> None:
        self._path, self._chunks, self._name = path, chunks, name
        self._ends = np.cumsum([chunk.count for chunk in chunks])
        first = chunks[0].arrays[name]
        self.shape = (int(self._ends[-1]), *first.shape[1:])
        self.dtype = first.dtype.newbyteorder("=")

    def _read(self, part: int, rows: np.ndarray) -> np.ndarray:
        # zarr stores the array of a chunk as one object, and always reads all of it
        return read_array(self._path, self._chunks[part], self._name)[rows]


def _sealed_chunk(name: str, seal: Any, group: Any) -> SealedChunk:
    """Check the seal of a chunk, and return the chunk.

    Raises:
        ValueError: The seal is invalid.
    """
    failed = {int(row): reason for row, reason in seal["failed"].items()}
    extension = seal.get("extension")
    if extension is not None:
        extension = (str(extension["name"]), int(extension["rows"]))
    chunk = SealedChunk(int(name), seal["rows"], seal["sha256"], failed, group, extension)
    rows = range(chunk.start, chunk.start + chunk.count)
    has_sizes = 0 <= chunk.start and 1 <= chunk.count <= MAX_INDEX
    has_reasons = all(row in rows and isinstance(reason, str) for row, reason in failed.items())
    is_bool = isinstance(chunk.count, bool)
    if not isinstance(chunk.checksum, str) or not has_sizes or not has_reasons or is_bool:
        raise ValueError("an invalid seal")
    return chunk


def _layout(count: int, arrays: dict[str, Any]) -> dict[str, tuple]:
    """Return the layout of a chunk of `count` rows: row shape and dtype of each array.

    Raises:
        ValueError: A codec is not allowed, an array is missing, or a shape is wrong.
    """
    layout = {}
    for name, array in arrays.items():
        codecs = {type(codec).__name__ for codec in array.metadata.codecs}
        if not codecs <= CODECS or np.dtype(array.dtype).kind not in "biuf":
            raise ValueError(f"{name} of {array.dtype} by {sorted(codecs)}")
        if array.shape[:1] != (count,) or array.chunks != array.shape:
            raise ValueError(f"{name} of shape {array.shape} in chunks of {array.chunks}")
        require_memory(name, array.shape, array.dtype)
        layout[name] = (array.shape[1:], np.dtype(array.dtype).newbyteorder("="))
    if not {"theta", "valid"} < layout.keys() or layout["valid"] != ((), np.dtype(bool)):
        raise ValueError(f"arrays {sorted(layout)}")
    observations = layout.keys() - {"theta", "valid"}
    if len(layout["theta"][0]) != 1 or not all(name.startswith("x.") for name in observations):
        raise ValueError(f"arrays {sorted(layout)}")
    return layout

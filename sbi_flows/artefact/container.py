"""The bytes of an artefact: a safetensors file whose metadata hold one strict JSON document.

    8 bytes       length of the header, little-endian
    header        JSON: `__metadata__` with the document as text, and a dtype, a shape and a
                  range of bytes for each tensor
    the tensors   little-endian, one after the other, without gaps

The document begins with a SHA-256 of itself (with zeros in its place), of the table of tensors and
of their bytes: what was changed by accident is found, and only that, as anyone can compute it.

Public names: `Entry`, `File`, `packed`.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from sbi_flows.artefact.strict import checked, counted, fields, items, parse, written
from sbi_flows.core.errors import ArtefactError

MOST_HEADER = 2**22
"""Bytes of the header: as Python objects they take some twenty times as much."""

MOST_BYTES = 2**34
"""Bytes of a file."""

MOST_AXES = 16

CHUNK = 2**20
"""Bytes that are read at once for the checksum."""

KEY = "sbi_flows"
"""Of the document in the metadata."""

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}

_BLANK = "0" * 64
_FIRST = '{"sha256":"'


class Entry(NamedTuple):
    """A tensor in the file.

    Attributes:
        dtype: Type of its numbers.
        shape: Its shape.
        start: Place of its first byte, from the first tensor's.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """Dtype and shape."""
        return f"{self.dtype.name}{list(self.shape)}"


class File:
    """An open artefact, whose header and checksum were verified; tensors are read one by one.

    Args:
        file: The file, open for reading; it has to be one on a disk.

    Attributes:
        document: What the document says, without its checksum.
        table: The tensors.

    Raises:
        ArtefactError: The file is malformed, too large, or not what was written.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Read the header and verify the checksum, in bounded memory."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArtefactError("expected a file on a disk, got something else")
        counted("size in bytes", status.st_size, 10, MOST_BYTES)
        self._file = file
        length = counted(
            "length of the header",
            int.from_bytes(self._read(0, 8), "little"),
            2,
            min(MOST_HEADER, status.st_size - 8),
        )
        self._begin, self._size = 8 + length, status.st_size - 8 - length
        try:
            header = self._read(8, length).decode()
        except UnicodeDecodeError as error:
            raise ArtefactError(f"header: expected UTF-8, got {error}") from None
        table = checked("header", parse(header, "header"), dict, "an object")
        (text,) = fields("metadata", table.pop("__metadata__", None), KEY)
        text = checked("document", text, str, "text")
        self.table = _entries(table, self._size)
        self._verify(text)
        self.document = parse(text, "document")
        del self.document["sha256"]

    def tensor(self, name: str) -> np.ndarray:
        """The numbers of a tensor that is in the table."""
        entry = self.table[name]
        array = np.empty(entry.shape, entry.dtype)
        flat = array.reshape(-1).view(np.uint8)
        self._file.seek(self._begin + entry.start)
        if self._file.readinto(flat) != entry.size:  # type: ignore[attr-defined]
            raise ArtefactError(f"{name}: the file has become shorter while it was read")
        if entry.dtype == np.bool_ and np.any(flat > 1):
            raise ArtefactError(f"{name}: expected truth values, got other bytes")
        return array

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        found = self._file.read(size)
        if len(found) != size:
            raise ArtefactError("the file has become shorter while it was read")
        return found

    def _verify(self, text: str) -> None:
        claimed = text[len(_FIRST) : len(_FIRST) + 64]
        blank = text.replace(claimed, _BLANK, 1)
        if not blank.startswith(_FIRST + _BLANK + '",'):
            raise ArtefactError("document: expected a SHA-256 at its beginning, got none")
        digest = _digest(blank, self.table)
        for start in range(0, self._size, CHUNK):
            digest.update(self._read(self._begin + start, min(CHUNK, self._size - start)))
        if digest.hexdigest() != claimed:
            raise ArtefactError(
                f"expected SHA-256 {claimed!r}, got {digest.hexdigest()}: the file is not what was "
                "written"
            )


def packed(document: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file; the same content gives the same bytes.

    Raises:
        ValueError: The document is too long, or a dtype cannot be written.
    """
    text = _FIRST + _BLANK + '",' + written(dict(document))[1:]
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    for name, array in tensors.items():
        if array.dtype not in names or array.dtype.byteorder == ">":
            raise ValueError(f"{name}: expected one of {sorted(DTYPES)}, got {array.dtype}")
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    head = save(arrays, metadata={KEY: text})
    length = int.from_bytes(head[:8], "little")
    if length > MOST_HEADER:
        raise ValueError(
            f"the record of the posterior: expected at most {MOST_HEADER} bytes, got {length}"
        )
    begin = 8 + length
    header = parse(head[8:begin].decode(), "header")
    del header["__metadata__"]
    digest = _digest(text, _entries(header, len(head) - begin))
    digest.update(memoryview(head)[begin:])
    return head[:begin].replace(_BLANK.encode(), digest.hexdigest().encode(), 1) + head[begin:]


def _digest(text: str, table: Mapping[str, Entry]) -> Any:
    """The checksum as far as the document and the table go."""
    rows = [[name, e.dtype.name, list(e.shape), e.start] for name, e in sorted(table.items())]
    return hashlib.sha256(f"{text}\n{written(rows)}\n".encode())


def _entries(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """The table of tensors, which fill `size` bytes without gaps and without overlap."""
    found, ends = {}, {}
    for name, value in header.items():
        kind, shape, offsets = fields(name, value, "dtype", "shape", "data_offsets")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ArtefactError(f"{name}: expected a dtype of {sorted(DTYPES)}, got {kind!r:.40}")
        sizes = items(f"{name}: shape", shape, MOST_AXES)
        shape = tuple(counted(f"{name}: shape", n, 0, MOST_BYTES) for n in sizes)
        if len(items(f"{name}: data_offsets", offsets, 2)) != 2:
            raise ArtefactError(f"{name}: expected the first and the last byte, got {offsets}")
        start, end = (counted(f"{name}: data_offsets", o, 0, size) for o in offsets)
        entry = Entry(np.dtype(DTYPES[kind]), shape, start)
        if end - start != entry.size:
            raise ArtefactError(f"{name}: expected {entry.size} bytes for {entry}, got {offsets}")
        found[name], ends[name] = entry, end
    place = 0
    for name in sorted(found, key=lambda name: (found[name].start, ends[name])):
        if found[name].start != place:
            raise ArtefactError(f"{name}: expected it to begin at byte {place}, after the last one")
        place = ends[name]
    if place != size:
        raise ArtefactError(f"tensors: expected {size} bytes of them, got {place}")
    return found

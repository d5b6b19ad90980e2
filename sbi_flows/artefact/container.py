"""Container of a saved posterior: a safetensors file with a JSON document in its metadata.

    8 bytes       length of the header, little-endian
    header        JSON: `__metadata__` with the JSON document, and the table of tensors:
                  dtype, shape and byte range of each tensor
    tensors       bytes of all tensors, little-endian, without gaps

The document begins with a SHA-256 hash. The hash covers the document (with zeros instead of the
hash), the table of tensors and the bytes of the tensors. It detects accidental changes, but gives
no protection against forgery, because anyone can compute it.

Public names: `Entry`, `ArtefactFile`, `pack`.
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

from sbi_flows.artefact.strict import (
    expect_fields,
    expect_integer,
    expect_list,
    expect_type,
    parse_json,
    to_json,
)
from sbi_flows.core.errors import ArtefactError

MAX_HEADER_BYTES = 2**22
"""Maximum size of the header in bytes. Parsing needs about twenty times this memory."""

MAX_FILE_BYTES = 2**34

MAX_AXES = 16

READ_BYTES = 2**20
"""Size in bytes of the blocks in which the file is read to compute the hash."""

KEY = "sbi_flows"
"""Key of the document in the metadata."""

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
    """Dtype, shape and position of one tensor: a row of the table of tensors.

    Attributes:
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
        start: Position of the first byte of the tensor, counted from the first byte of all tensors.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """Show dtype and shape, for error messages."""
        return f"{self.dtype.name}{list(self.shape)}"


class ArtefactFile:
    """An open file of a posterior.

    The constructor verifies the header and the hash. `tensor` then reads one tensor at a time.

    Args:
        file: A regular file, open for reading.

    Attributes:
        document: The JSON document without its hash.
        table: Dict from the name of each tensor to its dtype, shape and position.

    Raises:
        ArtefactError: The file is malformed or too large, or its hash does not match its content.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Read the header and verify the hash; tensors are read in blocks to limit the memory."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArtefactError("expected a file on a disk, got something else")
        expect_integer("size in bytes", status.st_size, 10, MAX_FILE_BYTES)
        self._file = file
        length = expect_integer(
            "length of the header",
            int.from_bytes(self._read(0, 8), "little"),
            2,
            min(MAX_HEADER_BYTES, status.st_size - 8),
        )
        self._begin, self._size = 8 + length, status.st_size - 8 - length
        try:
            header = self._read(8, length).decode()
        except UnicodeDecodeError as error:
            raise ArtefactError(f"header: expected UTF-8, got {error}") from None
        table = expect_type("header", parse_json(header, "header"), dict, "an object")
        (text,) = expect_fields("metadata", table.pop("__metadata__", None), KEY)
        text = expect_type("document", text, str, "text")
        self.table = _entries(table, self._size)
        self._verify(text)
        self.document = parse_json(text, "document")
        del self.document["sha256"]

    def tensor(self, name: str) -> np.ndarray:
        """Read the tensor with this name, which must be in the table."""
        entry = self.table[name]
        array = np.empty(entry.shape, entry.dtype)
        flat = array.reshape(-1).view(np.uint8)
        self._file.seek(self._begin + entry.start)
        if self._file.readinto(flat) != entry.size:  # type: ignore[attr-defined]  # of real files
            raise ArtefactError(f"{name}: the file has become shorter while it was read")
        if entry.dtype == np.bool_ and np.any(flat > 1):
            raise ArtefactError(f"{name}: expected truth values, got other bytes")
        return array

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(size)
        if len(data) != size:
            raise ArtefactError("the file has become shorter while it was read")
        return data

    def _verify(self, text: str) -> None:
        """Raise ArtefactError if the hash in the document does not match the file's content."""
        claimed = text[len(_FIRST) : len(_FIRST) + 64]
        blank = text.replace(claimed, _BLANK, 1)
        if not blank.startswith(_FIRST + _BLANK + '",'):
            raise ArtefactError("document: expected a SHA-256 at its beginning, got none")
        digest = _digest(blank, self.table)
        for start in range(0, self._size, READ_BYTES):
            digest.update(self._read(self._begin + start, min(READ_BYTES, self._size - start)))
        if digest.hexdigest() != claimed:
            raise ArtefactError(
                f"expected SHA-256 {claimed!r}, got {digest.hexdigest()}: the file is not what was "
                "written"
            )


def pack(document: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Convert a document and tensors to the bytes of a file. Equal content gives equal bytes.

    Args:
        document: The JSON document, without its hash.
        tensors: Arrays by name.

    Raises:
        ValueError: The header is too long, or the file format does not support a dtype.
    """
    text = _FIRST + _BLANK + '",' + to_json(dict(document))[1:]
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    for name, array in tensors.items():
        if array.dtype not in names or array.dtype.byteorder == ">":
            raise ValueError(f"{name}: expected one of {sorted(DTYPES)}, got {array.dtype}")
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    head = save(arrays, metadata={KEY: text})
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"the record of the posterior: expected at most {MAX_HEADER_BYTES} bytes, got {length}"
        )
    begin = 8 + length
    header = parse_json(head[8:begin].decode(), "header")
    del header["__metadata__"]
    digest = _digest(text, _entries(header, len(head) - begin))
    digest.update(memoryview(head)[begin:])
    return head[:begin].replace(_BLANK.encode(), digest.hexdigest().encode(), 1) + head[begin:]


def _digest(text: str, table: Mapping[str, Entry]) -> Any:
    """Return a SHA-256 hash object to which the document and the table were added."""
    rows = [[name, e.dtype.name, list(e.shape), e.start] for name, e in sorted(table.items())]
    return hashlib.sha256(f"{text}\n{to_json(rows)}\n".encode())


def _entries(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """Check the table of tensors. The tensors must fill `size` bytes without gaps or overlaps.

    Args:
        header: The JSON header without `__metadata__`.
        size: Number of bytes in the file after the header.
    """
    table, ends = {}, {}
    for name, value in header.items():
        kind, shape, offsets = expect_fields(name, value, "dtype", "shape", "data_offsets")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ArtefactError(f"{name}: expected a dtype of {sorted(DTYPES)}, got {kind!r:.40}")
        sizes = expect_list(f"{name}: shape", shape, MAX_AXES)
        shape = tuple(expect_integer(f"{name}: shape", n, 0, MAX_FILE_BYTES) for n in sizes)
        if len(expect_list(f"{name}: data_offsets", offsets, 2)) != 2:
            raise ArtefactError(f"{name}: expected the first and the last byte, got {offsets}")
        start, end = (expect_integer(f"{name}: data_offsets", o, 0, size) for o in offsets)
        entry = Entry(np.dtype(DTYPES[kind]), shape, start)
        if end - start != entry.size:
            raise ArtefactError(f"{name}: expected {entry.size} bytes for {entry}, got {offsets}")
        table[name], ends[name] = entry, end
    position = 0
    for name in sorted(table, key=lambda name: (table[name].start, ends[name])):
        if table[name].start != position:
            raise ArtefactError(
                f"{name}: expected it to begin at byte {position}, after the tensor before it"
            )
        position = ends[name]
    if position != size:
        raise ArtefactError(f"tensors: expected {size} bytes of them, got {position}")
    return table

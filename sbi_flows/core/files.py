"""Atomic writing of files.

Public name: `atomic_file`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write whose content appears at `path` only when it is complete.

    An older file of the same name stays until then, and stays for good if the block raises an
    error. No reader ever sees a part of the new content.

    Args:
        path: Where the file will be.

    Yields:
        The file, open for writing bytes.

    Raises:
        OSError: The file cannot be written.
    """
    # a random name: two processes that write the same file at once do not mix their content
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

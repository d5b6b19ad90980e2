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
    """Open a file for writing that appears at `path` only when its content is complete.

    Until then, an older file at `path` remains unchanged. If the `with` block raises an error, the
    older file remains. Other processes never read an incomplete file.

    Args:
        path: Final path of the file.

    Yields:
        The file, open for writing bytes.

    Raises:
        OSError: The file cannot be written.
    """
    # the random name separates two processes that write the same file at the same time
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""Checksums that detect changes of stored arrays.

Public name: `checksum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Compute the SHA-256 checksum of named arrays.

    It depends on names, dtypes, shapes and values, but not on the order of the arrays.

    Args:
        arrays: Arrays by name.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{value.dtype.str}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()

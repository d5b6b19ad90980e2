"""Checksums of arrays, which show that stored arrays were not changed.

Public name: `checksum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Compute the SHA-256 of named arrays: names, dtypes, shapes and values, in any order.

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

"""Whether arrays are those that were written.

Public name: `checksum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays, their types and their shapes, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{value.dtype.str}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()

"""Codec of the fingerprints of simulations that a fit or a correction used.

The tensor is optional, because files of earlier versions have none.

Public names: `ROWS`, `require_rows`, `require_hashes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.core.errors import ArtefactError
from sbi_flows.simulations.fingerprints import MAX_HASHES, UsedRows

ROWS = "used_rows"
"""Name of the tensor."""


def require_rows(name: str, table: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the tuple (name,) if the tensor is in the table of a file; otherwise an empty tuple.

    Raises:
        ArtefactError: The tensor has a wrong shape or dtype.
    """
    entry = table.get(name)
    if entry is None:
        return ()
    is_list = len(entry.shape) == 1 and 1 <= entry.shape[0] <= MAX_HASHES
    if entry.dtype != np.dtype(np.uint64) or not is_list:
        raise ArtefactError(
            f"{name}: expected a tensor of uint64 [1 to {MAX_HASHES}], got {entry!s}"
        )
    return (name,)


def require_hashes(name: str, hashes: np.ndarray) -> UsedRows:
    """Return the fingerprints; raise ArtefactError unless they are strictly increasing."""
    if np.any(hashes[1:] <= hashes[:-1]):
        raise ArtefactError(f"{name}: expected numbers that increase, got others")
    return UsedRows(hashes)

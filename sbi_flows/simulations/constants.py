"""Warning about observations that are the same in all simulations.

Public names: `warn_constant`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.typing import Obs
from sbi_flows.core.warn import warn_user

MIN_ROWS = 100
"""Minimum number of valid rows for a warning. Fewer rows may lack a rare value by chance."""

_BLOCK_ROWS = 1024
"""Number of rows that are compared at once. The first block usually contains different values."""


def warn_constant(theta: Any, x: Obs, valid: Any) -> bool:
    """Warn if all entries of an array of x are the same in all valid rows, although theta varies.

    Arrays of which only some entries are constant, such as padding or the start of a time series,
    cause no warning.

    Args:
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event), or a dict of such arrays.
        valid: Whether each row is valid, shape (N,).

    Returns:
        Whether there was a warning, and all arrays of x are constant.
    """
    valid = np.asarray(valid)
    count = int(np.sum(valid))
    if count < MIN_ROWS or _is_constant(theta, valid):
        return False
    leaves = [(p, a) for p, a in jax.tree_util.tree_leaves_with_path(x) if a.size]
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") or "x"
        for path, leaf in leaves
        if _is_constant(leaf, valid)
    ]
    if names:
        warn_user(
            f"{', '.join(names)}: expected values that differ between simulations, got the same in "
            f"all {count:,}; compute them from theta and key, or leave constants out of x",
            SbiFlowsWarning,
        )
    return len(names) == len(leaves)


def _is_constant(array: Any, valid: np.ndarray) -> bool:
    """Return whether the valid rows of an array, in memory or on disk, are equal."""
    first = None
    # blocks are read one by one: an array on an accelerator or on disk is not copied as a whole
    for start in range(0, len(valid), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = np.asarray(array[rows])[valid[rows]]
        if first is None and len(block):
            first = block[:1]
        if len(block) and not np.all((block == first) | ((block != block) & (first != first))):
            return False
    return True

"""Rows that a user adds to a store: checks, conversion and division into chunks.

Public names: `StoredLayout`, `Extension`, `as_extension`, `extension_chunks`, `unknown_origin`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.labels import labels as entry_labels
from sbi_flows.core.warn import warn_user
from sbi_flows.simulations.arrays import usable_rows
from sbi_flows.simulations.numbered import Chunk
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.worker import to_named

MARKED_INVALID = "was marked invalid when it was added to the store"
"""Reason of a failed row whose observation is finite."""


class StoredLayout(NamedTuple):
    """Layout of the rows of a store.

    Attributes:
        labels: Names of the D parameters; None for a new store.
        arrays: Shape of a row and dtype of each array of x, by name; None for a new store.
        theta: Parameters of all rows, shape (N, D); None for a store without rows.
    """

    labels: list[str] | None = None
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None
    theta: np.ndarray | None = None


class Extension(NamedTuple):
    """Checked rows that are to be added to a store.

    Attributes:
        labels: Names of the D parameters.
        theta: Parameters in the order of the labels and in the dtype of the store, shape (n, D).
        x: Arrays of the observations, by name; they may be on disk.
        dtypes: Dtype in which each array of x is stored, by name.
        valid: Whether each row is valid, shape (n,).
        missing: Whether NaN in x marks a missing entry.
    """

    labels: list[str]
    theta: np.ndarray
    x: dict[str, Any]
    dtypes: dict[str, np.dtype]
    valid: np.ndarray
    missing: bool


def as_extension(simulations: Simulations, stored: StoredLayout) -> Extension:
    """Check that simulations fit a store, and match their columns with its parameters by name.

    Raises:
        ValueError: Names, shapes or dtypes differ from those of the store; x is neither an array
            nor a dict of arrays; or the simulations are of sequential rounds.
    """
    if np.any(np.asarray(simulations.round) != 0):
        raise ValueError(
            "simulations: expected draws from the prior of the store, got rounds of sequential "
            "inference, whose parameters come from other distributions"
        )
    labels, theta = _theta(simulations, stored.labels)
    if stored.theta is not None:
        _require_cast("theta", theta.dtype, stored.theta.dtype)
        theta = theta.astype(stored.theta.dtype, copy=False)
        _warn_of_repeated_rows(theta, stored.theta)
    x = to_named(simulations.x)
    if not all(isinstance(n, str) and hasattr(a, "shape") for n, a in x.items()):
        raise ValueError("x: expected an array or a dict of arrays with names as keys")
    own = {n: (tuple(a.shape[1:]), _stored_dtype(np.dtype(a.dtype))) for n, a in x.items()}
    expected = own if stored.arrays is None else dict(stored.arrays)
    shapes = [{n: shape for n, (shape, _) in arrays.items()} for arrays in (expected, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"x: expected arrays of the shapes {shapes[0]}, got {shapes[1]}")
    for name, (_, dtype) in expected.items():
        _require_cast(f"x {name}".strip(), np.dtype(x[name].dtype), dtype)
    dtypes = {name: dtype for name, (_, dtype) in expected.items()}
    return Extension(labels, theta, x, dtypes, np.asarray(simulations.valid), simulations.missing)


def extension_chunks(extension: Extension, start: int, chunk_rows: int) -> Iterator[Chunk]:
    """Yield the rows of an extension in chunks.

    Args:
        extension: The rows.
        start: Row number of the first row in the store.
        chunk_rows: Maximum number of rows in a chunk.
    """
    for first in range(0, len(extension.theta), chunk_rows):
        rows = slice(first, min(first + chunk_rows, len(extension.theta)))
        x = {n: np.asarray(a[rows]).astype(extension.dtypes[n]) for n, a in extension.x.items()}
        usable = usable_rows(x, missing=extension.missing)
        marked = np.flatnonzero(~extension.valid[rows] & usable)
        reasons = {start + first + int(row): MARKED_INVALID for row in marked}
        yield Chunk(start + first, extension.theta[rows], x, reasons)


def unknown_origin(extension: Extension) -> dict[str, Any]:
    """Return the parts of a new store's schema for rows whose key and simulator are not known."""
    shapes = {n: [list(a.shape[1:]), extension.dtypes[n].str] for n, a in extension.x.items()}
    return {
        "key": None,
        "prior": {"labels": extension.labels, "draws": None},
        "simulator": {"name": None, "outputs": shapes},
    }


def _theta(simulations: Simulations, labels: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Return the labels of a store and the parameters (n, D) in their order."""
    theta, names = np.asarray(simulations.theta), simulations.names.theta
    if labels is None:
        return list(names or entry_labels("theta", theta.shape[1:])), theta
    if theta.shape[1] != len(labels):
        raise ValueError(
            f"theta: expected {len(labels)} columns, {', '.join(labels)}, got {theta.shape[1]}"
        )
    if names is None:
        return list(labels), theta
    if sorted(names) != sorted(labels):
        raise ValueError(
            f"theta: expected the columns {', '.join(labels)} of the store, got {', '.join(names)}"
        )
    return list(labels), theta[:, [names.index(label) for label in labels]]


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    """Return a dtype that zarr can store: formats without a NumPy name become float32."""
    return dtype if dtype.kind in "biuf" else np.dtype(np.float32)


def _require_cast(title: str, dtype: np.dtype, stored: np.dtype) -> None:
    """Raise ValueError unless the stored dtype represents all values of another dtype."""
    if not np.can_cast(dtype, stored, "safe"):
        raise ValueError(
            f"{title}: expected numbers that fit into {stored} of the store, got {dtype}; convert "
            "them, or use another store"
        )


def _warn_of_repeated_rows(theta: np.ndarray, stored: np.ndarray) -> None:
    """Warn if parameters are in the store already: simulations with one key are the same."""
    known = {row.tobytes() for row in stored}
    count = sum(row.tobytes() in known for row in theta)
    if count:
        warn_user(
            f"theta: {count:,} of {len(theta):,} rows have the same parameters as rows of the "
            "store; use another random key for other simulations, and add each set once",
            SbiFlowsWarning,
        )

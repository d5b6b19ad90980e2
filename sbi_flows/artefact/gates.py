"""Codec of the gate, a test that flags observations which are unlike the training simulations.

The gate is saved as arrays that summarise the training simulations, such as centre and scale.

Public names: `encode`, `names`, `decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.core.errors import ArtefactError
from sbi_flows.observations.spaces import Moments
from sbi_flows.observations.typicality import Typicality

MAX_SPACES = 2
"""Maximum number of spaces in which an observation is compared with the training simulations: the
features, and the output of the embedding."""

_PREFIX = "typicality"


def encode(typicality: Typicality | None, tensors: Tensors) -> int:
    """Add the arrays of a gate to `tensors`, the arrays to be saved.

    Returns:
        Number of spaces in which the gate compares observations with simulations; 0 for no gate.
    """
    if typicality is None:
        return 0
    tensors |= {f"{_PREFIX}/{name}": array for name, array in typicality.to_arrays().items()}
    return len(typicality.spaces)


def names(spaces: int, has_missing: bool) -> set[str]:
    """Return the names of the tensors of a gate.

    Args:
        spaces: Number of spaces of the gate.
        has_missing: Whether entries of an observation can be missing.
    """
    parts = [f"{i}.{part}" for i in range(spaces) for part in (*Moments._fields, "rows")]
    return {f"{_PREFIX}/{name}" for name in (*parts, *_rows(spaces, has_missing))}


def _rows(spaces: int, has_missing: bool) -> list[str]:
    """Return the names of the arrays with one entry for each reference row."""
    return ["reference", *["present"] * has_missing] if spaces else []


def decode(
    spaces: int,
    has_missing: bool,
    widths: Sequence[int],
    table: Mapping[str, Entry],
    read: Callable[[str], np.ndarray],
) -> Typicality | None:
    """Read a gate.

    Args:
        spaces: Number of spaces of the gate, or 0 for no gate.
        has_missing: Whether entries of an observation can be missing.
        widths: Dimension of each space: number of features, and length of the embedding's output.
        table: Table of the tensors in the file, including the tensors of the gate.
        read: Function that maps the name of a tensor to its array.

    Raises:
        ArtefactError: A tensor has a wrong shape or dtype, or contains invalid numbers.
    """
    if not spaces:
        return None
    if spaces != len(widths):
        raise ArtefactError(f"{_PREFIX}: expected {len(widths)} spaces, got {spaces}")
    references, _ = _require("reference", np.float64, (None, 2 + 2 * spaces), table)
    if has_missing:
        _require("present", np.float64, (references,), table)
    for i, width in enumerate(widths):
        (count,) = _require(f"{i}.variances", np.float64, (None,), table)
        _require(f"{i}.center", np.float64, (width,), table)
        _require(f"{i}.scale", np.float64, (width,), table)
        _require(f"{i}.directions", np.float64, (count - 1, width), table)
        _require(f"{i}.rows", np.float32, (None, width), table)
    arrays = {
        name.removeprefix(f"{_PREFIX}/"): read(name) for name in sorted(names(spaces, has_missing))
    }
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ArtefactError(f"{_PREFIX}/{name}: expected finite numbers, got others")
        if name.endswith((".scale", ".variances")) and np.any(array <= 0.0):
            raise ArtefactError(f"{_PREFIX}/{name}: expected positive numbers, got others")
    return Typicality.from_arrays(arrays)


def _require(
    name: str, dtype: type, shape: tuple[int | None, ...], table: Mapping[str, Entry]
) -> tuple[int, ...]:
    """Check dtype and shape of a tensor, and return its shape.

    Args:
        name: Name of the tensor.
        dtype: The expected dtype.
        shape: The expected shape; None means any positive length of this axis.
        table: Table of the tensors in the file.
    """
    name = f"{_PREFIX}/{name}"
    entry = table.get(name)
    if (
        entry is None
        or entry.dtype != np.dtype(dtype)
        or len(entry.shape) != len(shape)
        or any(n < 1 if m is None else n != m for n, m in zip(entry.shape, shape, strict=True))
    ):
        wanted = f"{np.dtype(dtype).name}{['any' if n is None else n for n in shape]}"
        raise ArtefactError(f"{name}: expected a tensor {wanted}, got {entry or 'none'!s}")
    return entry.shape

"""Join several sets of simulations row by row.

Public names: `concatenate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core import doubles
from sbi_flows.core.doubles import as_data_array
from sbi_flows.core.pytrees import describe_arrays
from sbi_flows.prior.prior import PriorLike, as_prior
from sbi_flows.simulations.arrays import MAX_INDEX
from sbi_flows.simulations.disk import ON_DISK, JoinedArray, keep_on_disk
from sbi_flows.simulations.simulations import Simulations


def concatenate(parts: Sequence[Any], *, prior: PriorLike | None = None) -> Simulations:
    """Join simulations row by row, for example those of several machines.

    Failed rows stay invalid and rounds are kept. Columns with names are matched by name and put in
    the order of the first part. A joined array is in double precision if the array of any part is.
    Arrays on disk stay on disk: the result reads the rows of each part from its own files.

    Args:
        parts: List of `Simulations` of one simulator; their observations have the same arrays and
            shapes.
        prior: Prior whose parameters define the order of the columns of theta. It is required if
            only some parts have names. Columns without names must be in the order of the prior.

    Raises:
        ValueError: There are no parts, a part is not a `Simulations`, theta or x have other shapes,
            or columns have other names; the message says what differs.

    Example:
        >>> import numpy as np
        >>> first = Simulations({"a": np.zeros(2), "b": np.ones(2)}, np.zeros((2, 3)))
        >>> second = Simulations({"b": np.ones(1), "a": np.zeros(1)}, np.full((1, 3), np.nan))
        >>> joined = concatenate([first, second])
        >>> joined
        Simulations(N=3, D=2 (a, b), x=float32[3], invalid=1)
        >>> joined.theta[2].tolist()
        [0.0, 1.0]
    """
    parts = list(parts)
    for i, part in enumerate(parts):
        if not isinstance(part, Simulations):
            raise ValueError(f"parts[{i}]: expected Simulations, got {type(part).__name__}")
    if not parts:
        raise ValueError("parts: expected at least one Simulations, got none")
    if prior is not None:
        checked = as_prior(prior)
        parts = [part.aligned(checked) for part in parts]
    rows = sum(map(len, parts))
    if rows > MAX_INDEX:
        raise ValueError(f"parts: expected at most {MAX_INDEX:,} rows, got {rows:,}")
    # of parts that are aligned with a prior, those without names are in the same order
    named = [part for part in parts if part.names.theta is not None]
    first = named[0] if named and prior is not None else parts[0]
    arrays = [_matching_leaves(i, part, first, prior) for i, part in enumerate(parts)]
    joined = [_joined(leaves) for leaves in zip(*arrays, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first), joined)


def _matching_leaves(
    i: int, part: Simulations, first: Simulations, prior: PriorLike | None
) -> list[Any]:
    """Return the arrays of a part, with named columns in the order of the first part.

    Raises:
        ValueError: The part does not match the first part.
    """
    shapes, expected = describe_arrays(part.x), describe_arrays(first.x)
    same = jax.tree.structure(part.x) == jax.tree.structure(first.x)
    if not same or not all(jax.tree.leaves(jax.tree.map(_has_row_shape, part.x, first.x))):
        raise ValueError(f"parts[{i}]: expected x={expected} as in the first part, got x={shapes}")
    if part.missing != first.missing:
        raise ValueError(
            f"parts[{i}]: expected missing={first.missing} as in the first part, got "
            f"missing={part.missing}"
        )
    columns, dim = part.theta.shape[1], first.theta.shape[1]
    if columns != dim:
        raise ValueError(f"parts[{i}]: expected {dim} columns of theta, got {columns}")
    theta, x = part.theta, part.x
    if not (prior is not None and part.names.theta is None):
        remedy = "; give the prior as well: concatenate(parts, prior=prior)"
        order = _order(f"parts[{i}]: theta", part.names.theta, first.names.theta, remedy)
        theta = theta if order is None else theta[:, order]
    remedy = "; convert tables of observations with to_numpy()"
    order = _order(f"parts[{i}]: x", part.names.x, first.names.x, remedy)
    x = x if order is None else jax.tree.map(lambda leaf: leaf[:, order], x)
    return [theta, *jax.tree.leaves(x), part.valid, part.round]


def _has_row_shape(array: Any, first: Any) -> bool:
    return array.shape[1:] == first.shape[1:]


def _order(
    title: str, names: tuple[str, ...] | None, expected: tuple[str, ...] | None, remedy: str
) -> np.ndarray | None:
    """Return the places of the expected columns; None if they are in this order already.

    Raises:
        ValueError: The names differ, or only one of both has names.
    """
    if names == expected:
        return None
    if names is None or expected is None:
        what = ["no names" if each is None else ", ".join(each) for each in (expected, names)]
        raise ValueError(
            f"{title}: expected columns with names in all parts or in none, got {what[0]} in the "
            f"first part and {what[1]}{remedy}"
        )
    if sorted(names) != sorted(expected):
        raise ValueError(
            f"{title}: expected the columns {', '.join(expected)}, got {', '.join(names)}"
        )
    return np.array([names.index(name) for name in expected])


def _joined(leaves: tuple[Any, ...]) -> Any:
    """Join arrays (N_i, *event); the result is on disk or in double precision if any of them is."""
    is_double = any(leaf.dtype == np.float64 for leaf in leaves) and doubles.is_single_precision()
    if any(isinstance(leaf, ON_DISK) for leaf in leaves):
        joined = JoinedArray(leaves)
        return joined if is_double else keep_on_disk(joined)
    # on the host: JAX would compile a program for each number of rows
    whole = np.concatenate([np.asarray(leaf) for leaf in leaves])
    return whole if is_double else jnp.asarray(as_data_array("x", whole))

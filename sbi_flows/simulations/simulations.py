"""Simulations: a frozen pytree of parameters and observations, in memory or on disk.

Public names: `Simulations`, `unchecked_simulations`, `observation_shape`, `as_parameters`,
`finite_rows`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from sbi_flows.core.checks import (
    as_array,
    as_real_array,
    as_real_tree,
    require_memory,
    require_real,
)
from sbi_flows.core.compilation import bounded
from sbi_flows.core.typing import Obs
from sbi_flows.simulations.disk import (
    ON_DISK,
    LazyArray,
    finite_rows_on_disk,
    from_pickle,
    is_on_disk,
    keep_on_disk,
    to_pickle,
)

MAX_INDEX = 2**31 - 1
"""Maximum number of rows, and of entries in a row: the largest 32-bit index."""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Simulations:
    """Pairs of parameters and simulated observations.

    Failed rows stay in the data set and are marked invalid, so that they can be counted.

    Observations that do not fit in memory can stay on disk: pass a memory-mapped array, as returned
    by `np.load("x.npy", mmap_mode="r")` or `np.memmap`, or use a `SimulationStore`. Training then
    reads the observations in parts. A pickle contains the paths of the files, not their content.

    Attributes:
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event), or a dict of such arrays. The dtype is the same whether
            the arrays are in memory or on disk.
        valid: Whether each row is valid, shape (N,). A row is valid if its observation is finite
            and the argument `valid`, if given, is true for the row.
        round: Round of sequential inference in which each row was simulated, shape (N,). It is zero
            if the inference is not sequential.

    Raises:
        ValueError: The arrays have different numbers of rows, theta is not a finite (N, D) array, x
            is empty, or x does not contain real numbers.

    Example:
        >>> import numpy as np
        >>> sims = Simulations(np.zeros((3, 2)), np.array([[1.0], [np.nan], [2.0]]))
        >>> sims
        Simulations(N=3, D=2, x=float32[1], invalid=1)
    """

    theta: Array
    x: Obs
    valid: Array
    round: Array

    def __init__(
        self, theta: Any, x: Obs, *, valid: Any | None = None, round: Any | None = None
    ) -> None:
        """Check the user's arrays, and mark rows of x with NaN or infinity as invalid."""
        theta = as_parameters(theta)
        n = len(theta)
        x = as_real_tree("x", x, kept=ON_DISK)
        _require_rows(x, n)
        valid = np.ones(n, bool) if valid is None else _integers("valid", valid, n, 1)
        round = np.zeros(n, np.int32) if round is None else _integers("round", round, n, MAX_INDEX)
        _set_fields(self, theta, x, valid, round)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, for pickle and copy; arrays on disk as places in their files."""
        return {**vars(self), "x": jax.tree.map(to_pickle, self.x)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes, and open the files of arrays on disk."""
        vars(self).update(state, x=jax.tree.map(from_pickle, state["x"]))

    def __len__(self) -> int:
        """Number of rows N, including failed rows."""
        return len(self.theta)

    def __getitem__(self, rows: Any) -> Simulations:
        """Return simulations with the selected rows.

        Args:
            rows: A slice, an index array or a boolean mask.

        Raises:
            ValueError: `rows` has another type, or a row number is out of range.
        """
        if not isinstance(rows, Tracer):
            rows = _row_index(rows, len(self))
        return jax.tree.map(lambda leaf: _as_leaf(leaf[rows]), self)

    def __repr__(self) -> str:
        """Show the sizes, the shape of an observation and the number of failed rows."""
        leaves = [f"{a.dtype}{list(a.shape[1:])}" for a in jax.tree.leaves(self.x)]
        n, d = self.theta.shape
        invalid = n - self.num_valid
        return f"Simulations(N={n}, D={d}, x={', '.join(leaves)}, invalid={invalid})"

    @property
    def num_valid(self) -> int:
        """Number of valid rows."""
        return int(np.sum(np.asarray(self.valid)))

    @property
    def on_disk(self) -> bool:
        """Whether the observations are on disk. If so, training reads them in parts."""
        return is_on_disk(self.x)

    def only_valid(self) -> Simulations:
        """Return simulations with the valid rows only."""
        return self if self.num_valid == len(self) else self[np.flatnonzero(self.valid)]


_FIELDS = tuple(field.name for field in dataclasses.fields(Simulations))


def unchecked_simulations(theta: Array, x: Obs, valid: Any) -> Simulations:
    """Create simulations from arrays without a check.

    The caller ensures that theta (N, D) is finite and that x has N rows.

    Rows of x with NaN or infinity are marked invalid, as in `Simulations`.
    """
    simulations = object.__new__(Simulations)
    _set_fields(simulations, theta, x, valid, np.zeros(len(theta), np.int32))
    return simulations


def _set_fields(simulations: Simulations, theta: Array, x: Obs, valid: Any, round: Any) -> None:
    x = jax.tree.map(_as_leaf, x)
    finite = finite_rows_on_disk(x, finite_rows) if is_on_disk(x) else finite_rows(x)
    # operations on the host, and copies by device_put, compile no program for the number of rows
    valid = np.asarray(valid, bool) & np.asarray(finite)
    round = np.array(round, jnp.result_type(int))
    values = (theta, x, *jax.device_put((valid, round)))
    for name, value in zip(_FIELDS, values, strict=True):
        object.__setattr__(simulations, name, value)


def _children(simulations: Simulations) -> tuple[list[tuple[Any, Any]], None]:
    return [(jax.tree_util.GetAttrKey(n), getattr(simulations, n)) for n in _FIELDS], None


def _from_children(_: None, children: Any) -> Simulations:
    # without the constructor: it checks values, but the leaves may be tracers here
    simulations = object.__new__(Simulations)
    for name, value in zip(_FIELDS, children, strict=True):
        object.__setattr__(simulations, name, value)
    return simulations


jax.tree_util.register_pytree_with_keys(Simulations, _children, _from_children)


def _as_leaf(leaf: Any) -> Array | np.memmap | LazyArray:
    """Convert an array to a JAX array; return an array on disk unchanged."""
    if isinstance(leaf, ON_DISK):
        return keep_on_disk(leaf)
    return jnp.asarray(as_real_array("x", leaf))


@bounded
@jax.jit
def finite_rows(x: Obs) -> Array:
    """Return whether each of the N rows is finite in all leaves of x, shape (N,)."""
    rows = [jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim))) for a in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(rows), axis=0)


def observation_shape(x: Obs) -> Obs:
    """Return shape and dtype of one row of x, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)


def as_parameters(theta: Any) -> Array:
    """Convert theta to a finite float array (N, D).

    Raises:
        ValueError: theta is not a finite numeric array with two axes, or it is empty.
    """
    array = as_array("theta", theta)
    if array.ndim != 2 or array.dtype == np.bool_:
        raise ValueError(f"theta: expected a numeric array (N, D), got {array.dtype}{array.shape}")
    if not array.size:
        raise ValueError(f"theta: expected at least one row and column, got shape {array.shape}")
    require_real("theta", array.dtype)
    _require_sizes("theta", array.shape)
    values = np.asarray(as_real_array("theta", array)).astype(jnp.result_type(float), copy=False)
    not_finite = int(np.sum(~np.isfinite(values).all(axis=-1)))
    if not_finite:
        raise ValueError(f"theta: expected finite values, got {not_finite} rows with NaN or inf")
    return jnp.asarray(values)


def _require_rows(x: Obs, n: int) -> None:
    """Raise ValueError unless each leaf of x has n rows, and a row has at least one number."""
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(f"x: expected {n} rows as in theta, got shape {leaf.shape}")
        _require_sizes("x", leaf.shape)
    if not any(leaf.size for leaf in leaves):
        raise ValueError("x: expected at least one number in each row, got none")


def _require_sizes(name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the number of rows, or of entries in a row, exceeds `MAX_INDEX`."""
    if max(shape[0], math.prod(map(int, shape[1:]))) > MAX_INDEX:
        raise ValueError(
            f"{name}: expected at most {MAX_INDEX:,} rows, and numbers in each, got {shape}"
        )
    require_memory(f"{name}: a row", shape[1:], jnp.result_type(float))


def _integers(name: str, value: Any, n: int, most: int) -> np.ndarray:
    """Check and return n integers from 0 to `most`."""
    array = np.asarray(as_real_array(name, value))
    if array.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), got {array.shape}")
    if not np.all((array >= 0) & (array <= most) & (array == np.floor(array))):
        raise ValueError(f"{name}: expected whole numbers from 0 to {most:,}, got others")
    return array


def _row_index(rows: Any, n: int) -> np.ndarray | slice:
    """Convert an index array or a mask of n rows to an index array; return a slice unchanged."""
    if isinstance(rows, slice):
        try:
            rows.indices(n)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows: expected a slice of whole numbers, got {error}") from None
        return rows
    array = as_array("rows", rows)
    require_real("rows", array.dtype)
    array = np.asarray(array)
    if array.dtype == bool and array.shape == (n,):
        return np.flatnonzero(array)
    is_integer = array.dtype.kind in "iu" or not array.size
    if array.ndim != 1 or not is_integer:
        raise ValueError(
            f"rows: expected a slice or an index array, or {n} truth values, got "
            f"{array.dtype}{list(array.shape)}"
        )
    beyond = array[(array < -n) | (array >= n)]
    if beyond.size:
        raise ValueError(f"rows: expected numbers from {-n} to {n - 1}, got {beyond[0]}")
    return array.astype(np.int64)

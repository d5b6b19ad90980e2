"""Simulations as one frozen pytree, in memory or on disk.

Public names: `Simulations`, `Lazy`, `observation_shape`, `parameters`, `valid_rows`.
"""

from __future__ import annotations

import abc
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
from sbi_flows.core.typing import Obs

CHUNK = 2**24
"""Numbers of observations on disk that are looked at together."""

MOST = 2**31 - 1
"""Rows, and numbers in a row: what an index of 32 bits reaches."""


class Lazy(abc.ABC):
    """Abstract array whose rows are read when they are asked for.

    Attributes:
        shape: Its shape.
        dtype: Type of its numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @abc.abstractmethod
    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice or of these numbers, in memory."""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Simulations:
    """Pairs of parameters and simulated observations.

    Failed rows stay, marked invalid: they are counted and reported, never silently lost.

    Observations that are larger than memory stay on disk: give them memory-mapped, as
    `np.load("x.npy", mmap_mode="r")` or `np.memmap` do, or take them from a `SimulationStore`.
    Training then reads them in chunks.

    Attributes:
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event), or a dict of such arrays.
        valid: Whether a row's observation is finite throughout, and good to the user, shape (N,).
        round: Round that a row was simulated in, shape (N,); zero unless sequential.

    Raises:
        ValueError: Row counts differ, theta is not a finite (N, D) array, or x is empty or holds
            anything but real numbers.

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
        """Validate arrays that the user already has; rows that are not finite are never valid."""
        theta = parameters(theta)
        n = len(theta)
        x = as_real_tree("x", x, kept=_DISK)
        _require_rows(x, n)
        x = jax.tree.map(_held, x)
        finite = _finite_rows(x) if _on_disk(x) else valid_rows(x)
        valid = finite if valid is None else jnp.asarray(_whole("valid", valid, n, 1), bool)
        none = jnp.zeros(n, jnp.int32)
        rounds = none if round is None else jnp.asarray(_whole("round", round, n, MOST), int)
        for name, value in zip(_FIELDS, (theta, x, valid & finite, rounds), strict=True):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of rows N, failed ones included."""
        return len(self.theta)

    def __getitem__(self, rows: Any) -> Simulations:
        """The given rows (a slice or an index array) of every field.

        Raises:
            ValueError: `rows` is neither, or there are no such rows.
        """
        if not isinstance(rows, Tracer):
            rows = _numbers(rows, len(self))
        return jax.tree.map(lambda leaf: _held(leaf[rows]), self)

    def __repr__(self) -> str:
        """Sizes, the observation's shape and the number of failed rows."""
        leaves = [f"{a.dtype}{list(a.shape[1:])}" for a in jax.tree.leaves(self.x)]
        n, d = self.theta.shape
        invalid = n - self.num_valid
        return f"Simulations(N={n}, D={d}, x={', '.join(leaves)}, invalid={invalid})"

    @property
    def num_valid(self) -> int:
        """Number of rows with a finite observation."""
        return int(np.sum(self.valid))

    @property
    def on_disk(self) -> bool:
        """Whether the observations are on disk, and read in chunks."""
        return _on_disk(self.x)

    def only_valid(self) -> Simulations:
        """The rows with a finite observation."""
        return self if self.num_valid == len(self) else self[np.flatnonzero(self.valid)]


_FIELDS = tuple(field.name for field in dataclasses.fields(Simulations))


def _children(simulations: Simulations) -> tuple[list[tuple[Any, Any]], None]:
    return [(jax.tree_util.GetAttrKey(n), getattr(simulations, n)) for n in _FIELDS], None


def _from_children(_: None, children: Any) -> Simulations:
    # not through the constructor, which validates: a transformation puts tracers into the fields
    simulations = object.__new__(Simulations)
    for name, value in zip(_FIELDS, children, strict=True):
        object.__setattr__(simulations, name, value)
    return simulations


jax.tree_util.register_pytree_with_keys(Simulations, _children, _from_children)


_DISK = (np.memmap, Lazy)


def _on_disk(x: Obs) -> bool:
    return any(isinstance(leaf, _DISK) for leaf in jax.tree.leaves(x))


def _held(leaf: Any) -> Array | np.memmap | Lazy:
    """What is on disk stays there, as long as JAX can hold its numbers; else an array."""
    if not isinstance(leaf, _DISK):
        return jnp.asarray(as_real_array("x", leaf))
    require_real("x", leaf.dtype)
    return leaf if isinstance(leaf, Lazy) or _is_plain(leaf.dtype) else _Converted(leaf)


def _is_plain(dtype: np.dtype) -> bool:
    """Whether JAX takes such numbers from a disk as they are, and keeps their values."""
    wide = dtype.kind in "iu" and jax.dtypes.canonicalize_dtype(dtype) != dtype
    return dtype.isnative and dtype.kind in "biuf" and dtype.itemsize <= 8 and not wide


class _Converted(Lazy):
    """An array on disk whose numbers become others as they are read.

    Those in the other order of bytes; integers that would wrap round, and floats of more than 64
    bits, which become floats that JAX holds.
    """

    def __init__(self, array: np.memmap) -> None:
        self._array, self.shape = array, array.shape
        native = array.dtype.newbyteorder("=")
        self.dtype = native if _is_plain(native) else np.dtype(jnp.result_type(float))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice or of these numbers, in memory."""
        with np.errstate(over="ignore"):
            return np.asarray(self._array[rows]).astype(self.dtype)


def _finite_rows(x: Obs) -> Array:
    """What `valid_rows` says, a chunk at a time."""
    leaves = jax.tree.leaves(x)
    size = max(1, CHUNK // sum(math.prod(a.shape[1:]) for a in leaves))
    starts = range(0, len(leaves[0]), size)
    chunks = [valid_rows([jnp.asarray(a[i : i + size]) for a in leaves]) for i in starts]
    return jnp.concatenate(chunks)


@jax.jit
def valid_rows(x: Obs) -> Array:
    """Whether each row (first axis) of every leaf of x is finite; bool of shape (N,)."""
    rows = [jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim))) for a in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(rows), axis=0)


def observation_shape(x: Obs) -> Obs:
    """Shape and dtype of one row of x: the same tree, of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)


def parameters(theta: Any) -> Array:
    """Validate theta; a finite float array (N, D)."""
    given = as_array("theta", theta)
    if given.ndim != 2 or given.dtype == np.bool_:
        raise ValueError(f"theta: expected a numeric array (N, D), got {given.dtype}{given.shape}")
    if not given.size:
        raise ValueError(f"theta: expected at least one row and column, got shape {given.shape}")
    require_real("theta", given.dtype)
    _require_sizes("theta", given.shape)
    held = np.asarray(as_real_array("theta", given)).astype(jnp.result_type(float), copy=False)
    bad = int(np.sum(~np.isfinite(held).all(axis=-1)))
    if bad:
        raise ValueError(f"theta: expected finite values, got {bad} rows with NaN or inf")
    return jnp.asarray(held)


def _require_rows(x: Obs, n: int) -> None:
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(f"x: expected {n} rows as in theta, got shape {leaf.shape}")
        _require_sizes("x", leaf.shape)
    if not any(leaf.size for leaf in leaves):
        raise ValueError("x: expected at least one number in each row, got none")


def _require_sizes(name: str, shape: tuple[int, ...]) -> None:
    """Refuse more rows, or larger ones, than can be numbered; and a row beyond the memory."""
    if max(shape[0], math.prod(map(int, shape[1:]))) > MOST:
        raise ValueError(
            f"{name}: expected at most {MOST:,} rows, and numbers in each, got {shape}"
        )
    require_memory(f"{name}: a row", shape[1:], jnp.result_type(float))


def _whole(name: str, value: Any, n: int, most: int) -> np.ndarray:
    """Whole numbers (n,) from zero to `most`."""
    given = np.asarray(as_real_array(name, value))
    if given.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), got {given.shape}")
    if not np.all((given >= 0) & (given <= most) & (given == np.floor(given))):
        raise ValueError(f"{name}: expected whole numbers from 0 to {most:,}, got others")
    return given


def _numbers(rows: Any, n: int) -> np.ndarray | slice:
    """A slice as it is, or numbers of rows, of which there are n, from an index array or a mask."""
    if isinstance(rows, slice):
        try:
            rows.indices(n)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows: expected a slice of whole numbers, got {error}") from None
        return rows
    given = as_array("rows", rows)
    require_real("rows", given.dtype)
    given = np.asarray(given)
    if given.dtype == bool and given.shape == (n,):
        return np.flatnonzero(given)
    whole = given.dtype.kind in "iu" or not given.size
    if given.ndim != 1 or not whole:
        raise ValueError(
            f"rows: expected a slice or an index array, or {n} truth values, got "
            f"{given.dtype}{list(given.shape)}"
        )
    beyond = given[(given < -n) | (given >= n)]
    if beyond.size:
        raise ValueError(f"rows: expected numbers from {-n} to {n - 1}, got {beyond[0]}")
    return given.astype(np.int64)

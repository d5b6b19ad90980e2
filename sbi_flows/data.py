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

from sbi_flows.checks import real_array, real_arrays, require_real
from sbi_flows.typing import Obs

CHUNK = 16_384
"""Rows of observations on disk that are looked at together."""


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
        x = jax.tree.map(_held, x if _on_disk(x) else real_arrays("x", x))
        _require_rows(x, len(theta))
        finite = _finite_rows(x) if _on_disk(x) else valid_rows(x)
        valid = finite if valid is None else jnp.asarray(valid, bool)
        rounds = jnp.zeros(len(theta), jnp.int32) if round is None else jnp.asarray(round, int)
        if valid.shape != (len(theta),) or rounds.shape != (len(theta),):
            raise ValueError(f"valid and round: expected shape ({len(theta)},)")
        for name, value in zip(_FIELDS, (theta, x, valid & finite, rounds), strict=True):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of rows N, failed ones included."""
        return len(self.theta)

    def __getitem__(self, rows: Any) -> Simulations:
        """The given rows (a slice or an index array) of every field.

        Raises:
            ValueError: `rows` is a single number.
        """
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            raise ValueError(f"rows: expected a slice or an index array, got {rows!r}")
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


def _on_disk(x: Obs) -> bool:
    return any(isinstance(leaf, np.memmap | Lazy) for leaf in jax.tree.leaves(x))


def _held(leaf: Any) -> Array | np.memmap | Lazy:
    """What is on disk as it is, as long as JAX can hold its numbers; else an array."""
    if not isinstance(leaf, np.memmap | Lazy):
        return jnp.asarray(real_array("x", leaf))
    require_real("x", leaf.dtype)
    return leaf


def _finite_rows(x: Obs) -> Array:
    """What `valid_rows` says, a chunk at a time."""
    leaves = jax.tree.leaves(x)
    starts = range(0, len(leaves[0]), CHUNK)
    chunks = [valid_rows([jnp.asarray(a[i : i + CHUNK]) for a in leaves]) for i in starts]
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
    given = np.asarray(theta)
    if given.ndim != 2 or given.dtype == np.bool_:
        raise ValueError(f"theta: expected a numeric array (N, D), got {given.dtype}{given.shape}")
    if not given.size:
        raise ValueError(f"theta: expected at least one row and column, got shape {given.shape}")
    held = np.asarray(real_array("theta", given)).astype(jnp.result_type(float), copy=False)
    bad = int(np.sum(~np.isfinite(held).all(axis=-1)))
    if bad:
        raise ValueError(f"theta: expected finite values, got {bad} rows with NaN or inf")
    return jnp.asarray(held)


def _require_rows(x: Obs, n: int) -> None:
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(f"x: expected {n} rows as in theta, got shape {leaf.shape}")
    if not any(leaf.size for leaf in leaves):
        raise ValueError("x: expected at least one number in each row, got none")

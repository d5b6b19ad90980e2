"""Random patterns of missing entries, which a fit applies to its training simulations.

Public names: `MissingPattern`, `RandomEntries`, `RandomSubset`, `RandomParts`. Internal name:
`leaf_name`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_random_key, require_count, require_fraction
from sbi_flows.core.typing import Key, Obs
from sbi_flows.observations.standardise import entry_count, unflatten_rows

COMPLETE_SHARE, EMPTY_SHARE = 0.1, 0.05
"""Fraction of rows in which no entry (`RandomEntries`), and in which every entry is missing."""


class MissingPattern(abc.ABC):
    """Random choice of the entries that are missing.

    A fit hides different entries in every batch; compiled programs call `keep`. Calling the object
    hides entries of observations once, for checks and tests.
    """

    @abc.abstractmethod
    def check(self, like: Obs) -> None:
        """Raise ValueError if the pattern does not suit an observation of these shapes."""

    @abc.abstractmethod
    def keep(self, key: Key, like: Obs, n: int) -> Array:
        """Draw which entries of n observations are kept.

        Args:
            key: Random key.
            like: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
            n: Number of observations.

        Returns:
            True where an entry is kept, bool of shape (n, C), for flattened observations.
        """

    @abc.abstractmethod
    def can_hide(self, like: Obs) -> np.ndarray:
        """Return whether each entry of one observation can be hidden, bool of shape (C,)."""

    @abc.abstractmethod
    def unseen(self, present: np.ndarray, like: Obs) -> str:
        """Describe observations that the pattern never produces; return "" if there are none.

        Args:
            present: Whether each entry of B flattened observations is present, shape (B, C).
            like: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).

        Returns:
            What was expected and what came, such as "5 to 100 elements along axis 0, got 2".
        """

    def __call__(self, key: Key, x: Obs) -> Obs:
        """Replace entries of observations (N, *event) by NaN.

        Args:
            key: Random key.
            x: Observations, or a dict of them.

        Returns:
            The observations in floating point, with NaN where an entry is hidden.

        Raises:
            ValueError: The pattern does not suit the shapes of x.
        """
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a)[1:], float), x)
        self.check(like)
        leaves, tree = jax.tree.flatten(x)
        keep = self.keep(as_random_key("key", key), like, len(leaves[0]))
        shapes = tuple(np.shape(leaf)[1:] for leaf in leaves)
        return jax.tree.map(_keep, x, unflatten_rows(keep, tree, shapes))


@dataclasses.dataclass(frozen=True)
class RandomEntries(MissingPattern):
    """Hide each entry at random, independently of the others.

    In 10% of the rows nothing is hidden, and in 5% everything. In the other 85%, the probability of
    hiding an entry differs between rows: it is drawn from the distribution
    Beta(4 rate, 4 (1 - rate)), whose mean is `rate`. Thus the posterior is also trained for
    complete observations, for observations with few entries, and to return the prior if there are
    none.

    Attributes:
        rate: Mean fraction of hidden entries in the 85% of the rows, in [0, 1).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hidden = RandomEntries(0.2)(jax.random.key(0), jnp.ones((1000, 30)))
        >>> hidden.shape
        (1000, 30)
    """

    rate: float

    def __post_init__(self) -> None:
        """Raise ValueError unless the rate is in [0, 1)."""
        require_fraction(rate=self.rate)

    def check(self, like: Obs) -> None:
        """Accept any observation."""

    def can_hide(self, like: Obs) -> np.ndarray:
        """Return True for each entry; see `MissingPattern.can_hide`."""
        return np.ones(entry_count(like), bool)

    def unseen(self, present: np.ndarray, like: Obs) -> str:
        """Accept any observation."""
        return ""

    def keep(self, key: Key, like: Obs, n: int) -> Array:
        """Draw which entries are kept; see `MissingPattern.keep`."""
        entry_key, rate_key, kind_key = jax.random.split(key, 3)
        rate = jax.random.beta(rate_key, 4.0 * self.rate, 4.0 * (1.0 - self.rate), (n, 1))
        kind = jax.random.uniform(kind_key, (n, 1))
        rate = jnp.where(kind < COMPLETE_SHARE, 0.0, rate)
        rate = jnp.where(kind > 1.0 - EMPTY_SHARE, 1.0, rate)
        return jax.random.uniform(entry_key, (n, entry_count(like))) >= rate


@dataclasses.dataclass(frozen=True)
class RandomSubset(MissingPattern):
    """Keep a random number of elements along an axis: trials of a set, or points of a series.

    The number is drawn uniformly on a logarithmic scale between `smallest` and `largest`.

    Attributes:
        smallest: Smallest number of elements. With zero, one row in twenty is empty, and the others
            have at least one element.
        largest: Largest number of elements, at most the length of the axis.
        axis: Axis of one observation.
        part: Name of the array in a dict of arrays; None for an observation that is one array.
        order: "random" keeps consecutive elements from a random position on, and continues with the
            first element after the last one. For exchangeable elements, this is a random subset.
            "first" keeps the first elements, as in a series that ends early.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hidden = RandomSubset(5, 20)(jax.random.key(0), jnp.ones((3, 20, 2)))
        >>> hidden.shape
        (3, 20, 2)
    """

    smallest: int
    largest: int
    axis: int = 0
    part: str | None = None
    order: Literal["random", "first"] = "random"

    def __post_init__(self) -> None:
        """Raise ValueError if a number is out of range."""
        require_count(0, smallest=self.smallest, axis=self.axis)
        require_count(1, largest=self.largest)
        if self.smallest > self.largest:
            raise ValueError(
                f"smallest: expected at most largest={self.largest}, got {self.smallest}"
            )
        if self.order not in ("random", "first"):
            raise ValueError(f'order: expected "random" or "first", got {self.order!r}')

    def check(self, like: Obs) -> None:
        """Raise ValueError unless the array has the axis, with at least `largest` elements."""
        shape = self._shape(like)
        if self.axis >= len(shape) or shape[self.axis] < self.largest:
            raise ValueError(
                f"missing: expected an observation with at least {self.largest} elements along "
                f"axis {self.axis}, got shape {shape}"
            )

    def can_hide(self, like: Obs) -> np.ndarray:
        """Return whether each entry can be hidden; see `MissingPattern.can_hide`."""
        parts = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            can_hide = np.zeros(leaf.shape, bool)
            if self._is_chosen(path) and self.smallest < leaf.shape[self.axis]:
                first = self.smallest if self.order == "first" else 0
                np.moveaxis(can_hide, self.axis, 0)[first:] = True
            parts.append(can_hide.reshape(-1))
        return np.concatenate(parts)

    def keep(self, key: Key, like: Obs, n: int) -> Array:
        """Draw which entries are kept; see `MissingPattern.keep`."""
        parts = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            if self._is_chosen(path):
                keep = self._elements(key, n, leaf.shape[self.axis])
                shape = [n, *(1 for _ in leaf.shape)]
                shape[1 + self.axis] = leaf.shape[self.axis]
                keep = jnp.broadcast_to(keep.reshape(shape), (n, *leaf.shape)).reshape(n, -1)
            else:
                keep = jnp.ones((n, math.prod(leaf.shape)), bool)
            parts.append(keep)
        return jnp.concatenate(parts, axis=1)

    def unseen(self, present: np.ndarray, like: Obs) -> str:
        """Describe observations with other numbers of elements; see `MissingPattern.unseen`."""
        parts = _parts(present, like)
        name, part = next((n, p) for n, p in parts if self.part is None or self.part == n)
        part = np.moveaxis(part, 1 + self.axis, 1).reshape(
            *part.shape[:1], part.shape[1 + self.axis], -1
        )
        whole, some = part.all(axis=2), part.any(axis=2)
        where = f"{name}: " * bool(name)
        if np.any(whole != some):
            return (
                f"{where}expected elements along axis {self.axis} without missing entries, got NaN"
            )
        counts = whole.sum(axis=1)
        strange = (counts < self.smallest) | (counts > self.largest)
        if np.any(strange):
            return (
                f"{where}expected {self.smallest} to {self.largest} elements along axis "
                f"{self.axis}, got {counts[strange][0]}"
            )
        if self.order == "first" and np.any(np.diff(whole.astype(int), axis=1) > 0):
            return f"{where}expected elements without a gap before the last one, got NaN before it"
        return ""

    def _elements(self, key: Key, n: int, length: int) -> Array:
        """Draw which elements are kept, bool of shape (n, length)."""
        count_key, place_key, empty_key = jax.random.split(key, 3)
        least = max(self.smallest, 1)
        ends = math.log(least), math.log(self.largest + 1)
        logarithm = jax.random.uniform(count_key, (n, 1), minval=ends[0], maxval=ends[1])
        count = jnp.clip(jnp.floor(jnp.exp(logarithm)), least, self.largest)
        if self.smallest == 0:
            count = jnp.where(jax.random.bernoulli(empty_key, EMPTY_SHARE, (n, 1)), 0, count)
        number = jnp.arange(length)[None]
        if self.order == "random":
            number = (number + jax.random.randint(place_key, (n, 1), 0, length)) % length
        return number < count

    def _is_chosen(self, path: Any) -> bool:
        """Return whether the pattern is about the array with this path."""
        return self.part is None or self.part == leaf_name(path)

    def _shape(self, like: Obs) -> tuple[int, ...]:
        """Return the shape of the array; raise ValueError if there is no such array."""
        leaves = jax.tree_util.tree_leaves_with_path(like)
        names = [leaf_name(path) for path, _ in leaves]
        if self.part is None and len(leaves) > 1:
            raise ValueError(f"missing: expected part=, one of {names}, got None")
        if self.part is not None and self.part not in names:
            raise ValueError(f"missing: expected part= to be one of {names}, got {self.part!r}")
        return leaves[0 if self.part is None else names.index(self.part)][1].shape


@dataclasses.dataclass(frozen=True)
class RandomParts(MissingPattern):
    """Hide whole arrays of a dict at random, as when an instrument was off.

    Attributes:
        rate: Probability in [0, 1) of hiding an array, independently of the others. If all arrays
            are hidden, the posterior is trained to return the prior.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = {"image": jnp.ones((5, 4, 4)), "redshift": jnp.ones(5)}
        >>> RandomParts(0.5)(jax.random.key(0), x)["redshift"].shape
        (5,)
    """

    rate: float

    def __post_init__(self) -> None:
        """Raise ValueError unless the rate is in [0, 1)."""
        require_fraction(rate=self.rate)

    def check(self, like: Obs) -> None:
        """Raise ValueError unless the observation has several arrays."""
        count = len(jax.tree.leaves(like))
        if count < 2:
            raise ValueError(f"missing: expected an observation of several arrays, got {count}")

    def can_hide(self, like: Obs) -> np.ndarray:
        """Return True for each entry; see `MissingPattern.can_hide`."""
        return np.ones(entry_count(like), bool)

    def unseen(self, present: np.ndarray, like: Obs) -> str:
        """Describe arrays that are present in part; see `MissingPattern.unseen`."""
        for name, part in _parts(present, like):
            flat = part.reshape(len(part), -1)
            if np.any(flat.all(axis=1) != flat.any(axis=1)):
                return f"{name}: expected all entries or none, got NaN in some"
        return ""

    def keep(self, key: Key, like: Obs, n: int) -> Array:
        """Draw which entries are kept; see `MissingPattern.keep`."""
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(like)]
        keep = jax.random.uniform(key, (n, len(sizes))) >= self.rate
        return jnp.repeat(keep, np.asarray(sizes), axis=1, total_repeat_length=sum(sizes))


def _keep(leaf: Any, keep: Array) -> Any:
    """Replace entries of one array that are not kept by NaN; a NumPy array stays one."""
    if isinstance(leaf, np.ndarray):
        return np.where(np.asarray(keep), leaf, np.nan)
    return jnp.where(keep, leaf, jnp.nan)


def _parts(flat: np.ndarray, like: Obs) -> list[tuple[str, np.ndarray]]:
    """Split flattened observations (B, C) into named arrays (B, *shape)."""
    parts, start = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        size = math.prod(leaf.shape)
        parts.append((leaf_name(path), flat[:, start : start + size].reshape(-1, *leaf.shape)))
        start += size
    return parts


def leaf_name(path: Any) -> str:
    """Name of an array of an observation, such as "image"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")

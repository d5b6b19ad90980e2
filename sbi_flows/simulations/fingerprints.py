"""Fingerprints of simulations: one 64-bit hash per row, to recognise rows that were used before.

Public names: `fingerprints`, `UsedRows`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from sbi_flows.prior.base import Prior
from sbi_flows.simulations.disk import ON_DISK, row_slices
from sbi_flows.simulations.simulations import Simulations

MAX_HASHED_ENTRIES = 64
"""Maximum number of entries of each array that are hashed in a row; they are evenly spaced."""

MAX_HASHES = 1_000_000
"""Maximum number of hashes that are kept: 8 MB."""

_BLOCK_ROWS = 4096
"""Number of rows that are hashed at once, so that the intermediate arrays stay in the cache."""

_LEAF_STRIDE = 2**32
"""Distance between the numbers of the first entries of two arrays."""


class UsedRows(NamedTuple):
    """Hashes of rows that a fit or a correction used.

    If there are `MAX_HASHES` hashes, they are the smallest ones, a random sample of the rows.

    Attributes:
        hashes: Hashes, strictly increasing, uint64, shape (K,).
    """

    hashes: np.ndarray

    @classmethod
    def of(cls, simulations: Simulations, prior: Prior) -> UsedRows:
        """Return the hashes of the valid rows of simulations in the user's units."""
        hashes = fingerprints(simulations.aligned(prior))
        return cls._smallest(hashes[np.asarray(simulations.valid)])

    @classmethod
    def _smallest(cls, hashes: np.ndarray) -> UsedRows:
        return cls(np.unique(hashes)[:MAX_HASHES])

    @property
    def fraction(self) -> float:
        """Fraction of the used rows whose hashes are kept; 1 below `MAX_HASHES` rows."""
        if len(self.hashes) < MAX_HASHES:
            return 1.0
        # the hashes of all rows are uniformly distributed over the 64-bit numbers
        return float(self.hashes[-1]) / 2.0**64

    @property
    def count(self) -> int:
        """Number of used rows; an estimate if only a sample is kept."""
        return round(len(self.hashes) / self.fraction)

    def union(self, other: UsedRows | None) -> UsedRows:
        """Return the rows of both; None stands for no rows."""
        if other is None:
            return self
        limits = [rows.hashes[-1] for rows in (self, other) if rows.fraction < 1.0]
        hashes = np.concatenate([self.hashes, other.hashes])
        # hashes above the limit of a sample are known of one part only
        return self._smallest(hashes[hashes <= min(limits)] if limits else hashes)

    def among(self, simulations: Simulations, prior: Prior) -> np.ndarray:
        """Return which valid rows of simulations are used rows, bool, shape (N,).

        If only a sample of the hashes is kept, the result is True for rows in the sample only.
        """
        hashes = fingerprints(simulations.aligned(prior))
        if not len(self.hashes):
            return np.zeros(len(hashes), bool)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return (self.hashes[places] == hashes) & np.asarray(simulations.valid)

    def overlap(self, simulations: Simulations, prior: Prior) -> int:
        """Return the number of valid rows of simulations that are used rows.

        The number is exact for fewer than `MAX_HASHES` used rows. Otherwise it is estimated from
        the sample.
        """
        return self.count_among(self.among(simulations, prior), simulations)

    def count_among(self, found: np.ndarray, simulations: Simulations) -> int:
        """Return the number of used rows, as `overlap` does, given the result of `among`."""
        return min(round(int(np.sum(found)) / self.fraction), simulations.num_valid)


def fingerprints(simulations: Simulations) -> np.ndarray:
    """Compute a hash of theta and x for each row, uint64, shape (N,).

    Numbers are hashed as float64, so that copies in other dtypes with the same values have the same
    hashes. Both theta and x are hashed, because a repeated theta with new noise is a new row. Of
    each array in x, at most `MAX_HASHED_ENTRIES` entries are hashed.

    Args:
        simulations: The simulations, in memory or on disk.
    """
    n = len(simulations)
    leaves = [simulations.theta, *jax.tree.leaves(simulations.x)]
    hashes = np.zeros(n, np.uint64)
    for i, leaf in enumerate(leaves):
        array = leaf if isinstance(leaf, ON_DISK) else np.asarray(leaf)
        places = _hashed_places(array.shape, MAX_HASHED_ENTRIES if i else None)
        salts = _mixed(np.uint64(i * _LEAF_STRIDE + 1) + places.astype(np.uint64))
        for rows in row_slices([array]):
            block = array[rows]
            block = block.reshape(len(block), -1)
            _add_hashes(hashes[rows], block, places, salts)
    return _mixed(hashes)


def _hashed_places(shape: tuple[int, ...], most: int | None) -> np.ndarray:
    """Return the indices of the entries of a flattened row that are hashed."""
    size = int(np.prod(shape[1:]))
    count = size if most is None else min(size, most)
    return np.linspace(0, size - 1, count).astype(np.int64) if count else np.zeros(0, np.int64)


def _add_hashes(hashes: np.ndarray, block: Any, places: np.ndarray, salts: np.ndarray) -> None:
    """Add the hashes of the entries `places` of rows (n, C) to `hashes` (n,), in place."""
    for start in range(0, len(block), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        # adding zero turns -0.0 into 0.0, which equals it
        values = np.asarray(block[rows][:, places], np.float64) + 0.0
        hashes[rows] += _mixed(values.view(np.uint64) + salts).sum(axis=1, dtype=np.uint64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Map 64-bit numbers one to one to numbers that look random.

    References:
        Steele, Lea & Flood 2014, Fast Splittable Pseudorandom Number Generators (finaliser of
        SplitMix64).
    """
    numbers = numbers ^ (numbers >> np.uint64(30))
    numbers *= np.uint64(0xBF58476D1CE4E5B9)
    numbers ^= numbers >> np.uint64(27)
    numbers *= np.uint64(0x94D049BB133111EB)
    numbers ^= numbers >> np.uint64(31)
    return numbers

"""Rows that are read in chunks while a fit goes on, because they do not fit in memory.

Public names: `Stream`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key

BLOCK = 1024
"""Rows that are read as one: neighbours in a file, which is what disks are fast at."""

CHUNK = 64 * BLOCK
"""Rows of a chunk: many blocks from all over the file, shuffled together."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows to train on, in an order that depends on a key alone.

    Attributes:
        rows: Their numbers, in the order in which they are stored, shape (N,).
        sample: Numbers of those that are in memory.
        read: Standard coordinates (n, d) and features (n, C) of the rows of these numbers.
    """

    rows: np.ndarray
    sample: np.ndarray
    read: Callable[[np.ndarray], tuple[Array, Array]]

    @property
    def size(self) -> int:
        """Rows of each chunk."""
        return min(CHUNK, len(self.rows))

    @property
    def count(self) -> int:
        """Number of chunks in an epoch; the few rows that are left over are others each time."""
        return len(self.rows) // self.size

    def without(self, places: np.ndarray) -> Stream:
        """The stream without some rows of the sample, of which the places are given."""
        rows = np.setdiff1d(self.rows, self.sample[places], assume_unique=True)
        return dataclasses.replace(self, rows=rows)

    def chunks(self, key: Key) -> Iterator[tuple[Array, Array]]:
        """All chunks of an epoch; while one is worked on, the next one is read."""
        order = self._order(key)
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self.read, order[0])
            for rows in order[1:]:
                current, following = following, reader.submit(self.read, rows)
                yield current.result()
            yield following.result()

    def _order(self, key: Key) -> list[np.ndarray]:
        """Numbers of the rows of each chunk, in the order in which they are stored."""
        blocks = -(-len(self.rows) // BLOCK)
        order = np.asarray(jax.random.permutation(key, blocks))
        starts = [self.rows[b * BLOCK : (b + 1) * BLOCK] for b in order]
        chosen = np.concatenate(starts)[: self.count * self.size]
        return [np.sort(part) for part in np.split(chosen, self.count)]

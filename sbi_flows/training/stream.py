"""Stream of training rows that do not fit in memory and are read from disk in chunks.

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

BLOCK_ROWS = 1024
"""Number of neighbouring rows in a block. A block is read at once, because this is fast."""

CHUNK_ROWS = 64 * BLOCK_ROWS
"""Maximum number of rows in a chunk, which combines blocks from random positions in the file."""

CHUNK_BLOCKS = 16
"""Minimum number of blocks in a chunk."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """Training rows on disk, read in a random order that a key determines.

    Attributes:
        rows: Numbers of the rows to train on, ascending, shape (N,).
        sample: Numbers of the rows that are also in memory.
        read: Function that maps row numbers (n,) to standard coordinates (n, d) and features
            (n, C).
        max_rows: Maximum number of rows in a chunk; it limits the memory if rows are long.
        batch: Number of rows of which a chunk is a multiple, and has at least one.
    """

    rows: np.ndarray
    sample: np.ndarray
    read: Callable[[np.ndarray], tuple[Array, Array]]
    max_rows: int = CHUNK_ROWS
    batch: int = 1

    @property
    def chunk_size(self) -> int:
        """Number of rows in each chunk."""
        size = min(CHUNK_ROWS, self.max_rows)
        return min(max(self.batch, size - size % self.batch), len(self.rows))

    @property
    def num_chunks(self) -> int:
        """Number of chunks in an epoch.

        All chunks have the same size. The remaining rows, too few for a chunk, are not used in the
        epoch. They are different rows in each epoch.
        """
        return len(self.rows) // self.chunk_size

    def without(self, places: np.ndarray) -> Stream:
        """Return a stream that does not train on the rows `sample[places]`."""
        rows = np.setdiff1d(self.rows, self.sample[places], assume_unique=True)
        return dataclasses.replace(self, rows=rows)

    def chunks(self, key: Key) -> Iterator[tuple[Array, Array]]:
        """Yield all chunks of an epoch. While a chunk is used, a thread reads the next chunk."""
        order = self._order(key)
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self.read, order[0])
            for rows in order[1:]:
                current, following = following, reader.submit(self.read, rows)
                yield current.result()
            yield following.result()

    def _order(self, key: Key) -> list[np.ndarray]:
        """Distribute blocks over chunks at random; return the sorted row numbers of each chunk."""
        size = min(BLOCK_ROWS, max(1, self.chunk_size // CHUNK_BLOCKS))
        num_blocks = -(-len(self.rows) // size)
        order = np.asarray(jax.random.permutation(key, num_blocks))
        blocks = [self.rows[b * size : (b + 1) * size] for b in order]
        rows = np.concatenate(blocks)[: self.num_chunks * self.chunk_size]
        return [np.sort(part) for part in np.split(rows, self.num_chunks)]

"""Simulate numbered rows for a store; each row depends only on the key and its row number.

Public names: `Chunk`, `simulate_ranges`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.batching import plan_store_calls, simulate_call
from sbi_flows.simulations.executors import Executor, External, Row, Task
from sbi_flows.simulations.external import empty_outputs, external_tasks, put_row
from sbi_flows.simulations.worker import to_named

Range = tuple[int, int]
"""Range of row numbers: the first row number, and the last row number plus one."""


class Chunk(NamedTuple):
    """Simulations of consecutive rows.

    Attributes:
        start: Row number of the first row.
        theta: Parameters, shape (n, D).
        x: Arrays of the observations, by name; shape (n, *) each.
        reasons: Dict from the row number of a failed row to the reason of the failure.
    """

    start: int
    theta: np.ndarray
    x: dict[str, np.ndarray]
    reasons: dict[int, str]


def simulate_ranges(
    key: Key,
    prior: Prior,
    simulator: Simulator | External,
    ranges: Sequence[Range],
    chunk_rows: int,
    executor: Executor | None = None,
) -> Iterator[Chunk]:
    """Simulate ranges of rows in chunks; row i depends only on the key and on i.

    Args:
        key: Random key.
        prior: The prior.
        simulator: As for `simulate`, but wrapped by `with_current_state`.
        ranges: Ranges of row numbers to simulate.
        chunk_rows: Maximum number of rows in a chunk.
        executor: As for `simulate`.

    Yields:
        A chunk as soon as all of its rows are finished.
    """
    pieces = [
        (i, min(i + chunk_rows, stop))
        for start, stop in ranges
        for i in range(start, stop, chunk_rows)
    ]
    if isinstance(simulator, External):
        executor = simulator.executor if executor is None else executor
        yield from _external_chunks(key, prior, simulator, pieces, chunk_rows, executor)
    else:
        yield from _compiled_chunks(key, prior, simulator, pieces, chunk_rows)


def _compiled_chunks(
    key: Key, prior: Prior, simulator: Simulator, pieces: list[Range], chunk_rows: int
) -> Iterator[Chunk]:
    """Simulate chunks with a JAX simulator; one compiled call may simulate several chunks."""
    plan = plan_store_calls(chunk_rows)
    for group in _group(pieces, plan.rows):
        first = group[0][0]
        theta, keys = _draw_rows(prior, key, first, plan.rows)
        x = to_named(simulate_call(prior, simulator, keys, theta, plan.mesh))
        arrays = {name: np.asarray(value) for name, value in x.items()}
        for start, stop in group:
            rows = slice(start - first, stop - first)
            parts = {name: value[rows] for name, value in arrays.items()}
            yield Chunk(start, np.asarray(theta)[rows], parts, {})


def _group(pieces: list[Range], call_rows: int) -> Iterator[list[Range]]:
    """Group consecutive ranges such that each group spans at most `call_rows` rows."""
    group: list[Range] = []
    for start, stop in pieces:
        if group and stop - group[0][0] > call_rows:
            yield group
            group = []
        group.append((start, stop))
    if group:
        yield group


class _OpenChunks:
    """Unfinished chunks of an external simulator."""

    def __init__(self, key: Key, prior: Prior, simulator: External, chunk_rows: int) -> None:
        self._key, self._prior, self._simulator = key, prior, simulator
        self._chunk_rows = chunk_rows
        self._chunks: dict[int, Chunk] = {}
        self._unfinished: dict[int, int] = {}
        self._start_of_row: dict[int, int] = {}

    def tasks(self, pieces: list[Range]) -> Iterator[Task]:
        """Yield the tasks of all rows, chunk by chunk; a chunk is created before its first task."""
        for start, stop in pieces:
            drawn = _draw_rows(self._prior, self._key, start, self._chunk_rows)
            theta, keys = (array[: stop - start] for array in drawn)
            outputs = empty_outputs(self._simulator, stop - start)
            theta = self._prior.add_offset(theta)
            self._chunks[start] = Chunk(start, np.asarray(theta), outputs, {})
            self._unfinished[start] = stop - start
            self._start_of_row.update(dict.fromkeys(range(start, stop), start))
            yield from external_tasks(self._prior, theta, keys, start)

    def put(self, number: int, row: Row) -> Chunk | None:
        """Store the result of a row; return the chunk of the row if it is now complete."""
        start = self._start_of_row.pop(number)
        chunk = self._chunks[start]
        put_row(chunk.x, chunk.reasons, number, number - start, row)
        self._unfinished[start] -= 1
        if self._unfinished[start]:
            return None
        del self._unfinished[start]
        return self._chunks.pop(start)


def _external_chunks(
    key: Key,
    prior: Prior,
    simulator: External,
    pieces: list[Range],
    chunk_rows: int,
    executor: Executor,
) -> Iterator[Chunk]:
    """Run an external simulator for all chunks; yield each chunk when its last row is finished.

    The executor gets the rows of all chunks in one call, so that no worker waits between chunks.
    """
    chunks = _OpenChunks(key, prior, simulator, chunk_rows)
    tasks = chunks.tasks(pieces)
    for number, row in executor.run(simulator.job, simulator.limits, tasks):
        finished = chunks.put(number, row)
        if finished is not None:
            yield finished


@partial(jax.jit, static_argnums=3)
@full_precision
def _draw_rows(prior: Prior, key: Key, start: int | Array, count: int) -> tuple[Array, Key]:
    """Draw parameters (count, D) and keys (count,) for rows `start` to `start + count - 1`."""

    def draw(number: Array) -> tuple[Array, Key]:
        prior_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        return prior.unchecked_sample(prior_key, 1)[0], noise_key

    return jax.vmap(draw)(start + jnp.arange(count))

"""Where simulations run that are no JAX functions: in processes of this machine, or of a cluster.

Public names: `Executor`, `Processes`, `Dask`, `Task`, `Outside`, `Row`, `row_seeds`.

Each simulation has a seed of its own, so the result is the same whatever runs it, in what order and
in chunks of what size. It runs in a process that may die: what is lost then is one row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key
from sbi_flows.simulations.processes import Limits, Process, packed
from sbi_flows.simulations.worker import Job, Row

_WAITING = 64
"""Finished rows a worker that wait to be read, at the most."""


Task = tuple[int, int, Any]
"""Number of a row, its seed, and its parameters: an array or a dict of arrays."""


@runtime_checkable
class Executor(Protocol):
    """A frozen description of where simulations run."""

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Number and outcome of each row, in any order, as they are finished."""
        ...


@runtime_checkable
class Outside(Protocol):
    """A simulator that is no JAX function, such as `simulators.ExternalSimulator`."""

    @property
    def job(self) -> Job:
        """What a process has to know."""
        ...

    @property
    def limits(self) -> Limits:
        """What a simulation may take."""
        ...

    @property
    def executor(self) -> Executor:
        """Where it runs if nothing else is said."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes of this machine; each runs one simulation at a time.

    Attributes:
        workers: Number of processes; None for as many as there are cores.

    Raises:
        ValueError: `workers` is not positive.

    Example:
        >>> Processes(workers=2)
        Processes(workers=2)
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse a number that runs nothing."""
        if self.workers is not None:
            require_count(1, workers=self.workers)

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Number and outcome of each row, in any order, as they are finished."""
        todo, lock = iter(tasks), threading.Lock()
        count = self.workers or _cores()
        # what is finished waits for who reads it, and the simulations with it
        done: queue.Queue[tuple[int, Row] | BaseException | None] = queue.Queue(_WAITING * count)
        processes = [Process(packed(job)) for _ in range(count)]

        def work(process: Process) -> None:
            try:
                while not process.closed:
                    with lock:
                        task = next(todo, None)
                    if task is None:
                        break
                    row, seed, theta = task
                    done.put((row, process.run(seed, theta, limits)))
                done.put(None)
            except BaseException as error:  # a thread must not die unheard
                done.put(error)

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in processes]
        for thread in threads:
            thread.start()
        try:
            left = count
            while left:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for process in processes:
                process.stop()
            while any(thread.is_alive() for thread in threads):
                with contextlib.suppress(queue.Empty):
                    done.get(timeout=0.05)
            for process in processes:
                process.close()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dask:
    """Workers of a Dask cluster; each of its threads has a process that runs the simulations.

    A worker that dies is made up for by the others. Install the extra `distributed`.

    Attributes:
        client: A `dask.distributed.Client`, or the address of a scheduler.
        rows: Simulations of one task of Dask.

    Raises:
        ValueError: `rows` is not positive.

    References:
        https://distributed.dask.org

    Example:
        >>> Dask(client="tcp://10.0.0.1:8786", rows=100).rows
        100
    """

    client: Any
    rows: int = 32

    def __post_init__(self) -> None:
        """Refuse a number that runs nothing."""
        require_count(1, rows=self.rows)

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Number and outcome of each row, in any order, as they are finished."""
        from dask.distributed import Client, as_completed

        given, sent = isinstance(self.client, str), packed(job)
        client = Client(self.client) if given else self.client
        chunks = _batched(tasks, self.rows)
        held: dict[Any, list[Task]] = {}

        def submit(count: int) -> list[Any]:
            fresh = itertools.islice(chunks, count)
            futures = {client.submit(_on_worker, sent, limits, c, pure=False): c for c in fresh}
            held.update(futures)
            return list(futures)

        try:
            # some for each thread, so that none waits; not all, which would be kept in memory
            threads: Any = client.ncores()
            finished = as_completed(submit(4 * max(1, sum(threads.values()))))
            for future in finished:
                yield from _outcomes(future, held.pop(future))
                future.release()
                for following in submit(1):
                    finished.add(following)
        finally:
            client.cancel(list(held))
            if given:
                client.close()


def _batched(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """The tasks in lists of this size."""
    iterator = iter(tasks)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _outcomes(future: Any, tasks: list[Task]) -> list[tuple[int, Row]]:
    """What a task of Dask has found; rows that killed their workers again and again have failed."""
    from dask.distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        return [(row, Row(None, "was lost with several workers in turn")) for row, *_ in tasks]


_HELD = threading.local()


def _on_worker(job: bytes, limits: Limits, tasks: list[Task]) -> list[tuple[int, Row]]:
    """Run some rows in the process that this thread of a Dask worker keeps."""
    if getattr(_HELD, "job", None) != job:
        if hasattr(_HELD, "process"):
            _HELD.process.close()
        _HELD.job, _HELD.process = job, Process(job)
    return [(row, _HELD.process.run(seed, theta, limits)) for row, seed, theta in tasks]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row_seeds(keys: Key) -> list[int]:
    """One whole number of 64 bits for each of the keys (N,)."""
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    high, low = np.asarray(words).astype(np.uint64).T
    return (high << np.uint64(32) | low).tolist()

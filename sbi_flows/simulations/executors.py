"""Run external simulators in worker processes of this machine or of a Dask cluster.

Each simulation has its own seed. The result therefore depends neither on the executor nor on the
order of the simulations. If a worker process dies, only the row that it was simulating is lost.

Public names: `Executor`, `Processes`, `Dask`, `Task`, `External`, `row_seeds`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key
from sbi_flows.simulations.processes import Limits, Process, pickle_job
from sbi_flows.simulations.worker import Job, Row

_QUEUED_ROWS = 64
"""Maximum number of finished rows per worker that wait in the queue of results."""


Task = tuple[int, int, Any]
"""Row number, seed, and parameters: an array or a dict of arrays."""


@runtime_checkable
class Executor(Protocol):
    """Protocol of settings that say where external simulators run."""

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Run tasks; yield number and result of each row when it is finished, in any order."""
        ...


@runtime_checkable
class External(Protocol):
    """Protocol of simulators that JAX cannot trace. See `simulators.ExternalSimulator`."""

    @property
    def job(self) -> Job:
        """Settings that are sent to each worker process."""
        ...

    @property
    def limits(self) -> Limits:
        """Limits of each simulation."""
        ...

    @property
    def executor(self) -> Executor:
        """Default executor of the simulator."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Executor that runs simulations in several processes of this machine.

    Each process runs one simulation at a time.

    Attributes:
        workers: Number of processes; None for one process per CPU core.

    Raises:
        ValueError: `workers` is not positive.

    Example:
        >>> Processes(workers=2)
        Processes(workers=2)
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        """Check the number of processes."""
        if self.workers is not None:
            require_count(1, workers=self.workers)

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Run tasks; yield number and result of each row when it is finished, in any order."""
        count = self.workers or _cores()
        # the queue has a maximum size: if it is full, simulations wait until rows are read
        results: queue.Queue[_Result] = queue.Queue(_QUEUED_ROWS * count)
        processes = [Process(pickle_job(job)) for _ in range(count)]
        work = partial(_work, iter(tasks), threading.Lock(), results, limits)
        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in processes]
        for thread in threads:
            thread.start()
        try:
            working = count
            while working:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    working -= 1
                else:
                    yield result
        finally:
            for process in processes:
                process.stop()
            while any(thread.is_alive() for thread in threads):
                with contextlib.suppress(queue.Empty):
                    results.get(timeout=0.05)
            for process in processes:
                process.close()


_Result = tuple[int, Row] | BaseException | None
"""Entry of the queue: a finished row, an error in a thread, or None when a thread has ended."""


def _work(
    tasks: Iterator[Task],
    lock: threading.Lock,
    results: queue.Queue[_Result],
    limits: Limits,
    process: Process,
) -> None:
    """Run tasks in one worker process until no task is left. Each thread calls this function."""
    try:
        while not process.closed:
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            number, seed, theta = task
            results.put((number, process.run(seed, theta, limits)))
        results.put(None)
    except BaseException as error:  # raised again by the thread that reads the queue
        results.put(error)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dask:
    """Executor that runs simulations on a Dask cluster.

    Each thread of a Dask worker starts its own process for simulations. If a Dask worker dies, its
    tasks run on other workers. Needs the optional dependency `sbi-flows[distributed]`.

    Attributes:
        client: A `dask.distributed.Client`, or the address of a scheduler.
        rows: Number of simulations in one Dask task.

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
        """Check `rows`."""
        require_count(1, rows=self.rows)

    def run(self, job: Job, limits: Limits, tasks: Iterable[Task]) -> Iterator[tuple[int, Row]]:
        """Run tasks; yield number and result of each row when it is finished, in any order."""
        from dask.distributed import Client, as_completed

        is_address, pickled = isinstance(self.client, str), pickle_job(job)
        client = Client(self.client) if is_address else self.client
        batches = _batched(tasks, self.rows)
        submitted: dict[Any, list[Task]] = {}

        def submit(count: int) -> list[Any]:
            batch = itertools.islice(batches, count)
            futures = {client.submit(_run_batch, pickled, limits, b, pure=False): b for b in batch}
            submitted.update(futures)
            return list(futures)

        try:
            # submit a few tasks per thread: no thread then waits, and the tasks fit into memory
            threads: Any = client.ncores()
            finished = as_completed(submit(4 * max(1, sum(threads.values()))))
            for future in finished:
                yield from _results(future, submitted.pop(future))
                future.release()
                for following in submit(1):
                    finished.add(following)
        finally:
            client.cancel(list(submitted))
            if is_address:
                client.close()


def _batched(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """Yield the tasks in lists of length `size`; the last list may be shorter."""
    iterator = iter(tasks)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _results(future: Any, tasks: list[Task]) -> list[tuple[int, Row]]:
    """Return the rows of a Dask task. If its workers died, all rows are failures."""
    from dask.distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        return [(row, Row(None, "was lost with several workers in turn")) for row, *_ in tasks]


class _Worker(threading.local):
    """Process for the simulations of one thread of a Dask worker, used by all of its tasks."""

    job: bytes | None = None
    process: Process | None = None


_WORKER = _Worker()


def _run_batch(job: bytes, limits: Limits, tasks: list[Task]) -> list[tuple[int, Row]]:
    """Run tasks on a Dask worker, in the process that the current thread keeps for the job."""
    process = _WORKER.process
    if process is None or _WORKER.job != job:
        if process is not None:
            process.close()
        process = _WORKER.process = Process(job)
        _WORKER.job = job
    return [(number, process.run(seed, theta, limits)) for number, seed, theta in tasks]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row_seeds(keys: Key) -> list[int]:
    """Draw one seed, a 64-bit integer, from each of the keys (N,)."""
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    high, low = np.asarray(words).astype(np.uint64).T
    return (high << np.uint64(32) | low).tolist()

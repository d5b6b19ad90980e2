"""Where simulations run that are no JAX functions: in processes of this machine, or of a cluster.

Public names: `Executor`, `Limits`, `Processes`, `Dask`, `Process`, `Task`, `packed`,
`Outside`, `Row`, `row_seeds`.

Each simulation has a seed of its own, so the result is the same whatever runs it, in what order and
in chunks of what size. It runs in a process that may die: what is lost then is one row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.checks import require_count
from sbi_flows.errors import SimulationFailed
from sbi_flows.typing import Key
from sbi_flows.worker import Job, Row

_SAID = 2_000
"""Bytes of what a simulation has printed that a failure report quotes, at the most."""

_GRACE = 5.0
"""Seconds from the end of a process's pipes to its own, at the most."""

_KEPT = 2**20
"""Bytes of it that are kept, at the most."""

Task = tuple[int, int, Any]
"""Number of a row, its seed, and its parameters: an array or a dict of arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one simulation may take.

    Attributes:
        seconds: Time after which it is stopped; None for any time.
        retries: How often one that failed is run again, with the same seed.
    """

    seconds: float | None = None
    retries: int = 0


@runtime_checkable
class Executor(Protocol):
    """A frozen description of where simulations run."""

    def run(self, job: Job, limits: Limits, tasks: Sequence[Task]) -> Iterator[tuple[int, Row]]:
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

    def run(self, job: Job, limits: Limits, tasks: Sequence[Task]) -> Iterator[tuple[int, Row]]:
        """Number and outcome of each row, in any order, as they are finished."""
        todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Row] | BaseException] = queue.SimpleQueue()
        for task in tasks:
            todo.put(task)
        count = min(len(tasks), self.workers or _cores())
        processes = [Process(packed(job)) for _ in range(count)]

        def work(process: Process) -> None:
            try:
                while not process.closed:
                    row, seed, theta = todo.get_nowait()
                    done.put((row, process.run(seed, theta, limits)))
            except queue.Empty:
                return
            except BaseException as error:  # a thread must not die unheard
                done.put(error)

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in processes]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            for process in processes:
                process.stop()
            for thread in threads:
                thread.join()
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

    def run(self, job: Job, limits: Limits, tasks: Sequence[Task]) -> Iterator[tuple[int, Row]]:
        """Number and outcome of each row, in any order, as they are finished."""
        from dask.distributed import Client, as_completed

        given = isinstance(self.client, str)
        client = Client(self.client) if given else self.client
        chunks = [tasks[i : i + self.rows] for i in range(0, len(tasks), self.rows)]
        sent = client.scatter(packed(job), broadcast=True, hash=True)
        futures = {client.submit(_on_worker, sent, limits, c, pure=False): c for c in chunks}
        try:
            for future in as_completed(list(futures)):
                if future.status == "finished":
                    yield from future.result()
                    continue
                reason = f"lost with its workers: {future.exception()}"
                yield from ((row, Row(None, reason)) for row, *_ in futures[future])
        finally:
            client.cancel(list(futures))
            if given:
                client.close()


_HELD = threading.local()


def _on_worker(job: bytes, limits: Limits, tasks: Sequence[Task]) -> list[tuple[int, Row]]:
    """Run some rows in the process that this thread of a Dask worker keeps."""
    if getattr(_HELD, "job", None) != job:
        if hasattr(_HELD, "process"):
            _HELD.process.close()
        _HELD.job, _HELD.process = job, Process(job)
    return [(row, _HELD.process.run(seed, theta, limits)) for row, seed, theta in tasks]


def packed(job: Job) -> bytes:
    """The job as it is sent to another process.

    Raises:
        ValueError: Its function cannot be sent.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(job)
    except Exception as error:  # whatever an object's own pickling raises
        raise ValueError(
            "simulator: expected a function that can be sent to another process, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_COMMAND = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from sbi_flows.worker import serve
serve(int(sys.argv[1]), int(sys.argv[2]))
"""


class Process:
    """A worker process, started when it is first needed and again after each death.

    Args:
        job: What it runs, as `packed` says.
    """

    def __init__(self, job: bytes) -> None:
        """Hold the job."""
        self._job, self.closed = job, False
        self._held: _Held | None = None
        self._lock = threading.Lock()

    def run(self, seed: int, theta: Any, limits: Limits) -> Row:
        """Run one simulation, again if it fails and that is allowed.

        Raises:
            SimulationFailed: The process cannot load the job.
        """
        row = Row(None, "not run")
        for _ in range(1 + limits.retries):
            row = self._run_once(seed, theta, limits.seconds)
            if row.x is not None or self.closed:
                break
        return row

    def stop(self) -> None:
        """Stop the process, whatever it is doing; it is not started again."""
        with self._lock:
            self.closed, held = True, self._held
        if held is not None:
            held.stop()

    def close(self) -> None:
        """Stop the process, which does nothing, and let go of its pipes."""
        self.stop()
        if self._held is not None:
            self._held.forget()
            self._held = None

    def _run_once(self, seed: int, theta: Any, seconds: float | None) -> Row:
        import cloudpickle

        held = self._started()
        if held is None:
            return Row(None, "not run: the process was closed")
        began = held.printed()
        try:
            held.send.send_bytes(cloudpickle.dumps((seed, theta)))
            if not held.receive.poll(seconds):
                return Row(None, f"stopped after {seconds:g} s" + self._ended(held, began))
            row = cloudpickle.loads(held.receive.recv_bytes())
        except (EOFError, OSError):
            death = held.death()
            return Row(None, f"its process {death}" + self._ended(held, began))
        return row if row.x is not None else Row(None, row.reason + held.said(began))

    def _started(self) -> _Held | None:
        with self._lock:
            if self._held is None and not self.closed:
                self._held = _Held(self._job)
            return self._held

    def _ended(self, held: _Held, began: int) -> str:
        """Stop the process and forget it; what it has printed."""
        held.stop()
        with self._lock:
            self._held = None
        said = held.said(began)
        held.forget()
        return said


class _Held:
    """One life of a worker process, with the pipes to it and what it prints."""

    def __init__(self, job: bytes) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self.receive = Connection(ours_in, writable=False)
        self.send = Connection(ours_out, readable=False)
        self._file = tempfile.TemporaryFile("a+b")
        ends = (theirs_in, theirs_out)
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *map(str, ends), json.dumps(sys.path)],
                env={**threads, **os.environ},
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=self._file,
                # an interrupt is ours to handle; and what it starts can be stopped with it
                start_new_session=True,
            )
        finally:
            for end in ends:
                os.close(end)
        try:
            self.send.send_bytes(job)
            self.receive.recv_bytes()
        except (EOFError, OSError):
            raise SimulationFailed(
                f"simulator: the process for it {self.death()}{self.said(0)}"
            ) from None

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def forget(self) -> None:
        """Close the pipes to a process that has ended, and what it printed."""
        for end in (self.send, self.receive, self._file):
            end.close()

    def death(self) -> str:
        """How the process, whose pipes are closed, ended, in words."""
        try:
            status = self._process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            self.stop()
            return "closed its pipes"
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def printed(self) -> int:
        """Bytes that were printed so far; from time to time they are forgotten."""
        size = os.fstat(self._file.fileno()).st_size
        if size < _KEPT:
            return size
        self._file.truncate(0)
        return 0

    def said(self, began: int) -> str:
        """The end of what was printed since then, to be put after a reason."""
        size = os.fstat(self._file.fileno()).st_size
        first = max(began, size - _SAID)
        text = os.pread(self._file.fileno(), size - first, first).decode(errors="replace").strip()
        return f"; it printed: {text}" if text else ""


def row_seeds(keys: Key) -> list[int]:
    """One whole number of 64 bits for each of the keys (N,)."""
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    high, low = np.asarray(words).astype(np.uint64).T
    return (high << np.uint64(32) | low).tolist()

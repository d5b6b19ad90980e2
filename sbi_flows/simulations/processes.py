"""Start worker processes and run simulations in them, with limits on time and output.

Public names: `Limits`, `Process`, `pickle_job`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from sbi_flows.core.errors import SimulationFailed
from sbi_flows.simulations.worker import (
    OUT_OF_MEMORY,
    PRINTED,
    Job,
    Row,
    decode_row,
    encode_message,
    to_named,
)

_MAX_QUOTED_BYTES = 2_000
"""Maximum number of bytes of printed output that are quoted in the reason of a failure."""

_MAX_KEPT_BYTES = 2**20
"""Size in bytes at which the file with a process's printed output is emptied."""

_MAX_PRINTED_BYTES = 2**28
"""Size of the printed output, in bytes, at which a simulation is stopped."""

_POLL_SECONDS = 0.25
"""Time in seconds between two checks that a busy process is alive."""

_LOADING_SECONDS = 600.0
"""Maximum time in seconds for a process to load its job."""

_EXIT_SECONDS = 5.0
"""Maximum time in seconds for a process to exit after its pipes are closed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one simulation.

    Attributes:
        seconds: Maximum time of a simulation in seconds; None for no limit.
        retries: Number of times that a failed simulation is repeated, with the same seed.
    """

    seconds: float | None = None
    retries: int = 0


def pickle_job(job: Job) -> bytes:
    """Pickle a job for a worker process.

    Raises:
        ValueError: The simulator of the job cannot be pickled.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(job)
    except Exception as error:  # pickling may raise any exception
        raise ValueError(
            "simulator: expected a function that can be sent to another process, got "
            f"{type(error).__name__}: {error}"
        ) from error


_COMMAND = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from sbi_flows.simulations.worker import serve
serve(int(sys.argv[1]), int(sys.argv[2]))
"""


class Process:
    """A worker process. It is started for the first simulation, and restarted if it has died.

    Args:
        job: The pickled job, as `pickle_job` returns it.

    Attributes:
        closed: Whether `stop` was called.
    """

    def __init__(self, job: bytes) -> None:
        self._job, self.closed, self._has_run = job, False, False
        self._handle: _Handle | None = None
        self._lock = threading.Lock()

    def run(self, seed: int, theta: Any, limits: Limits) -> Row:
        """Run one simulation. Repeat it if it fails, at most `limits.retries` times.

        Args:
            seed: Seed of the simulation.
            theta: Parameters of the simulation, an array or a dict of arrays.
            limits: Maximum time and number of retries.

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
        """Kill the process, even during a simulation, and never start it again."""
        with self._lock:
            self.closed, handle = True, self._handle
        if handle is not None:
            handle.kill()

    def close(self) -> None:
        """Kill an idle process and close its pipes."""
        self.stop()
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _run_once(self, seed: int, theta: Any, seconds: float | None) -> Row:
        try:
            handle = self._start()
        except SimulationFailed as error:
            if not self._has_run:
                raise
            return Row(None, f"was not run: {error}")
        if handle is None:
            return Row(None, "was not run: its process was closed")
        self._has_run, printed_bytes = True, handle.printed_bytes()
        try:
            handle.send.send_bytes(encode_message(seed, to_named(theta)))
            failure = handle.wait(seconds)
            if failure:
                return Row(None, failure + self._end(handle, printed_bytes))
            row = decode_row(handle.receive.recv_bytes())
        except (EOFError, OSError):
            failure = f"its process {handle.exit_reason()}"
            return Row(None, failure + self._end(handle, printed_bytes))
        if row.x is not None:
            return row
        if row.reason == OUT_OF_MEMORY:
            # a new process, because memory that this row has not freed counts for the next row
            return Row(None, row.reason + self._end(handle, printed_bytes))
        return Row(None, row.reason + handle.quote_output(printed_bytes))

    def _start(self) -> _Handle | None:
        """Return the running process; start one if none runs. Return None after `stop`."""
        with self._lock:
            if self._handle is not None or self.closed:
                return None if self.closed else self._handle
            handle = self._handle = _Handle()
        try:
            handle.send_job(self._job)
        except SimulationFailed:
            self._end(handle, 0)
            raise
        return handle

    def _end(self, handle: _Handle, first_byte: int) -> str:
        """Kill the process; return its printed output from byte `first_byte` to the end."""
        handle.kill()
        output = handle.quote_output(first_byte)
        with self._lock:
            self._handle = None
        handle.close()
        return output


class _Handle:
    """A running worker process, its pipes, and the file with its printed output."""

    def __init__(self) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self.receive = Connection(ours_in, writable=False)
        self.send = Connection(ours_out, readable=False)
        self._file = tempfile.TemporaryFile("a+b")
        self._folder = tempfile.TemporaryDirectory(prefix="simulations-")
        ends = (theirs_in, theirs_out)
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *map(str, ends), json.dumps(sys.path)],
                # a stopped simulation cannot remove its temporary files; they lie in this folder,
                # which is removed in `close`
                env={**threads, **os.environ, "TMPDIR": self._folder.name},
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=self._file,
                # Ctrl-C then interrupts this process only, and `kill` can end the worker and its
                # children as one process group
                start_new_session=True,
            )
        finally:
            for end in ends:
                os.close(end)

    def send_job(self, job: bytes) -> None:
        """Send the job, and wait until the process has loaded it.

        Raises:
            SimulationFailed: The process cannot load the job.
        """
        try:
            self.send.send_bytes(job)
            failure = self.wait(_LOADING_SECONDS)
            if not failure:
                self.receive.recv_bytes()
        except (EOFError, OSError):
            failure = self.exit_reason()
        if failure:
            raise SimulationFailed(f"simulator: the process for it {failure}{self.quote_output(0)}")

    def wait(self, seconds: float | None) -> str:
        """Wait for an answer of the process.

        Returns:
            An empty string if there is an answer, otherwise the reason why the simulation has to be
            stopped.

        Raises:
            EOFError: The process has died.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while not self.receive.poll(min(_POLL_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return f"was stopped after {seconds:g} s"
            if os.fstat(self._file.fileno()).st_size > _MAX_PRINTED_BYTES:
                return f"was stopped: it printed more than {_MAX_PRINTED_BYTES // 2**20} MiB"
            # the pipe of a dead process stays open if a child of the process still holds it
            if self._process.poll() is not None and not self.receive.poll():
                raise EOFError
        return ""

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Close the pipes after the process has ended, and remove its files."""
        for end in (self.send, self.receive, self._file):
            end.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def exit_reason(self) -> str:
        """Wait for the end of a process that has closed its pipes, and describe how it ended."""
        try:
            status = self._process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipes"
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def printed_bytes(self) -> int:
        """Return the size of the printed output in bytes. Empty the file first if it is large."""
        size = os.fstat(self._file.fileno()).st_size
        if size < _MAX_KEPT_BYTES:
            return size
        self._file.truncate(0)
        return 0

    def quote_output(self, first_byte: int) -> str:
        """Return the end of the output since `first_byte`, to append to the reason of a failure."""
        size = os.fstat(self._file.fileno()).st_size
        first = max(first_byte, size - _MAX_QUOTED_BYTES)
        text = os.pread(self._file.fileno(), size - first, first).decode(errors="replace").strip()
        return f"{PRINTED}{text}" if text else ""

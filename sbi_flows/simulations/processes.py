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
"""Maximum printed output of a simulation that the reason of its failure quotes."""

_MAX_KEPT_BYTES = 2**20
"""Printed output of a process after which the file of its output is emptied."""

_MAX_PRINTED_BYTES = 2**28
"""Printed output after which a simulation is stopped."""

_POLL_SECONDS = 0.25
"""Time between two checks that a process without an answer is alive."""

_LOADING_SECONDS = 600.0
"""Maximum time for a process to load its job."""

_EXIT_SECONDS = 5.0
"""Maximum time from the closing of a process's pipes to its exit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one simulation.

    Attributes:
        seconds: Maximum time of a simulation; None for no limit.
        retries: Number of times that a failed simulation is run again, with the same seed.
    """

    seconds: float | None = None
    retries: int = 0


def pickle_job(job: Job) -> bytes:
    """Pickle a job for a worker process.

    Raises:
        ValueError: Its function cannot be pickled.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(job)
    except Exception as error:  # the pickling of an object may raise any exception
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
    """A worker process, started when it is first needed and restarted after it has died.

    Args:
        job: The job, as `pickle_job` returns it.

    Attributes:
        closed: Whether `stop` was called.
    """

    def __init__(self, job: bytes) -> None:
        self._job, self.closed, self._has_run = job, False, False
        self._handle: _Handle | None = None
        self._lock = threading.Lock()

    def run(self, seed: int, theta: Any, limits: Limits) -> Row:
        """Run one simulation, and run it again if it fails and the limits allow it.

        Args:
            seed: Seed of the simulation.
            theta: Its parameters, an array or a dict of arrays.
            limits: Its limits.

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
        """Kill the process, even during a simulation; it is not started again."""
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
            # memory that this row has not freed would be missing to the next one
            return Row(None, row.reason + self._end(handle, printed_bytes))
        return Row(None, row.reason + handle.quote_output(printed_bytes))

    def _start(self) -> _Handle | None:
        """Return the running process, started if there is none; None after `stop`."""
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
        """Kill the process, and quote its output from a byte on."""
        handle.kill()
        output = handle.quote_output(first_byte)
        with self._lock:
            self._handle = None
        handle.close()
        return output


class _Handle:
    """A running worker process, the pipes to it and the file of its output."""

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
                # temporary files of a simulation that is stopped are removed with this folder
                env={**threads, **os.environ, "TMPDIR": self._folder.name},
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=self._file,
                # an interrupt reaches this process alone; the worker and its children are a group
                start_new_session=True,
            )
        finally:
            for end in ends:
                os.close(end)

    def send_job(self, job: bytes) -> None:
        """Send the job, and wait until the process has loaded it.

        Raises:
            SimulationFailed: The process cannot load it.
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
        """Wait for an answer; return the empty string, or the reason why there is none.

        Raises:
            EOFError: The process has died. A child that it started may hold its pipe open.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while not self.receive.poll(min(_POLL_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return f"was stopped after {seconds:g} s"
            if os.fstat(self._file.fileno()).st_size > _MAX_PRINTED_BYTES:
                return f"was stopped: it printed more than {_MAX_PRINTED_BYTES // 2**20} MiB"
            if self._process.poll() is not None and not self.receive.poll():
                raise EOFError
        return ""

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Close the pipes to a process that has ended, and remove its files."""
        for end in (self.send, self.receive, self._file):
            end.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def exit_reason(self) -> str:
        """Describe how the process, whose pipes are closed, has ended."""
        try:
            status = self._process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipes"
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def printed_bytes(self) -> int:
        """Return the size of the output so far; a large file is emptied first."""
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

"""A process that runs simulations, as its parent sees it: it may hang, grow, print and die.

Public names: `Limits`, `Process`, `packed`.
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
from sbi_flows.simulations.worker import OUT_OF_MEMORY, PRINTED, Job, Row, by_name, encoded, row_of

_SAID = 2_000
"""Bytes of what a simulation has printed that a failure report quotes, at the most."""

_KEPT = 2**20
"""Bytes of it that are kept, at the most."""

_PRINTED = 2**28
"""Bytes of it after which a simulation is stopped."""

_SLICE = 0.25
"""Seconds after which it is asked whether a process that says nothing is alive."""

_LOADING = 600.0
"""Seconds in which a process has to have loaded its job."""

_GRACE = 5.0
"""Seconds from the end of a process's pipes to its own, at the most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one simulation may take.

    Attributes:
        seconds: Time after which it is stopped; None for any time.
        retries: How often one that failed is run again, with the same seed.
    """

    seconds: float | None = None
    retries: int = 0


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


_COMMAND = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from sbi_flows.simulations.worker import serve
serve(int(sys.argv[1]), int(sys.argv[2]))
"""


class Process:
    """A worker process, started when it is first needed and again after each death.

    Args:
        job: What it runs, as `packed` says.
    """

    def __init__(self, job: bytes) -> None:
        """Hold the job."""
        self._job, self.closed, self._began = job, False, False
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
        try:
            held = self._started()
        except SimulationFailed as error:
            if not self._began:
                raise
            return Row(None, f"was not run: {error}")
        if held is None:
            return Row(None, "was not run: its process was closed")
        self._began, said = True, held.printed()
        try:
            held.send.send_bytes(encoded(seed, by_name(theta)))
            late = held.wait(seconds)
            if late:
                return Row(None, late + self._ended(held, said))
            row = row_of(held.receive.recv_bytes())
        except (EOFError, OSError):
            death = held.death()
            return Row(None, f"its process {death}" + self._ended(held, said))
        if row.x is None:
            # what a row has left in memory would be missing to the next one
            full = row.reason == OUT_OF_MEMORY
            return Row(None, row.reason + (self._ended(held, said) if full else held.said(said)))
        return row

    def _started(self) -> _Held | None:
        with self._lock:
            if self._held is not None or self.closed:
                return None if self.closed else self._held
            held = self._held = _Held()
        try:
            held.greet(self._job)
        except SimulationFailed:
            self._ended(held, 0)
            raise
        return held

    def _ended(self, held: _Held, began: int) -> str:
        """Stop the process and forget it; what it has printed."""
        held.stop()
        said = held.said(began)
        with self._lock:
            self._held = None
        held.forget()
        return said


class _Held:
    """One life of a worker process, with the pipes to it and what it prints."""

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
                # what a simulation that is stopped leaves there goes with the process
                env={**threads, **os.environ, "TMPDIR": self._folder.name},
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

    def greet(self, job: bytes) -> None:
        """Send the job.

        Raises:
            SimulationFailed: The process cannot load it.
        """
        try:
            self.send.send_bytes(job)
            late = self.wait(_LOADING)
            if not late:
                self.receive.recv_bytes()
        except (EOFError, OSError):
            late = self.death()
        if late:
            raise SimulationFailed(f"simulator: the process for it {late}{self.said(0)}")

    def wait(self, seconds: float | None) -> str:
        """Wait for an answer; the empty string, or why there will be none.

        Raises:
            EOFError: The process has died. Its pipe may be open in what it has started.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while not self.receive.poll(min(_SLICE, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return f"was stopped after {seconds:g} s"
            if os.fstat(self._file.fileno()).st_size > _PRINTED:
                return f"was stopped: it printed more than {_PRINTED // 2**20} MiB"
            if self._process.poll() is not None and not self.receive.poll():
                raise EOFError
        return ""

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def forget(self) -> None:
        """Close the pipes to a process that has ended, and what it printed."""
        for end in (self.send, self.receive, self._file):
            end.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

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
        return f"{PRINTED}{text}" if text else ""

"""Worker process that runs simulations one by one; it never imports JAX.

It receives a `Job` and answers that it is ready. Then it receives one seed and one parameter vector
at a time, and answers each with a `Row`. Only the job contains code: a function of the user's, sent
by the process that started this one. All other messages are JSON and arrays of numbers.

Public names: `Job`, `Row`, `to_named`, `from_named`, `encode_message`, `decode_message`,
`decode_row`, `run_row`, `serve`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

OUT_OF_MEMORY = "ran out of memory"
"""Reason of a row whose simulation raised MemoryError."""

PRINTED = "; it printed: "
"""Text between the reason of a failure and the output that the simulation printed."""


class Job(NamedTuple):
    """Settings sent to a worker process when it starts.

    Attributes:
        function: Simulator `(seed, theta) -> x`, with theta an array or a dict of arrays.
        outputs: Shape and dtype of each array of x, by name. A single array has the name "".
        memory: Maximum memory in bytes, beyond that of the process at its start; None for no limit.
    """

    function: Callable[[int, Any], Any]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    memory: int | None = None


class Row(NamedTuple):
    """Result of one simulation: its arrays by name, or None and the reason of the failure."""

    x: dict[str, np.ndarray] | None
    reason: str = ""


def to_named(x: Any) -> dict[str, Any]:
    """Return the arrays of x by name; a single array has the name ""."""
    return dict(x) if isinstance(x, Mapping) else {"": x}


def from_named(parts: dict[str, Any]) -> Any:
    """Invert `to_named`: return the dict, or the single array."""
    return parts[""] if set(parts) == {""} else parts


def encode_message(value: Any, named: Mapping[str, Any]) -> bytes:
    """Encode a value that JSON can represent, and arrays by name."""
    arrays = {name: np.asarray(array) for name, array in named.items()}
    headers = [[name, a.dtype.str, a.shape] for name, a in arrays.items()]
    parts = [json.dumps([value, headers]).encode(), b"\n", *(a.tobytes() for a in arrays.values())]
    return b"".join(parts)


def decode_message(message: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the value and the arrays of a message; arrays without axes become scalars."""
    head, _, data = message.partition(b"\n")
    value, headers = json.loads(head)
    arrays, offset = {}, 0
    for name, dtype_name, shape in headers:
        dtype = np.dtype(dtype_name)
        count = math.prod(shape)
        array = np.frombuffer(data, dtype, count, offset).reshape(shape).copy()
        arrays[name], offset = array[()], offset + count * dtype.itemsize
    return value, arrays


def decode_row(message: bytes) -> Row:
    """Return the row of a worker's answer."""
    reason, x = decode_message(message)
    return Row(None if reason else x, reason)


def run_row(job: Job, seed: int, theta: Any) -> Row:
    """Run one simulation and check its outputs; an exception becomes the reason of a failure."""
    try:
        return Row(_cast_outputs(job.outputs, job.function(seed, theta)))
    except MemoryError:
        return Row(None, OUT_OF_MEMORY)
    except Exception as error:  # a simulator may raise any exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}, line {last.lineno}"
        return Row(None, f"raised {type(error).__name__}: {error} ({place})")


def _cast_outputs(outputs: dict[str, tuple[tuple[int, ...], str]], x: Any) -> dict[str, np.ndarray]:
    """Return the arrays of x, cast to the expected dtypes.

    Raises:
        ValueError: Names or shapes differ from the expected ones, or a dtype cannot hold the
            values.
    """
    arrays = to_named(x)
    if set(arrays) != set(outputs):
        raise ValueError(f"expected {_describe(outputs)}, got {_describe(arrays)}")
    cast_arrays = {}
    for name, (shape, dtype) in outputs.items():
        value = np.asarray(arrays[name])
        what = f"{name}: " if name else ""
        if value.shape != shape or value.dtype.kind not in "biuf":
            raise ValueError(
                f"{what}expected numbers of shape {shape}, got {value.dtype} of shape {value.shape}"
            )
        cast = value.astype(dtype)
        if cast.dtype.kind in "biu" and not np.array_equal(cast, value):
            raise ValueError(
                f"{what}expected numbers that {dtype} holds, got {value.dtype} {value}"
            )
        cast_arrays[name] = cast
    return cast_arrays


def _describe(names: Any) -> str:
    return "an array" if set(names) == {""} else f"a dict of {sorted(map(str, names))}"


def _limit_memory(memory: int) -> None:
    """Limit this process to so many bytes beyond those that it has now."""
    import resource

    with open("/proc/self/statm") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + memory, present + memory))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends."""
    import ctypes
    import signal

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(incoming: int, outgoing: int) -> None:
    """Run the worker process: answer rows until the other end of the pipe is closed.

    Args:
        incoming: File descriptor of the pipe that messages come from.
        outgoing: File descriptor of the pipe for answers.
    """
    import cloudpickle

    receive, send = Connection(incoming, writable=False), Connection(outgoing, readable=False)
    _die_with_parent()
    # the output of a simulator goes to stderr, and its input is empty
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    job = cloudpickle.loads(receive.recv_bytes())
    if job.memory is not None:
        _limit_memory(job.memory)
    send.send_bytes(b"ready")
    while True:
        try:
            seed, theta = decode_message(receive.recv_bytes())
        except EOFError:
            return
        row = run_row(job, seed, from_named(theta))
        sys.stdout.flush()
        send.send_bytes(encode_message(row.reason, row.x or {}))
        if row.reason == OUT_OF_MEMORY:
            return

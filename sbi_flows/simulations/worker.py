"""Worker process that runs one simulation at a time. It never imports JAX.

The worker receives a `Job` and answers that it is ready. Then it receives seeds and parameter
vectors, one pair at a time, and answers each pair with a `Row`. Only the job contains code: the
user's function, sent by the process that started the worker. All other messages consist of JSON
and arrays of numbers.

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
"""Reason that is reported if a simulation raises MemoryError."""

PRINTED = "; it printed: "
"""Text that separates the reason of a failure from the printed output of the simulation."""


class Job(NamedTuple):
    """Settings sent to a worker process when it starts.

    Attributes:
        function: Simulator `(seed, theta) -> x`; theta is an array or a dict of arrays.
        outputs: Shape and dtype of each array of x, by name. A single array has the name "".
        memory: Maximum memory for simulations in bytes, in addition to the memory that the process
            uses before the first simulation; None for no limit.
    """

    function: Callable[[int, Any], Any]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    memory: int | None = None


class Row(NamedTuple):
    """Result of one simulation: a dict of its arrays, or None and the reason of the failure."""

    x: dict[str, np.ndarray] | None
    reason: str = ""


def to_named(x: Any) -> dict[str, Any]:
    """Convert x to a dict of arrays; a single array gets the name ""."""
    return dict(x) if isinstance(x, Mapping) else {"": x}


def from_named(parts: dict[str, Any]) -> Any:
    """Invert `to_named`: return the array with the name "", or else the dict."""
    return parts[""] if set(parts) == {""} else parts


def encode_message(value: Any, named: Mapping[str, Any]) -> bytes:
    """Encode a JSON value and a dict of arrays as one message."""
    arrays = {name: np.asarray(array) for name, array in named.items()}
    headers = [[name, a.dtype.str, a.shape] for name, a in arrays.items()]
    parts = [json.dumps([value, headers]).encode(), b"\n", *(a.tobytes() for a in arrays.values())]
    return b"".join(parts)


def decode_message(message: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the JSON value and the arrays of a message; 0-dimensional arrays become scalars."""
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
    """Decode the answer of a worker."""
    reason, x = decode_message(message)
    return Row(None if reason else x, reason)


def run_row(job: Job, seed: int, theta: Any) -> Row:
    """Run one simulation and check its outputs. If it raises, return the reason of the failure."""
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
        ValueError: Names or shapes differ from the expected names or shapes, or the expected dtype
            cannot hold the values.
    """
    arrays = to_named(x)
    if set(arrays) != set(outputs):
        raise ValueError(f"expected {_describe(outputs)}, got {_describe(arrays)}")
    cast_arrays = {}
    for name, (shape, dtype) in outputs.items():
        what = f"{name}: " if name else ""
        if count := np.ma.count_masked(arrays[name]):
            raise ValueError(
                f"{what}expected numbers, got an array with {count} masked entries; return an "
                "array without a mask"
            )
        value = np.asarray(arrays[name])
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
    """Allow this process at most `memory` bytes more than it uses now."""
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
    """Run the worker process: answer messages until the other process closes its pipe.

    Args:
        incoming: File descriptor of the pipe from which messages are read.
        outgoing: File descriptor of the pipe to which answers are written.
    """
    import cloudpickle

    receive, send = Connection(incoming, writable=False), Connection(outgoing, readable=False)
    _die_with_parent()
    # printed output of the simulator goes to stderr; reading from stdin gives no data
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

"""Worker process that runs simulations one by one; it never imports JAX.

It is sent the `Job`, says that it is ready, is sent a seed and parameters at a time, and answers
each with a `Row`. The job alone, a function of the user's, is code that this process loads, from
the one that started it; all other messages are numbers and words, and read as such.

Public names: `Job`, `Row`, `by_name`, `bare`, `encoded`, `decoded`, `row_of`, `ran`, `serve`.
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

PRINTED = "; it printed: "
"""What stands between a reason and what the simulation has printed."""


class Job(NamedTuple):
    """What a worker is told once.

    Attributes:
        function: `(seed, theta) -> x`, with theta an array or a dict of arrays.
        outputs: Shape and dtype of each array of x by its name; the name "" alone for an array.
        memory: Bytes that it may take beyond what it has at its start; None for any number.
    """

    function: Callable[[int, Any], Any]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    memory: int | None = None


class Row(NamedTuple):
    """One simulation: its arrays by name, or, in words, the reason why there are none."""

    x: dict[str, np.ndarray] | None
    reason: str = ""


def by_name(x: Any) -> dict[str, Any]:
    """Arrays by name; an array alone by the name ""."""
    return dict(x) if isinstance(x, Mapping) else {"": x}


def bare(parts: dict[str, Any]) -> Any:
    """What `by_name` was given."""
    return parts[""] if set(parts) == {""} else parts


def encoded(said: Any, arrays: Mapping[str, Any]) -> bytes:
    """A message: what JSON can say, and arrays by name."""
    held = {name: np.asarray(value) for name, value in arrays.items()}
    kinds = [[name, a.dtype.str, a.shape] for name, a in held.items()]
    parts = [json.dumps([said, kinds]).encode(), b"\n", *(a.tobytes() for a in held.values())]
    return b"".join(parts)


def decoded(message: bytes) -> tuple[Any, dict[str, Any]]:
    """What was said, and the arrays; those without axes are numbers."""
    head, _, data = message.partition(b"\n")
    said, kinds = json.loads(head)
    arrays, first = {}, 0
    for name, kind, shape in kinds:
        dtype = np.dtype(kind)
        count = math.prod(shape)
        value = np.frombuffer(data, dtype, count, first).reshape(shape).copy()
        arrays[name], first = value[()], first + count * dtype.itemsize
    return said, arrays


def row_of(message: bytes) -> Row:
    """The row that an answer holds."""
    reason, x = decoded(message)
    return Row(None if reason else x, reason)


def ran(job: Job, seed: int, theta: Any) -> Row:
    """Run one simulation and check what it returns; no exception leaves this function."""
    try:
        return Row(checked(job.outputs, job.function(seed, theta)))
    except MemoryError:
        return Row(None, OUT_OF_MEMORY)
    except Exception as error:  # whatever a simulator raises is a failure of its row
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}, line {last.lineno}"
        return Row(None, f"raised {type(error).__name__}: {error} ({place})")


def checked(outputs: dict[str, tuple[tuple[int, ...], str]], x: Any) -> dict[str, np.ndarray]:
    """Arrays of the expected names, shapes and dtypes.

    Raises:
        ValueError: x is something else.
    """
    given = by_name(x)
    if set(given) != set(outputs):
        raise ValueError(f"expected {_named(outputs)}, got {_named(given)}")
    found = {}
    for name, (shape, dtype) in outputs.items():
        value = np.asarray(given[name])
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
        found[name] = cast
    return found


def _named(names: Any) -> str:
    return "an array" if set(names) == {""} else f"a dict of {sorted(map(str, names))}"


def _limit(memory: int) -> None:
    import resource

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))


def _die_with_parent() -> None:
    """End with the thread that started this process (Linux), even in the midst of a simulation."""
    import ctypes
    import signal

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(incoming: int, outgoing: int) -> None:
    """Answer rows until the other end is closed."""
    import cloudpickle

    receive, send = Connection(incoming, writable=False), Connection(outgoing, readable=False)
    _die_with_parent()
    # what a simulator prints goes to where its errors go; it reads nothing
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    job = cloudpickle.loads(receive.recv_bytes())
    if job.memory is not None:
        _limit(job.memory)
    send.send_bytes(b"ready")
    while True:
        try:
            seed, theta = decoded(receive.recv_bytes())
        except EOFError:
            return
        row = ran(job, seed, bare(theta))
        sys.stdout.flush()
        send.send_bytes(encoded(row.reason, row.x or {}))
        if row.reason == OUT_OF_MEMORY:
            return

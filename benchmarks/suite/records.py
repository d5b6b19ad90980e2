"""JSON records of results, which include the machine and library versions; atomic writing.

This module does not import JAX, so that `python -m benchmarks --help` is fast.

Public names: `BadInput`, `Clock`, `now`, `plain`, `provenance`, `writable_folder`, `write_json`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sbi_flows.core.files import atomic_file
from sbi_flows.core.versions import versions

SCHEMA = 2
"""Version number of the record layout."""

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "sbi-flows",
    "jax",
    "flax",
    "optax",
    "distrax",
    "numpyro",
    "diffrax",
    "arviz",
    "scikit-learn",
    "numpy",
)


class BadInput(ValueError):
    """Error in the user's options or files. The message is one line, printed on the terminal."""


class Clock:
    """Timer that measures wall time and compilation time of each phase of a run.

    Args:
        log: Function that is called at the end of each phase with a line of text that states the
            time of the phase. By default, the line is written to stderr.

    Attributes:
        seconds: Wall time of each phase.
        compile_seconds: Compilation time of each phase, summed over threads.

    Example:
        >>> clock = Clock(log=print)
        >>> with clock("add"):
        ...     total = 1 + 1
        add: 0.0 s
        >>> list(clock.seconds)
        ['add']
    """

    def __init__(self, log: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.compile_seconds: dict[str, float] = {}
        self._log = log if log is not None else _to_stderr

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Context manager that times a block of code.

        The block must wait until its JAX arrays are ready.
        """
        from benchmarks.suite.compilation import compile_seconds  # it imports JAX

        start, start_compiled = time.perf_counter(), compile_seconds()
        yield
        self.seconds[phase] = time.perf_counter() - start
        self.compile_seconds[phase] = compile_seconds() - start_compiled
        self._log(f"{phase}: {self.seconds[phase]:.1f} s")

    @property
    def total(self) -> float:
        """Wall time of all phases in seconds."""
        return sum(self.seconds.values())


def provenance() -> dict[str, Any]:
    """Describe the machine, the library versions and the time.

    The names of the machine and of the user are not included.

    Returns:
        A dict of `schema`, the version of the record layout; `machine` (cores, architecture,
        memory, JAX device); `versions`, the library versions; `revision`, the git commit, with `+`
        if files differ from it, or None outside a git checkout; and `time` (UTC).
    """
    return {
        "schema": SCHEMA,
        "machine": _machine(),
        "versions": versions(PACKAGES),
        "revision": _revision(),
        "time": now(),
    }


def now() -> str:
    """Return the date and time (UTC) in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def writable_folder(path: Path, option: str) -> Path:
    """Create a folder if it does not exist, check that it is writable, and return it.

    Raises:
        BadInput: The folder cannot be created or is not writable. The message names the
            command-line option `option`.
    """
    from sbi_flows.core import checks  # it imports JAX

    try:
        return checks.writable_folder(option, path)
    except ValueError as error:
        raise BadInput(str(error)) from None


def write_json(path: Path, record: Mapping[str, Any]) -> Path:
    r"""Write a record as one line of JSON, atomically.

    NumPy and JAX arrays become lists and numbers. NaN and infinity become null.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"x": float("nan"), "y": 1}).read_text()
        '{"x": null, "y": 1}\n'
    """
    text = json.dumps(plain(record), allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())
    return path


def plain(value: Any) -> Any:
    """Convert arrays, tuples and mappings to JSON types; NaN and infinity become None.

    Other objects are returned unchanged; `json.dumps` raises an error if the result contains such
    an object.

    Example:
        >>> import numpy as np
        >>> plain({"a": np.arange(2), "b": (np.float32(0.5), float("inf"))})
        {'a': [0, 1], 'b': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _machine() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "architecture": platform.machine(),
        "memory_gib": _memory_gib(),
        "device": device.device_kind if device.platform != "cpu" else "cpu",
    }


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None


def _revision() -> str | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        # count untracked files as changes, because untracked modules may run too
        changed += git("ls-files", "--others", "--exclude-standard", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _to_stderr(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)

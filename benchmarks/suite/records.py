"""Records of a run: on what machine, with which versions, how long; written whole or not at all.

Public names: `BadInput`, `Clock`, `now`, `provenance`, `writable_folder`, `write_json`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sbi_flows.core.files import atomic_file

SCHEMA = 2
"""Version of the records' layout."""

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
    """What the user asked for cannot be done; the message is one line for the terminal."""


class Clock:
    """Wall time of each phase, said aloud as the phase ends, and how much of it was compilation.

    Example:
        >>> clock = Clock(say=print)
        >>> with clock("add"):
        ...     total = 1 + 1
        add: 0.0 s
        >>> list(clock.seconds)
        ['add']
    """

    def __init__(self, say: Any = None) -> None:
        """Say each phase through `say`, a function of one string; on stderr by default."""
        self.seconds: dict[str, float] = {}
        self.compile_seconds: dict[str, float] = {}
        self._say = say if say is not None else _to_stderr

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block; what it computes must be ready at its end (JAX runs ahead)."""
        from benchmarks.suite.compilation import compile_seconds  # it brings JAX

        began, compiled = time.perf_counter(), compile_seconds()
        yield
        self.seconds[phase] = time.perf_counter() - began
        self.compile_seconds[phase] = compile_seconds() - compiled
        self._say(f"{phase}: {self.seconds[phase]:.1f} s")

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())


def provenance() -> dict[str, Any]:
    """Machine in words, versions, git revision and the time: nothing that names the machine.

    Returns:
        `machine` (cores, architecture, memory, JAX's device), `versions`, `revision` (None outside
        a git checkout; ends in `+` where files differ from it) and `time` (UTC).
    """
    return {
        "schema": SCHEMA,
        "machine": _machine(),
        "versions": _versions(),
        "revision": _revision(),
        "time": now(),
    }


def now() -> str:
    """Date and time (UTC)."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def writable_folder(path: Path, option: str) -> Path:
    """`sbi_flows.core.checks.writable_folder`, as bad input of an option.

    Raises:
        BadInput: It cannot be made or written to; the message names the option.
    """
    from sbi_flows.core import checks  # not before it is needed: it brings JAX

    try:
        return checks.writable_folder(option, path)
    except ValueError as error:
        raise BadInput(str(error)) from None


def write_json(path: Path, record: Mapping[str, Any]) -> Path:
    r"""Write one line of JSON through a temporary file, so that no reader ever sees a part of it.

    NumPy and JAX numbers become plain ones; NaN and infinity become null.

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
    """The value in types that JSON knows; NaN and infinity as None.

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


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _revision() -> str | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        # a module that is not committed yet is part of what runs
        changed += git("ls-files", "--others", "--exclude-standard", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _to_stderr(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)

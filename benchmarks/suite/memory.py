"""Measurement of this process's peak memory, and release of compiled programs' memory maps.

Public names: `drop_programs`, `forget_peak_memory`, `peak_memory_gib`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MAX_MEMORY_MAPS = 45_000
"""Number of memory maps above which compiled programs are freed; the Linux limit is 65,530."""


def drop_programs() -> None:
    """Free all compiled programs if the process holds many memory maps."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()


def forget_peak_memory() -> None:
    """Reset the peak memory to the current memory use. This has an effect only on Linux."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        pass


def peak_memory_gib() -> float | None:
    """Return the peak resident memory of this process in GiB.

    On Linux, this is the peak since the last call of `forget_peak_memory`. On other POSIX systems,
    it is the peak since the start of the process. On other systems, the result is None.

    Example:
        >>> 0.01 < peak_memory_gib() < 1000
        True
    """
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

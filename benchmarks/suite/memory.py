"""Memory of a long process: its maps, of which each compiled program holds several, and its peak.

Public names: `drop_programs`, `forget_peak_memory`, `peak_memory_gib`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MOST = 45_000
"""Memory maps that are no danger yet: Linux allows 65,530 a process, and kills it then."""


def drop_programs() -> None:
    """Free all compiled programs, where the process holds many memory maps."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()


def forget_peak_memory() -> None:
    """Let the peak start from what is held now, where the system can do that (Linux)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        pass


def peak_memory_gib() -> float | None:
    """The most memory that this process has held since `forget_peak_memory`, in GiB.

    What it held by then is part of it. On other systems, the most so far; None where that is not
    known either.

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

"""Memory maps of a long process: each compiled program holds several.

Public names: `drop_programs`.
"""

from __future__ import annotations

from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
MOST = 45_000
"""Memory maps that are no danger yet: Linux allows 65,530 a process, and kills it then."""


def drop_programs() -> None:
    """Free all compiled programs, where the process holds many memory maps."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()

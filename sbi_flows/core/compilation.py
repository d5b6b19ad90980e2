"""Compiled programs that outlive the process.

Public name: `enable_compilation_cache`.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from sbi_flows.core.checks import writable_folder

LEAST_SECONDS = 0.1
"""Programs that compile faster than that are not worth a file."""


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, so that later processes do not compile them again.

    It is off by default and is switched on for the whole process, JAX code of others included; call
    it before the first computation. A fit with the same shapes and settings as one before then
    starts at once. The files hold programs that will be run: use a folder that nobody else can
    write to. Delete it to be rid of them.

    Args:
        folder: Where to keep them; `~/.cache/sbi_flows/programs` by default.

    Returns:
        The folder.

    Raises:
        ValueError: The folder cannot be made or written to.

    Example:
        >>> import os
        >>> enable_compilation_cache(os.devnull)
        Traceback (most recent call last):
        ...
        ValueError: folder: cannot write to ...: File exists
    """
    path = Path.home() / ".cache" / "sbi_flows" / "programs" if folder is None else Path(folder)
    writable_folder("folder", path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path

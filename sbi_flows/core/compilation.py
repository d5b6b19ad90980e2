"""Cache of compiled programs on disk.

Public name: `enable_compilation_cache`.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from sbi_flows.core.checks import writable_folder

MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not written to the cache."""


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Store compiled programs in a folder, so that later processes need not compile them again.

    The cache is off by default. This function enables it for the whole process, including JAX code
    of other libraries. Call it before the first computation. A fit with the same shapes and
    settings as an earlier fit then starts at once. The files hold programs that will be
    executed, so use a folder that only you can write to. Delete the folder to empty the cache.

    Args:
        folder: Folder of the cache; `~/.cache/sbi_flows/programs` by default.

    Returns:
        The folder.

    Raises:
        ValueError: The folder cannot be created or written to.

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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path

"""Compiled programs: a cache on disk, and a limit of the number of programs in memory.

Public names: `enable_compilation_cache`, `compiled_per_size`, `drop_old_programs`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import jax

from sbi_flows.core.checks import writable_folder

MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not written to the cache."""

MAX_SIZES = 8
"""Maximum number of sizes of data sets whose programs are kept in memory."""

MAX_DROPS = 8
"""Number of drops after which all programs of the process are dropped as well."""

_COMPILED_PER_SIZE: list[Any] = []
_LOCK = threading.Lock()


@dataclasses.dataclass
class _Fits:
    """Counts of fits in this process.

    Attributes:
        sizes: Sizes of the data sets since the last drop.
        drops: Number of drops since all programs of the process were dropped.
    """

    sizes: set[Hashable] = dataclasses.field(default_factory=set)
    drops: int = 0


_FITS = _Fits()

F = TypeVar("F")


def compiled_per_size(function: F) -> F:
    """Register a jitted function whose programs depend on the number of training rows.

    JAX keeps one program of such a function for each size; the programs of a fit take about 40 MB.
    JAX can only drop all programs of a function, so `drop_old_programs` drops those of all sizes.

    Args:
        function: The result of `jax.jit`.

    Returns:
        The same function.
    """
    _COMPILED_PER_SIZE.append(function)
    return function


def drop_old_programs(size: Hashable) -> None:
    """Drop the programs of all `compiled_per_size` functions if there are too many sizes.

    Programs are dropped before a fit to the ninth size since the last drop. JAX also keeps traces
    of its own functions, about 10 MB for each size. It can only drop them together with all
    programs of the process, which happens at every eighth drop. Dropped programs are compiled again
    when they are needed.

    Args:
        size: Size of the data set of the next fit. If it is one of the sizes since the last drop,
            nothing is dropped.
    """
    with _LOCK:
        if size not in _FITS.sizes and len(_FITS.sizes) >= MAX_SIZES:
            for function in _COMPILED_PER_SIZE:
                function.clear_cache()
            _FITS.sizes.clear()
            _FITS.drops += 1
            if _FITS.drops >= MAX_DROPS:
                jax.clear_caches()
                _FITS.drops = 0
        _FITS.sizes.add(size)


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

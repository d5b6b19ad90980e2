"""Files of reference draws, in the package and in the user's cache folder.

Draws are stored only for slow samplers, which run for about a minute.

Public names: `FOLDER`, `cache_folder`, `load`, `save`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sbi_flows.core.files import atomic_file

FOLDER = Path(__file__).parents[1] / "references"
"""Folder of the reference draws that ship with the package."""

CACHE_VARIABLE = "SBI_FLOWS_CACHE"
"""Environment variable that names the cache folder."""

RELATIVE_TOLERANCE = 1e-3
"""Relative difference up to which two observations are treated as equal.

The steps of an adaptive ODE solver differ between compilers and devices. These differences are far
smaller than the noise of any task.
"""


def cache_folder() -> Path:
    """Return the cache folder of the user's reference draws.

    It is `$SBI_FLOWS_CACHE` if that variable is set, else `~/.cache/sbi_flows/references`.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder) if folder else Path.home() / ".cache" / "sbi_flows" / "references"


def load(task: str, i: int, x: np.ndarray, folders: tuple[Path, ...]) -> np.ndarray | None:
    """Read reference draws (N, D) from the first folder that holds a file for observation i.

    Unreadable files, and files that were made for another observation than x, are skipped.

    Args:
        task: First part of the file name, `Task.stored_as`.
        i: Number of the observation.
        x: The observation, as `Task.stored_observation` returns it.
        folders: Folders to search, in order.

    Returns:
        The draws, or None if no folder holds them.

    Example:
        >>> load("no_such_task", 1, np.zeros(2), (FOLDER,)) is None
        True
    """
    for folder in folders:
        try:
            with np.load(folder / f"{task}-{i}.npz", allow_pickle=False) as file:
                if np.allclose(file["x"], x, rtol=RELATIVE_TOLERANCE, atol=1e-5):
                    return np.asarray(file["draws"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            continue
    return None


def save(
    folder: Path,
    task: str,
    i: int,
    x: np.ndarray,
    draws: np.ndarray,
    diagnostics: Mapping[str, float],
) -> Path:
    """Write reference draws (N, D), their observation x and the sampler's diagnostics to a file.

    The write is atomic. Returns the path of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draws = np.ones((3, 2))
        ...     path = save(Path(folder), "toy", 1, np.zeros(2), draws, {"rhat": 1.0})
        ...     load("toy", 1, np.zeros(2), (Path(folder),)).shape
        (3, 2)
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}-{i}.npz"
    arrays = {"x": x, "draws": np.asarray(draws, np.float32)}
    arrays |= {name: np.asarray(value) for name, value in diagnostics.items()}
    with atomic_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path

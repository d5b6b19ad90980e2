"""Reference draws that were made before: the few that ship, and those of a folder of the user's.

Public names: `FOLDER`, `cache_folder`, `load`, `save`.

Only samplers that take a minute are worth a file; the others draw in no time.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sbi_flows.core.files import whole_file

FOLDER = Path(__file__).parents[1] / "references"
"""What ships with the package."""

VARIABLE = "SBI_FLOWS_CACHE"

TOLERANCE = 1e-3
"""Relative, of an observation: an adaptive solver's steps differ between compilers and devices, by
far less than any task's noise."""


def cache_folder() -> Path:
    """Where references are kept that do not ship: `$SBI_FLOWS_CACHE`, or below the home folder."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "sbi_flows" / "references"


def load(task: str, i: int, x: np.ndarray, folders: tuple[Path, ...]) -> np.ndarray | None:
    """Draws (N, D) for observation i of a task, from the first folder that has them.

    Files that cannot be read, or that belong to another observation than x, are passed over.

    Example:
        >>> load("no_such_task", 1, np.zeros(2), (FOLDER,)) is None
        True
    """
    for folder in folders:
        try:
            with np.load(folder / f"{task}-{i}.npz", allow_pickle=False) as file:
                if np.allclose(file["x"], x, rtol=TOLERANCE, atol=1e-5):
                    return np.asarray(file["draws"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            continue
    return None


def save(
    folder: Path, task: str, i: int, x: np.ndarray, draws: np.ndarray, found: Mapping[str, float]
) -> Path:
    """Write draws (N, D), their observation and what is known of the sampler, whole or not at all.

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
    arrays |= {name: np.asarray(value) for name, value in found.items()}
    with whole_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path

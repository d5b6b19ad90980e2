"""Files of published reference posteriors, which are not part of the project."""

import os
from pathlib import Path

import numpy as np
import pytest

DEFAULT_FOLDER = Path(__file__).parents[4] / "shared" / "reference"
FOLDER = Path(os.environ.get("SBI_FLOWS_REFERENCE", DEFAULT_FOLDER))


def published(task: str, name: str) -> np.ndarray:
    """Read an array from a task's file, or skip the test if there is no file."""
    path = FOLDER / f"{task}.npz"
    if not path.exists():
        pytest.skip(f"no published reference posterior at {path}; set SBI_FLOWS_REFERENCE")
    with np.load(path) as file:
        return file[name]

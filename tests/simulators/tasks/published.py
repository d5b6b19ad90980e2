"""Published reference posteriors, which the project does not contain."""

import os
from pathlib import Path

import numpy as np
import pytest

BESIDE = Path(__file__).parents[4] / "shared" / "reference"
FOLDER = Path(os.environ.get("SBI_FLOWS_REFERENCE", BESIDE))


def published(task: str, name: str) -> np.ndarray:
    """An array of a task's file; skips the test where the file is not there."""
    path = FOLDER / f"{task}.npz"
    if not path.exists():
        pytest.skip(f"no published reference posterior at {path}; set SBI_FLOWS_REFERENCE")
    with np.load(path) as file:
        return file[name]

"""`python -m benchmarks references --check DIR`: compare reference samplers with stored draws.

Public names: `run`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import simulators
from benchmarks.suite.records import BadInput, provenance, write_json
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.c2st import CompiledMLP, c2st
from simulators import Task
from simulators.adapters.task import ReferenceFailed


def run(folder: Path, tasks: tuple[str, ...], results: Path) -> Path:
    """Compute the C2ST between draws of our reference samplers and draws stored in a folder.

    Args:
        folder: Folder of files `<task>.npz`, each with arrays `x_1`, `posterior_1`, `x_2`, ...
        tasks: Names of tasks; by default, all tasks that have a file.
        results: Folder in which the record is written.

    Returns:
        The path of the record.

    Raises:
        BadInput: A task is unknown or has no exact sampler, or a file cannot be read.
    """
    unknown = [name for name in tasks if name not in simulators.names()]
    if unknown:
        known = ", ".join(simulators.names())
        raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
    named = dict.fromkeys(tasks)
    chosen = [n for n in named or simulators.names() if named or (folder / f"{n}.npz").exists()]
    without_sampler = [name for name in chosen if simulators.get(name).sample_reference is None]
    if without_sampler:
        raise BadInput(f"--tasks: {', '.join(without_sampler)} has no exact sampler")
    pairs = [(simulators.get(name), *pair) for name in chosen for pair in _read(folder, name)]
    if not pairs:
        raise BadInput(f"--check: expected a file <task>.npz of one of the tasks in {folder}")
    scores: dict[str, list[float]] = {}
    for task, x, posterior in tqdm(pairs, desc="observations"):
        task_scores = scores.setdefault(task.name, [])
        key = jax.random.fold_in(jax.random.key(0), len(task_scores))
        score = _score(key, task, x, posterior)
        task_scores.append(score)
        tqdm.write(f"{task.name}: {score:.3f}")
    columns = {"C2ST": (", ".join(f"{v:.3f}" for v in values) for values in scores.values())}
    print(table(list(scores), columns))
    record = {**provenance(), "kind": "references", "c2st": scores}
    return write_json(results / "references-check.json", record)


def _read(folder: Path, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    path = folder / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            count = sum(key.startswith("posterior_") for key in file.files)
            for i in range(1, count + 1):
                yield np.asarray(file[f"x_{i}"]), np.asarray(file[f"posterior_{i}"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"--check: cannot read {path}: {error}") from error


def _score(key: Key, task: Task, x: Any, posterior: np.ndarray) -> float:
    assert task.sample_reference is not None
    try:
        draws = task.sample_reference(key, jnp.asarray(x, float), len(posterior))
        return float(c2st(posterior, np.asarray(draws), backend=CompiledMLP()))
    except (ReferenceFailed, ValueError) as error:
        raise BadInput(f"--check: {task.name}: {error}") from error

"""`python -m benchmarks references`: draw reference posteriors with NUTS, and store the draws.

Public names: `run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import simulators
from benchmarks.suite.records import BadInput, writable_folder
from simulators import Task
from simulators.adapters import stored
from simulators.adapters.mcmc import NutsReference

DRAWS = 10_000


def run(folder: Path, tasks: tuple[str, ...] = ()) -> int:
    """Draw and store the reference posteriors that have no file yet.

    After an interruption, a new call continues with the missing files.

    Args:
        folder: Folder of the files `<task>-<i>.npz`, where i is the observation number.
        tasks: Names of tasks; by default, all tasks whose reference sampler is NUTS.

    Returns:
        The number of reference posteriors drawn by this call.

    Raises:
        BadInput: A task is unknown or does not use stored draws, or the folder is not writable.
    """
    chosen = [_task(name) for name in tasks or _stored_tasks()]
    folder = writable_folder(folder, "--folder")
    pairs = [(task, i + 1) for task in chosen for i in range(task.num_observations)]
    missing = [pair for pair in pairs if not _is_stored(*pair, folder)]
    print(f"{len(pairs) - len(missing)} of {len(pairs)} references exist", file=sys.stderr)
    for task, i in tqdm(missing, desc="references", disable=not missing):
        _draw_and_store(task, i, folder)
    return len(missing)


def _stored_tasks() -> list[str]:
    """Return the names of the tasks whose reference draws are stored in files of the same name."""
    return [name for name in simulators.names() if simulators.get(name).stored_as == name]


def _task(name: str) -> Task:
    known = _stored_tasks()
    if name not in known:
        raise BadInput(f"--tasks: expected names out of {', '.join(known)}; got {name}")
    return simulators.get(name)


def _is_stored(task: Task, i: int, folder: Path) -> bool:
    draws = stored.load(task.name, i, task.stored_observation(i), (folder,))
    return draws is not None and len(draws) >= DRAWS


def _draw_and_store(task: Task, i: int, folder: Path) -> None:
    sampler = task.sample_reference
    assert isinstance(sampler, NutsReference)
    x = jnp.asarray(task.observation(i))
    draws, diagnostics = sampler.diagnosed(task.reference_key(i), x, DRAWS)
    stored.save(folder, task.name, i, task.stored_observation(i), np.asarray(draws), diagnostics)
    text = ", ".join(f"{name} {value:.4g}" for name, value in diagnostics.items())
    tqdm.write(f"{task.name} {i}: {text}", file=sys.stderr)

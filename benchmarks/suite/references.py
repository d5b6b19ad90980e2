"""`python -m benchmarks references`: make the reference posteriors that take long, and keep them.

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
    """Make what is not there yet; a call that was interrupted goes on where it stopped.

    Args:
        folder: Where the files go, `<task>-<i>.npz`.
        tasks: Names of tasks; all that sample by NUTS by default.

    Returns:
        The number of references made.

    Raises:
        BadInput: An unknown task, one that needs no file, or a folder that cannot be written to.
    """
    chosen = [_task(name) for name in tasks or _kept()]
    folder = writable_folder(folder, "--folder")
    pairs = [(task, i + 1) for task in chosen for i in range(task.num_observations)]
    missing = [pair for pair in pairs if not _is_there(*pair, folder)]
    print(f"{len(pairs) - len(missing)} of {len(pairs)} references are there", file=sys.stderr)
    for task, i in tqdm(missing, desc="references", disable=not missing):
        _make(task, i, folder)
    return len(missing)


def _kept() -> list[str]:
    """Tasks whose references are kept under their own name."""
    return [name for name in simulators.names() if simulators.get(name).stored_as == name]


def _task(name: str) -> Task:
    known = _kept()
    if name not in known:
        raise BadInput(f"--tasks: expected names out of {', '.join(known)}; got {name}")
    return simulators.get(name)


def _is_there(task: Task, i: int, folder: Path) -> bool:
    draws = stored.load(task.name, i, task.stored_observation(i), (folder,))
    return draws is not None and len(draws) >= DRAWS


def _make(task: Task, i: int, folder: Path) -> None:
    sampler = task.sample_reference
    assert isinstance(sampler, NutsReference)
    draws, found = sampler.diagnosed(task.reference_key(i), jnp.asarray(task.observation(i)), DRAWS)
    stored.save(folder, task.name, i, task.stored_observation(i), np.asarray(draws), found)
    said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    tqdm.write(f"{task.name} {i}: {said}", file=sys.stderr)

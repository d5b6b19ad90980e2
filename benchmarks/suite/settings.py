"""Settings of `python -m benchmarks run`, checked before the computation starts.

Public names: `Settings`, `own_task`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import simulators
from benchmarks.suite import methods
from benchmarks.suite.records import BadInput
from simulators import Task
from simulators.adapters import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Tasks, methods and sizes of a benchmark.

    Attributes:
        tasks: Names of the tasks.
        simulator: A task of the user: `package.module:name`, or the name of an entry point.
        methods: Names of the methods.
        budgets: Numbers of simulations.
        seeds: Number of seeds; the seeds are 1, 2, ...
        observations: Maximum number of observations per task.
        observations_from: Folder of `<task>.npz` files whose arrays `x_1`, `x_2`, ... replace the
            task's observations.
        draws: Number of draws in each of the two sets of a C2ST.
        datasets: Number of simulated data sets in the calibration check.
        check_draws: Number of posterior draws for each data set of the calibration check.
        held_out: Number of new simulations for the held-out negative log density.
        results: Folder in which the records are written.
        jobs: Number of processes that carry out runs in parallel.

    Raises:
        BadInput: A task or method is unknown, or a number is too small.
    """

    tasks: tuple[str, ...] = ()
    simulator: str | None = None
    budgets: tuple[int, ...] = (10_000,)
    methods: tuple[str, ...] = (methods.DEFAULT,)
    seeds: int = 1
    observations: int = 5
    observations_from: Path | None = None
    draws: int = 10_000
    datasets: int = 1_000
    check_draws: int = 1_000
    held_out: int = 10_000
    results: Path = Path("results")
    jobs: int = 1

    def __post_init__(self) -> None:
        """Raise BadInput if a name is unknown or a number is too small."""
        unknown = [name for name in self.tasks if name not in simulators.names()]
        if unknown:
            known = ", ".join(simulators.names())
            raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
        if not self.names:
            raise BadInput("--tasks: expected at least one name, or a --simulator")
        for name in self.methods:
            methods.get(name)
        minimum = {
            "seeds": 1,
            "jobs": 1,
            "observations": 1,
            "draws": 10,
            "datasets": 50,
            "check_draws": 20,
        }
        for name, smallest in minimum.items():
            value = getattr(self, name)
            if value < smallest:
                option = name.replace("_", "-")
                raise BadInput(f"--{option}: expected at least {smallest}, got {value}")
        if min(self.budgets) < 10:
            raise BadInput(f"--budgets: expected at least 10 simulations, got {min(self.budgets)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tasks. The task of the user, if any, is the last."""
        user_task = (own_task(self.simulator).name,) if self.simulator else ()
        return (*self.tasks, *user_task)

    def task(self, name: str) -> Task:
        """Return the task with this name."""
        if self.simulator and name not in self.tasks:
            return own_task(self.simulator)
        return simulators.get(name)

    def record(self) -> dict[str, Any]:
        """Return the settings that affect the result of a run, as JSON data for its record."""
        names = ("observations", "draws", "datasets", "check_draws", "held_out")
        source = "given" if self.observations_from else "task"
        return {**{name: getattr(self, name) for name in names}, "observations_from": source}


@cache
def own_task(place: str) -> Task:
    """Import a task that the user wrote.

    Args:
        place: `package.module:name` of a `Task` or of a function that returns one, or the name of
            an entry point of the group `sbi_flows.simulators`.

    Raises:
        BadInput: The task cannot be imported, the object is not a `Task`, there is no such entry
            point, the task has the name of a built-in task, or its name is not valid in a file
            name.

    Example:
        >>> own_task("simulators:two_moons")
        Traceback (most recent call last):
        ...
        benchmarks.suite.records.BadInput: --simulator: the name 'two_moons' is that of ...
    """
    try:
        imported = _object_at(place)
        task = imported() if callable(imported) else imported
    except BadInput:
        raise
    except Exception as error:  # the user's module can raise anything
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"--simulator: cannot import {place}: {message}") from error
    if not isinstance(task, Task):
        raise BadInput(
            f"--simulator: expected a simulators.Task at {place}, got {type(task).__name__}"
        )
    if task.name in simulators.names():
        raise BadInput(f"--simulator: the name {task.name!r} is that of a benchmark task")
    if not re.fullmatch(r"[\w.]+", task.name):
        raise BadInput(
            "--simulator: expected a task name of letters, digits, _ and . (it becomes part of "
            f"file names), got {task.name!r}"
        )
    return task


def _object_at(place: str) -> Any:
    """Import the object at `package.module:name`, or load the entry point `name`."""
    module, colon, name = place.partition(":")
    if module and name:
        return getattr(importlib.import_module(module), name)
    entry_points = registry.offered()
    if colon or place not in entry_points:
        known = ", ".join(sorted(entry_points)) or "none is installed"
        raise BadInput(
            f"--simulator: expected package.module:name, or the name of an entry point of "
            f"{registry.ENTRY_POINTS} ({known}), got {place!r}"
        )
    return entry_points[place].load()

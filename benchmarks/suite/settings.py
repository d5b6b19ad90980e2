"""What a benchmark runs on, and how large: everything checked before any work.

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
    """What to run, and how large.

    Attributes:
        tasks: Names of the tasks.
        simulator: A task of the user's own, as `package.module:name`.
        methods: Names of the methods.
        budgets: Numbers of simulations.
        seeds: Number of seeds; they are 1, 2, ...
        observations: Number of observations to compare at, or as many as the task has.
        observations_from: Folder of `<task>.npz` files whose `x_1`, `x_2`, ... replace the task's
            own observations.
        draws: Draws on either side of a C2ST.
        datasets: Data sets of the calibration check.
        check_draws: Draws of the posterior for each of them.
        held_out: Fresh simulations behind the held-out negative log density.
        results: Folder for the records.
        jobs: Runs at the same time, each in a process of its own.

    Raises:
        BadInput: An unknown task, a number that is not positive, or too few draws or data sets.
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
        """Refuse what would fail later."""
        unknown = [name for name in self.tasks if name not in simulators.names()]
        if unknown:
            known = ", ".join(simulators.names())
            raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
        if not self.names:
            raise BadInput("--tasks: expected at least one name, or a --simulator")
        for name in self.methods:
            methods.get(name)
        lowest = {
            "seeds": 1,
            "jobs": 1,
            "observations": 1,
            "draws": 10,
            "datasets": 50,
            "check_draws": 20,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                got = getattr(self, name)
                raise BadInput(f"--{option}: expected at least {least}, got {got}")
        if min(self.budgets) < 10:
            raise BadInput(f"--budgets: expected at least 10 simulations, got {min(self.budgets)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tasks, the user's own last."""
        own = (own_task(self.simulator).name,) if self.simulator else ()
        return (*self.tasks, *own)

    def task(self, name: str) -> Task:
        """The task of this name."""
        if self.simulator and name not in self.tasks:
            return own_task(self.simulator)
        return simulators.get(name)

    def record(self) -> dict[str, Any]:
        """What a single run depends on; nothing that names the machine."""
        own = ("observations", "draws", "datasets", "check_draws", "held_out")
        given = "given" if self.observations_from else "task"
        return {**{name: getattr(self, name) for name in own}, "observations_from": given}


@cache
def own_task(place: str) -> Task:
    """The `Task` at `package.module:name`, or the one that a function of this name returns.

    A name without a module is that of an entry point in the group `sbi_flows.simulators`.

    Raises:
        BadInput: It cannot be imported or is no task, there is no such entry point, its name is
            taken, or it fits no file name.

    Example:
        >>> own_task("simulators:two_moons")
        Traceback (most recent call last):
        ...
        benchmarks.suite.records.BadInput: --simulator: expected a name of its own, got 'two_moons'
    """
    try:
        found = _object_at(place)
        task = found() if callable(found) else found
    except BadInput:
        raise
    except Exception as error:  # whatever the user's module raises
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"--simulator: cannot get {place}: {said}") from error
    if not isinstance(task, Task):
        raise BadInput(
            f"--simulator: expected a simulators.Task at {place}, got {type(task).__name__}"
        )
    if task.name in simulators.names():
        raise BadInput(f"--simulator: expected a name of its own, got {task.name!r}")
    if not re.fullmatch(r"[\w.]+", task.name):
        raise BadInput(
            f"--simulator: expected a name of letters, digits and _ for the files, got "
            f"{task.name!r}"
        )
    return task


def _object_at(place: str) -> Any:
    """What `package.module:name`, or the entry point `name`, stands for."""
    module, colon, name = place.partition(":")
    if module and name:
        return getattr(importlib.import_module(module), name)
    named = registry.offered()
    if colon or place not in named:
        known = ", ".join(sorted(named)) or "none is installed"
        raise BadInput(
            f"--simulator: expected package.module:name, or the name of an entry point of "
            f"{registry.ENTRY_POINTS} ({known}), got {place!r}"
        )
    return named[place].load()

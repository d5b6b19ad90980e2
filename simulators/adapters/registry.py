"""Registry of tasks by name, for command lines and tables.

In Python code, call the constructors of the tasks instead.

Public names: `ENTRY_POINTS`, `get`, `names`, `list`, `offered`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from simulators.adapters.task import Task
from simulators.gallery.eight_schools import eight_schools
from simulators.gallery.influenza import influenza, influenza_ode
from simulators.gallery.lynx_hare import lynx_hare
from simulators.tasks.bernoulli_glm import bernoulli_glm, bernoulli_glm_raw
from simulators.tasks.drift_diffusion import drift_diffusion
from simulators.tasks.g_and_k import g_and_k
from simulators.tasks.gaussian_linear import gaussian_linear
from simulators.tasks.gaussian_linear_uniform import gaussian_linear_uniform
from simulators.tasks.gaussian_mixture import gaussian_mixture
from simulators.tasks.hodgkin_huxley import hodgkin_huxley
from simulators.tasks.lens import lens
from simulators.tasks.lotka_volterra import lotka_volterra
from simulators.tasks.normal_set import normal_set
from simulators.tasks.ornstein_uhlenbeck import ornstein_uhlenbeck
from simulators.tasks.random_field import random_field
from simulators.tasks.sensors import sensors
from simulators.tasks.sir import sir
from simulators.tasks.slcp import slcp
from simulators.tasks.slcp_distractors import slcp_distractors
from simulators.tasks.stochastic_volatility import stochastic_volatility
from simulators.tasks.two_instruments import two_instruments
from simulators.tasks.two_moons import two_moons

_CONSTRUCTORS: dict[str, Callable[[], Task]] = {
    constructor.__name__: constructor
    for constructor in (
        bernoulli_glm,
        bernoulli_glm_raw,
        drift_diffusion,
        eight_schools,
        g_and_k,
        gaussian_linear,
        gaussian_linear_uniform,
        gaussian_mixture,
        hodgkin_huxley,
        influenza,
        influenza_ode,
        lens,
        lotka_volterra,
        lynx_hare,
        normal_set,
        ornstein_uhlenbeck,
        random_field,
        sensors,
        sir,
        slcp,
        slcp_distractors,
        stochastic_volatility,
        two_instruments,
        two_moons,
    )
}


ENTRY_POINTS = "sbi_flows.simulators"
"""Entry-point group in which other packages register tasks."""


def get(name: str) -> Task:
    """Return the task of this name, from this package or from another installed package.

    Raises:
        ValueError: No task has this name (the message lists all names), or the entry point of this
            name is not a `Task`.

    Example:
        >>> get("slcp").dim
        5
    """
    if name in _CONSTRUCTORS:
        return _CONSTRUCTORS[name]()
    entry_points = offered()
    if name not in entry_points:
        raise ValueError(f"task: expected one of {', '.join(list())}, got {name!r}")
    loaded = entry_points[name].load()
    task = loaded() if callable(loaded) else loaded
    if not isinstance(task, Task):
        value = entry_points[name].value
        raise ValueError(f"{value}: expected a Task, got {type(task).__name__}")
    return task


def names() -> tuple[str, ...]:
    """Return the names of this package's tasks in alphabetical order.

    Example:
        >>> names()[:2]
        ('bernoulli_glm', 'bernoulli_glm_raw')
    """
    return tuple(sorted(_CONSTRUCTORS))


def list() -> tuple[str, ...]:
    """Return the names of all tasks, including tasks of other installed packages.

    Example:
        >>> set(names()) <= set(list())
        True
    """
    return tuple(sorted({*_CONSTRUCTORS, *offered()}))


def offered() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the entry points of tasks in other installed packages, by name."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}

"""Tasks by name, for command lines and tables; in code, call the constructors themselves.

Public names: `get`, `names`.
"""

from __future__ import annotations

from collections.abc import Callable

from simulators.bernoulli_glm import bernoulli_glm, bernoulli_glm_raw
from simulators.gaussian_linear import gaussian_linear
from simulators.gaussian_linear_uniform import gaussian_linear_uniform
from simulators.gaussian_mixture import gaussian_mixture
from simulators.lotka_volterra import lotka_volterra
from simulators.lynx_hare import lynx_hare
from simulators.sir import sir
from simulators.slcp import slcp
from simulators.slcp_distractors import slcp_distractors
from simulators.task import Task
from simulators.two_moons import two_moons

_CONSTRUCTORS: dict[str, Callable[[], Task]] = {
    constructor.__name__: constructor
    for constructor in (
        bernoulli_glm,
        bernoulli_glm_raw,
        gaussian_linear,
        gaussian_linear_uniform,
        gaussian_mixture,
        lotka_volterra,
        lynx_hare,
        sir,
        slcp,
        slcp_distractors,
        two_moons,
    )
}


def get(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: There is none; the message lists the names.

    Example:
        >>> get("slcp").dim
        5
    """
    if name not in _CONSTRUCTORS:
        raise ValueError(f"task: expected one of {', '.join(names())}, got {name!r}")
    return _CONSTRUCTORS[name]()


def names() -> tuple[str, ...]:
    """Names of all tasks, in alphabetical order.

    Example:
        >>> names()[:2]
        ('bernoulli_glm', 'bernoulli_glm_raw')
    """
    return tuple(sorted(_CONSTRUCTORS))

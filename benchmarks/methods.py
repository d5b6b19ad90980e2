"""Named estimators: one line each, the same for every task.

Public names: `METHODS`, `DEFAULT`, `get`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import sbi_flows as sf
from benchmarks.records import BadInput
from simulators import Task

DEFAULT = "stack"


def _stack(task: Task, *estimators: Callable[[sf.Prior], sf.NPE]) -> sf.Stack:
    prior = sf.as_prior(task.prior)
    return sf.Stack([estimator(prior) for estimator in estimators])


def _emulated(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, emulator=sf.Emulator(), members=2, screening=0.1)


def _spline(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, members=2)


def _affine(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, sf.MAF(), members=2)


Method: TypeAlias = Callable[[Task], sf.NPE | sf.Stack]

METHODS: dict[str, Method] = {
    "stack": lambda task: _stack(task, _emulated, _spline, _affine),
    "stack-plain": lambda task: _stack(task, _spline, _affine),
    "npe": lambda task: sf.NPE(task.prior),
    "npe-emulated": lambda task: _emulated(sf.as_prior(task.prior)),
    "npe-one": lambda task: sf.NPE(task.prior, members=1),
    "npe-coupling": lambda task: sf.NPE(task.prior, sf.NSF(coupling=True)),
    "npe-maf": lambda task: sf.NPE(task.prior, sf.MAF()),
    "npe-mixture": lambda task: sf.NPE(task.prior, sf.GaussianMixture()),
    "npe-flow-matching": lambda task: sf.NPE(task.prior, sf.FlowMatching()),
    "npe-diffusion": lambda task: sf.NPE(task.prior, sf.Diffusion()),
    "npe-cnf": lambda task: sf.NPE(task.prior, sf.CNF()),
}


def get(name: str) -> Method:
    """The constructor of this name, `task -> estimator`.

    Raises:
        BadInput: There is none; the message lists the names.
    """
    if name not in METHODS:
        raise BadInput(f"--methods: expected names out of {', '.join(METHODS)}; got {name}")
    return METHODS[name]

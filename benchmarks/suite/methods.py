"""Named estimators: one line each, the same for every task.

Public names: `METHODS`, `DEFAULT`, `Distilling`, `Estimator`, `get`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax

import sbi_flows as sf
from benchmarks.suite.records import BadInput
from sbi_flows.core.typing import Key
from simulators import Task

DEFAULT = "stack"


@dataclasses.dataclass(frozen=True)
class Distilling:
    """An estimator whose posterior is distilled after the fit.

    Attributes:
        npe: The estimator.
        steps: Evaluations a draw.
    """

    npe: sf.NPE
    steps: int

    @property
    def prior(self) -> sf.Prior:
        """The prior."""
        return self.npe.prior

    def fit(
        self, key: Key, simulations: sf.Simulations, *, progress: bool = True
    ) -> tuple[sf.Posterior, sf.History]:
        """Fit and distil."""
        # the teacher is what the estimator by itself makes of the key
        posterior, history = self.npe.fit(key, simulations, progress=progress)
        own = jax.random.fold_in(key, 1)
        fast, _ = sf.distil(own, posterior, simulations, steps=self.steps, progress=progress)
        return fast, history


Estimator: TypeAlias = sf.NPE | sf.Stack | Distilling


def _stack(task: Task, *estimators: Callable[[sf.Prior], sf.NPE]) -> sf.Stack:
    prior = sf.as_prior(task.prior)
    return sf.Stack([estimator(prior) for estimator in estimators])


def _emulated(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, emulator=sf.Emulator(), members=2, screening=0.1)


def _spline(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, members=2)


def _affine(prior: sf.Prior) -> sf.NPE:
    return sf.NPE(prior, sf.MAF(), members=2)


Method: TypeAlias = Callable[[Task], Estimator]

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
    "npe-diffusion-distilled": lambda task: Distilling(sf.NPE(task.prior, sf.Diffusion()), 2),
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

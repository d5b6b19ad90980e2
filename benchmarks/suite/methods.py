"""Inference methods by name. A method is a function that makes an estimator for a task.

Public names: `METHODS`, `DEFAULT`, `Distilling`, `Estimator`, `get`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax

import sbi_flows as sf
from benchmarks.suite.embedded import embedded
from benchmarks.suite.records import BadInput
from sbi_flows.core.typing import Key
from simulators import Task

DEFAULT = "stack"


@dataclasses.dataclass(frozen=True)
class Distilling:
    """Estimator that fits a diffusion or flow-matching NPE, and distils its posterior.

    Attributes:
        npe: Estimator that fits the teacher, which is the posterior to distil.
        steps: Number of network evaluations per draw after distillation.
    """

    npe: sf.NPE
    steps: int

    @property
    def prior(self) -> sf.Prior:
        """The prior of the estimator."""
        return self.npe.prior

    def fit(
        self, key: Key, simulations: sf.Simulations, *, progress: bool = True
    ) -> tuple[sf.Posterior, sf.History]:
        """Fit the teacher and distil it.

        Return the distilled posterior, and the training history of the teacher.

        The teacher is the posterior that `npe.fit` returns for the same key.
        """
        teacher, history = self.npe.fit(key, simulations, progress=progress)
        distil_key = jax.random.fold_in(key, 1)
        student, _ = sf.distil(
            distil_key, teacher, simulations, steps=self.steps, progress=progress
        )
        return student, history


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
    "npe-embedding": embedded,
}


def get(name: str) -> Method:
    """Return the method with the given name.

    Raises:
        BadInput: The name is unknown. The message lists the known names.
    """
    if name not in METHODS:
        raise BadInput(f"--methods: expected names out of {', '.join(METHODS)}; got {name}")
    return METHODS[name]

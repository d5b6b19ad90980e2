"""Named estimators: one line each, the same for every task.

Public names: `METHODS`, `DEFAULT`, `get`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import sbi_flows as sf
from benchmarks.records import BadInput
from simulators import Task

DEFAULT = "npe"


def _stack(task: Task) -> sf.Stack:
    """Spline and affine flows, autoregressive and coupling, and a mixture of Gaussians."""
    prior = sf.as_prior(task.prior)
    kinds = (sf.NSF(), sf.NSF(coupling=True), sf.MAF(), sf.GaussianMixture())
    return sf.Stack([sf.NPE(prior, kind) for kind in kinds])


Method: TypeAlias = Callable[[Task], sf.NPE | sf.Stack]

METHODS: dict[str, Method] = {
    "npe": lambda task: sf.NPE(task.prior),
    "npe-one": lambda task: sf.NPE(task.prior, members=1),
    "npe-coupling": lambda task: sf.NPE(task.prior, sf.NSF(coupling=True)),
    "npe-maf": lambda task: sf.NPE(task.prior, sf.MAF()),
    "npe-mixture": lambda task: sf.NPE(task.prior, sf.GaussianMixture()),
    "stack": _stack,
}


def get(name: str) -> Method:
    """The constructor of this name, `task -> estimator`.

    Raises:
        BadInput: There is none; the message lists the names.
    """
    if name not in METHODS:
        raise BadInput(f"--methods: expected names out of {', '.join(METHODS)}; got {name}")
    return METHODS[name]

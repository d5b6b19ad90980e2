"""Named estimators: one line each, the same for every task.

Public names: `METHODS`, `DEFAULT`, `names`, `get`.
"""

from __future__ import annotations

from collections.abc import Callable

import sbi_flows as sf
from benchmarks.records import BadInput
from simulators import Task

DEFAULT = "npe"

METHODS: dict[str, Callable[[Task], sf.NPE]] = {
    "npe": lambda task: sf.NPE(task.prior),
    "npe-one": lambda task: sf.NPE(task.prior, members=1),
    "npe-coupling": lambda task: sf.NPE(task.prior, sf.NSF(coupling=True)),
    "npe-maf": lambda task: sf.NPE(task.prior, sf.MAF()),
    "npe-mixture": lambda task: sf.NPE(task.prior, sf.GaussianMixture()),
}


def names() -> tuple[str, ...]:
    """Names of all methods, the default first."""
    return tuple(METHODS)


def get(name: str) -> Callable[[Task], sf.NPE]:
    """The constructor of this name, `task -> estimator`.

    Raises:
        BadInput: There is none; the message lists the names.
    """
    if name not in METHODS:
        raise BadInput(f"--methods: expected names out of {', '.join(names())}; got {name}")
    return METHODS[name]

"""Published C2ST values of other estimators, all computed with the same classifier as `sf.c2st`.

Public names: `Published`, `published`, `best_amortised`, `figure`.
"""

from __future__ import annotations

import csv
import dataclasses
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")


@dataclasses.dataclass(frozen=True)
class Published:
    """Published C2ST of a method, averaged over ten observations.

    Attributes:
        task: Name of the task.
        budget: Number of simulations. Sequential methods need this number for each observation.
        method: Name of the method, such as NPE, NLE or NRE. A leading S marks sequential methods.
        c2st: Mean C2ST.
        source: Citation of the publication.
    """

    task: str
    budget: int
    method: str
    c2st: float
    source: str

    @property
    def is_amortised(self) -> bool:
        """Whether the method is amortised: one fit serves all observations."""
        return not self.method.startswith("S")


@cache
def published() -> tuple[Published, ...]:
    """Read all published values.

    Example:
        >>> len({figure.task for figure in published()})
        10
    """
    with FILE.open(newline="") as file:
        return tuple(
            Published(r["task"], int(r["budget"]), r["method"], float(r["c2st"]), r["source"])
            for r in csv.DictReader(file)
        )


def best_amortised(task: str, budget: int) -> Published | None:
    """Return the amortised method with the lowest published C2ST, or None if no value is published.

    Example:
        >>> best_amortised("two_moons", 10_000).c2st
        0.592
    """
    fits = [p for p in published() if (p.task, p.budget) == (task, budget) and p.is_amortised]
    return min(fits, key=lambda p: p.c2st, default=None)


def figure(task: str, budget: int, method: str) -> float | None:
    """Return the published C2ST of one method, or None if no value is published.

    Example:
        >>> figure("two_moons", 1_000, "NPE")
        0.725
    """
    values = [p.c2st for p in published() if (p.task, p.budget, p.method) == (task, budget, method)]
    return values[0] if values else None

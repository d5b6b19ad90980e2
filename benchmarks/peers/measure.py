"""What is measured of each contestant, on the same data and side by side.

Public names: `Curve`, `Data`, `Timing`, `first_at_most`, `held_out_loss`, `interleaved`,
`sbc_ranks`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from benchmarks.peers.contestant import Contestant
from sbi_flows.core.typing import Obs


class Data(NamedTuple):
    """Rows of simulations: parameters (N, D) and observations (N, *event)."""

    theta: np.ndarray
    x: Obs


class Timing(NamedTuple):
    """Seconds of one call: the first one, with what it compiles, and later ones."""

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the later calls."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"first": self.first, "seconds": self.seconds, "median": self.median}


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, what: str
) -> dict[str, Timing]:
    """Time each call once, then `repeats` times in turn: a, b, b, a, a, b, ...

    What slows the machine for a while slows neighbours alike.

    Example:
        >>> said = []
        >>> calls = {name: lambda name=name: said.append(name) for name in "ab"}
        >>> _ = interleaved(calls, 3, "example")
        >>> "".join(said)
        'ababbaab'
    """
    first = {name: _seconds(call) for name, call in calls.items()}
    later: dict[str, list[float]] = {name: [] for name in calls}
    for i in tqdm(range(repeats), desc=what, disable=None):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            later[name].append(_seconds(calls[name]))
    return {name: Timing(first[name], later[name]) for name in calls}


class Curve:
    """Held-out loss after each epoch of a fit, and the seconds of training alone until then.

    Give `watch` to the fit; the clock stands still inside it.
    """

    def __init__(self, loss: Callable[[], float]) -> None:
        """Hold what gives the loss of the present weights, and start the clock."""
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._loss, self._spent, self._since = loss, 0.0, time.perf_counter()

    def watch(self) -> None:
        """Take the loss and the time."""
        self._spent += time.perf_counter() - self._since
        self.losses.append(self._loss())
        self.seconds.append(self._spent)
        self._since = time.perf_counter()


def first_at_most(losses: Sequence[float], target: float) -> int | None:
    """Number, from 1, of the first loss that is at most the target.

    Example:
        >>> first_at_most([3.0, 2.0, 1.0], 2.5), first_at_most([3.0, float("nan")], 2.0)
        (2, None)
    """
    return next((i for i, loss in enumerate(losses, start=1) if loss <= target), None)


def held_out_loss(contestant: Contestant, data: Data) -> float:
    """Mean negative log density of theta, in its own units and in nats."""
    log_prob = contestant.log_prob(np.asarray(data.theta)[:, None], data.x)
    return -float(np.mean(log_prob))


def sbc_ranks(contestant: Contestant, data: Data, draws: int, seed: int) -> np.ndarray:
    """Share of the draws for each data set that are below its true parameters, shape (N, D)."""
    sampled = contestant.sample(data.x, draws, seed=seed)
    return np.mean(sampled < np.asarray(data.theta)[:, None], axis=1)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

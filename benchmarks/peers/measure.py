"""Measurements of the contestants: alternating timings, held-out losses and SBC ranks.

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
    """Simulations: parameters (N, D) and observations (N, *event)."""

    theta: np.ndarray
    x: Obs


class Timing(NamedTuple):
    """Times in seconds: `first` for the first call, which compiles; `seconds` for later calls."""

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median time of the later calls."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Return the times as JSON data."""
        return {"first": self.first, "seconds": self.seconds, "median": self.median}


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, label: str
) -> dict[str, Timing]:
    """Time each call once, then `repeats` times in alternating order: a, b, b, a, a, b, ...

    In this order, temporary load on the machine slows all functions equally.

    Args:
        calls: Functions to time, by name.
        repeats: Number of timed calls of each function after its first call.
        label: Label of the progress bar.

    Example:
        >>> order = []
        >>> calls = {name: lambda name=name: order.append(name) for name in "ab"}
        >>> _ = interleaved(calls, 3, "example")
        >>> "".join(order)
        'ababbaab'
    """
    first = {name: _seconds(call) for name, call in calls.items()}
    later: dict[str, list[float]] = {name: [] for name in calls}
    for i in tqdm(range(repeats), desc=label, disable=None):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            later[name].append(_seconds(calls[name]))
    return {name: Timing(first[name], later[name]) for name in calls}


class Curve:
    """Held-out loss and elapsed training time after each epoch of a fit.

    Pass the method `watch` to the fit as its callback. The time of the callback is not counted.

    Args:
        loss: Function that computes the held-out loss with the current weights.

    Attributes:
        losses: Held-out loss after each epoch.
        seconds: Training time until the end of each epoch.
    """

    def __init__(self, loss: Callable[[], float]) -> None:
        """Start the clock."""
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._loss, self._elapsed, self._start = loss, 0.0, time.perf_counter()

    def watch(self) -> None:
        """Record the held-out loss and the elapsed training time."""
        self._elapsed += time.perf_counter() - self._start
        self.losses.append(self._loss())
        self.seconds.append(self._elapsed)
        self._start = time.perf_counter()


def first_at_most(losses: Sequence[float], target: float) -> int | None:
    """Return the number (from 1) of the first epoch with a loss <= target, or None.

    Example:
        >>> first_at_most([3.0, 2.0, 1.0], 2.5), first_at_most([3.0, float("nan")], 2.0)
        (2, None)
    """
    return next((i for i, loss in enumerate(losses, start=1) if loss <= target), None)


def held_out_loss(contestant: Contestant, data: Data) -> float:
    """Compute the mean negative log density of theta given x, in nats."""
    log_prob = contestant.log_prob(np.asarray(data.theta)[:, None], data.x)
    return -float(np.mean(log_prob))


def sbc_ranks(contestant: Contestant, data: Data, draws: int, seed: int) -> np.ndarray:
    """Compute SBC ranks (N, D): the fraction of draws below the true value of each parameter."""
    sampled = contestant.sample(data.x, draws, seed=seed)
    return np.mean(sampled < np.asarray(data.theta)[:, None], axis=1)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

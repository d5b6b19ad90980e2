"""`python -m benchmarks peers`: this library and its peers on the same simulations, in one process.

Public names: `Settings`, `run`, `compare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sbi_flows as sf
import simulators
from benchmarks.peers.contestant import Contestant, Fit, Recipe
from benchmarks.peers.measure import (
    Curve,
    Data,
    Timing,
    first_at_most,
    held_out_loss,
    interleaved,
    sbc_ranks,
)
from benchmarks.peers.ours import Ours
from benchmarks.peers.report import text
from benchmarks.peers.table import Peer, choose
from benchmarks.suite.records import BadInput, Clock, provenance, writable_folder, write_json
from sbi_flows.diagnostics import CompiledMLP, c2st
from simulators import Task

OURS: dict[str, Callable[[sf.Prior, Recipe], Contestant]] = {
    "ours": Ours,
    "ours, defaults": partial(Ours, defaults=True),
}
"""Two contestants of this library: one with the sizes of the recipe, one with the defaults."""

TARGET_PEER = "sbi"
"""Peer whose converged held-out loss is the target loss of all contestants."""

LOSS_TOLERANCE = 1e-3
"""A fit reaches the target loss if its loss is at most this much above the target, in nats."""

PATIENCE = 20
"""A fit stops after this many epochs without a better validation loss. sbi has the same default."""

SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Peers, tasks and sizes of a comparison.

    Attributes:
        peers: Names of the peers.
        tasks: Names of the tasks.
        results: Folder in which the record is written.
        budget: Number of simulations, including failed ones.
        repeats: Number of timed calls after the first call.
        observations: Number of observations at which the C2ST is computed.
        coupling: Whether the flows have coupling layers rather than autoregressive layers.
        epochs: Number of epochs of each timed fit.
        max_epochs: Maximum number of epochs of the converged fit.
        draws: Number of draws, or of log densities, in a timed call. It is also the number of draws
            in each of the two sets of a C2ST.
        datasets: Number of simulated data sets in simulation-based calibration (SBC).
        check_draws: Number of posterior draws for each data set of SBC.
        held_out: Number of simulations for the held-out loss. The training does not use them.

    Raises:
        BadInput: A task is unknown, or a number is too small.
    """

    peers: tuple[str, ...]
    tasks: tuple[str, ...] = ("slcp",)
    results: Path = Path("results")
    budget: int = 10_000
    repeats: int = 3
    observations: int = 3
    coupling: bool = True
    epochs: int = 10
    max_epochs: int = 1_000
    draws: int = 10_000
    datasets: int = 200
    check_draws: int = 1_000
    held_out: int = 1_000

    def __post_init__(self) -> None:
        """Raise BadInput if a task is unknown or a number is too small."""
        unknown = [name for name in self.tasks if name not in simulators.names()]
        if unknown:
            known = ", ".join(simulators.names())
            raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
        # every library drops incomplete batches, and sbi trains for at least two epochs
        minimum = {
            "budget": 250,
            "epochs": 2,
            "max_epochs": 2,
            "draws": 10,
            "datasets": 2,
            "held_out": 2,
        }
        for field in dataclasses.fields(self):
            value, smallest = getattr(self, field.name), minimum.get(field.name, 1)
            if field.type == "int" and value < smallest:
                option = field.name.replace("_", "-")
                raise BadInput(f"--{option}: expected at least {smallest}, got {value}")

    def record(self) -> dict[str, Any]:
        """Return the sizes as JSON data for the record."""
        names = ("peers", "tasks", "results")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in names}


def run(settings: Settings) -> dict[str, Any]:
    """Compare the libraries on every task, print a table for each task, and write one record.

    Args:
        settings: Peers, tasks and sizes.

    Returns:
        The record, also written as `peers-<time>.json`.

    Raises:
        BadInput: A peer is unknown, or the folder is not writable.
    """
    peers = choose(settings.peers)
    folder = writable_folder(settings.results, "--results")
    recipe = Recipe(coupling=settings.coupling)
    tasks: dict[str, Any] = {}
    for name in settings.tasks:
        tasks[name] = compare(simulators.get(name), peers, recipe, settings)
        print(text(name, tasks[name], tuple(OURS)), flush=True)
    record = {
        **provenance(),
        "kind": "peers",
        "settings": settings.record(),
        "recipe": dataclasses.asdict(recipe),
        "patience": PATIENCE,
        "tolerance": LOSS_TOLERANCE,
        "skipped": [name for name in settings.peers if name not in peers],
        "tasks": tasks,
    }
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    print(f"written: {write_json(folder / f'peers-{stamp}.json', record)}")
    return record


def compare(
    task: Task, peers: Mapping[str, Peer], recipe: Recipe, settings: Settings
) -> dict[str, Any]:
    """Measure this library and the peers on one task.

    Args:
        task: The task.
        peers: The peers by name.
        recipe: Sizes of the flow and settings of the training.
        settings: Sizes of the comparison.

    Returns:
        A dict of `contestants`, the measurements and a description of each contestant, by name;
        `target`, the target loss and the name of the peer that defines it, or None if this peer
        does not take part; `valid`, the number of valid simulations; and `seconds`, the time of
        each part of the comparison.
    """
    prior, clock = sf.as_prior(task.prior), Clock()
    contestants = {name: make(prior, recipe) for name, make in OURS.items()}
    contestants |= {name: peer.make(prior, recipe) for name, peer in peers.items()}
    train, held_out, checked = (
        _simulate(task, prior, i, n)
        for i, n in enumerate((settings.budget, settings.held_out, settings.datasets))
    )
    with clock("training speed"):
        rates = _training(contestants, train, settings)
    with clock("fits until convergence"):
        fits = {n: _converged(n, c, train, held_out, settings) for n, c in contestants.items()}
    with clock("draws, densities and calibration"):
        times = _times(contestants, _batch(task, 1), checked, settings)
    with clock("c2st"):
        accuracies = {n: _c2st(c, task, settings) for n, c in contestants.items()}
    target = fits[TARGET_PEER]["held_out_loss"] if TARGET_PEER in fits else None
    measured = {
        name: {
            "described": contestant.describe(),
            "training": rates[name],
            "fit": fits[name],
            "to_target": _to_target(fits[name], rates[name], target),
            **{call: timing[name].record() for call, timing in times.items()},
            "c2st": accuracies[name],
        }
        for name, contestant in contestants.items()
    }
    return {
        "valid": len(train.theta),
        "target": None if target is None else {"peer": TARGET_PEER, "held_out_loss": target},
        "contestants": measured,
        "seconds": {**clock.seconds, "total": clock.total},
    }


def _training(
    contestants: Mapping[str, Contestant], train: Data, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Measure the training steps per second of each contestant in short fits."""
    fits: dict[str, Fit] = {}

    def fit(name: str) -> None:
        epochs = settings.epochs
        fits[name] = contestants[name].fit(*train, seed=SEED, epochs=epochs, patience=epochs)

    calls = {name: partial(fit, name) for name in contestants}
    timings = interleaved(calls, settings.repeats, "training speed")
    return {name: _rate_record(fits[name], timing) for name, timing in timings.items()}


def _rate_record(fit: Fit, timing: Timing) -> dict[str, Any]:
    """Convert the times of fits to steps per second.

    The additional time of the first fit is recorded as compilation.
    """
    rates = [fit.steps / seconds for seconds in timing.seconds]
    return {
        **fit._asdict(),
        "steps_per_second": rates,
        "median": fit.steps / timing.median,
        "first_seconds": timing.first,
        "compilation_seconds": max(0.0, timing.first - timing.median),
    }


def _converged(
    name: str, contestant: Contestant, train: Data, held_out: Data, settings: Settings
) -> dict[str, Any]:
    """Fit until early stopping, and record the held-out loss after each epoch."""
    curve = Curve(lambda: held_out_loss(contestant, held_out))
    contestant.fit(*train, seed=SEED, epochs=2, patience=PATIENCE, watch=curve.watch)  # compiles
    with Clock()(f"fit of {name} until convergence"):
        curve = Curve(lambda: held_out_loss(contestant, held_out))
        fit = contestant.fit(
            *train,
            seed=SEED,
            epochs=settings.max_epochs,
            patience=PATIENCE,
            watch=curve.watch,
        )
    return {
        **fit._asdict(),
        "stop_reason": "max_epochs" if fit.epochs >= settings.max_epochs else "patience",
        "seconds": curve.seconds[-1],
        "held_out_loss": held_out_loss(contestant, held_out),
        "curve": {"losses": curve.losses, "seconds": curve.seconds},
    }


def _to_target(
    fit: Mapping[str, Any], rate: Mapping[str, Any], target: float | None
) -> dict[str, Any] | None:
    """Compute epochs, steps and seconds until the held-out loss reaches the target.

    `seconds` is the number of steps divided by the median rate of the short fits in `rate`.
    `measured_seconds` is the time measured in the converged fit `fit`.
    """
    if target is None:
        return None
    epochs = first_at_most(fit["curve"]["losses"], target + LOSS_TOLERANCE)
    if epochs is None:
        return {"epochs": None, "steps": None, "seconds": None, "measured_seconds": None}
    steps = epochs * fit["steps"] // fit["epochs"]
    return {
        "epochs": epochs,
        "steps": steps,
        "seconds": steps / rate["median"],
        "measured_seconds": fit["curve"]["seconds"][epochs - 1],
    }


def _times(
    contestants: Mapping[str, Contestant], x: Any, checked: Data, settings: Settings
) -> dict[str, dict[str, Timing]]:
    """Measure times of draws, log densities and SBC; return the times by call and contestant."""
    draws: dict[str, np.ndarray] = {}

    def sample(name: str) -> None:
        draws[name] = contestants[name].sample(x, settings.draws, seed=SEED)

    calls: dict[str, Callable[[str], Any]] = {
        "sample": sample,
        "log_prob": lambda n: contestants[n].log_prob(draws[n], x),
        "sbc": lambda n: sbc_ranks(contestants[n], checked, settings.check_draws, SEED),
    }
    return {
        call: interleaved(
            {name: partial(function, name) for name in contestants}, settings.repeats, call
        )
        for call, function in calls.items()
    }


def _c2st(contestant: Contestant, task: Task, settings: Settings) -> dict[str, Any]:
    """Compute the C2ST against exact draws; `values` is empty if there is no exact sampler."""
    if task.sample_reference is None:
        return {"mean": None, "values": []}
    count, n = min(settings.observations, task.num_observations), settings.draws
    numbers = range(1, count + 1)
    references = [np.asarray(task.reference(i, n)) for i in numbers]
    draws = [contestant.sample(_batch(task, i), n, seed=i)[0] for i in numbers]
    accuracies = c2st(np.stack(references), np.stack(draws), backend=CompiledMLP())
    return {"mean": float(np.mean(accuracies)), "values": list(accuracies)}


def _simulate(task: Task, prior: sf.Prior, i: int, n: int) -> Data:
    key = jax.random.fold_in(jax.random.key(SEED), i)
    sims = sf.simulate(key, prior, task.simulator, n, progress=False).only_valid()
    return Data(np.asarray(sims.theta), jax.tree.map(np.asarray, sims.x))


def _batch(task: Task, i: int) -> Any:
    """Return observation i as a batch of one."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], task.observation(i))

"""This library beside its peers: the same simulations, the same sizes, one process.

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
from sbi_flows.diagnostics import c2st_jax
from simulators import Task

OURS: dict[str, Callable[[sf.Prior, Recipe], Contestant]] = {
    "ours": Ours,
    "ours, defaults": partial(Ours, defaults=True),
}
"""This library: with the sizes of the recipe, and as it is by default."""

TARGET = "sbi"
"""The peer whose converged held-out loss the others are timed to."""

TOLERANCE = 1e-3
"""Nats above that loss that count as reaching it: rounding is no reason to train on."""

PATIENCE = 20
"""Epochs without a better validation loss after which a fit has converged, as sbi has it."""

SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, and how large.

    Attributes:
        peers: Names of the peers.
        tasks: Names of the tasks.
        results: Folder for the record.
        budget: Number of simulations, failed ones included.
        repeats: Times that each timed call is repeated after the first.
        observations: Number of observations that the C2ST is taken at.
        coupling: Coupling flows; autoregressive ones otherwise.
        epochs: Epochs of each timed fit.
        max_epochs: Most epochs of the fit that goes on until it has converged.
        draws: Draws and log densities at one observation, and on either side of a C2ST.
        datasets: Data sets of SBC.
        check_draws: Draws for each of them.
        held_out: Fresh simulations behind the held-out loss.

    Raises:
        BadInput: An unknown task, or a number that is too small.
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
        """Refuse what would fail later."""
        unknown = [name for name in self.tasks if name not in simulators.names()]
        if unknown:
            known = ", ".join(simulators.names())
            raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
        # every library drops batches that are not whole, and sbi trains for two epochs at least
        lowest = {
            "budget": 250,
            "epochs": 2,
            "max_epochs": 2,
            "draws": 10,
            "datasets": 2,
            "held_out": 2,
        }
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), lowest.get(field.name, 1)
            if field.type == "int" and value < least:
                option = field.name.replace("_", "-")
                raise BadInput(f"--{option}: expected at least {least}, got {value}")

    def record(self) -> dict[str, Any]:
        """All but names and places."""
        left_out = ("peers", "tasks", "results")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}


def run(settings: Settings) -> dict[str, Any]:
    """Compare on every task, print a table for each, and write one record.

    Returns:
        The record.

    Raises:
        BadInput: An unknown peer, or a folder that is not writable; before any work.
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
        "tolerance": TOLERANCE,
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

    Returns:
        `contestants`: by name, what was measured and what was used; `target`: the held-out loss
        that they are timed to, None without the peer that sets it; `seconds` of each part.
    """
    prior, clock = sf.as_prior(task.prior), Clock()
    made = {name: peer.make(prior, recipe) for name, peer in peers.items()}
    contestants = {name: make(prior, recipe) for name, make in OURS.items()} | made
    train, fresh, checked = (
        _simulated(task, prior, i, n)
        for i, n in enumerate((settings.budget, settings.held_out, settings.datasets))
    )
    with clock("training speed"):
        rates = _training(contestants, train, settings)
    with clock("fits until they have converged"):
        fits = {n: _converged(n, c, train, fresh, settings) for n, c in contestants.items()}
    with clock("draws, densities and calibration"):
        times = _times(contestants, _batch(task, 1), checked, settings)
    with clock("c2st"):
        accuracies = {n: _c2st(c, task, settings) for n, c in contestants.items()}
    target = fits[TARGET]["held_out_loss"] if TARGET in fits else None
    measured = {
        name: {
            "described": contestant.describe(),
            "training": rates[name],
            "fit": fits[name],
            "to_target": _to_target(fits[name], rates[name], target),
            **{what: timing[name].record() for what, timing in times.items()},
            "c2st": accuracies[name],
        }
        for name, contestant in contestants.items()
    }
    return {
        "valid": len(train.theta),
        "target": None if target is None else {"peer": TARGET, "held_out_loss": target},
        "contestants": measured,
        "seconds": {**clock.seconds, "total": clock.total},
    }


def _training(
    contestants: Mapping[str, Contestant], train: Data, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Steps a second of short fits, each library's own."""
    fits: dict[str, Fit] = {}

    def fit(name: str) -> None:
        epochs = settings.epochs
        fits[name] = contestants[name].fit(*train, seed=SEED, epochs=epochs, patience=epochs)

    calls = {name: partial(fit, name) for name in contestants}
    timings = interleaved(calls, settings.repeats, "training speed")
    return {name: _rate_record(fits[name], timing) for name, timing in timings.items()}


def _rate_record(fit: Fit, timing: Timing) -> dict[str, Any]:
    """Rates of later fits; what the first took more is compilation, and what torch sets up."""
    rates = [fit.steps / seconds for seconds in timing.seconds]
    return {
        **fit._asdict(),
        "steps_per_second": rates,
        "median": fit.steps / timing.median,
        "first_seconds": timing.first,
        "compilation_seconds": max(0.0, timing.first - timing.median),
    }


def _converged(
    name: str, contestant: Contestant, train: Data, fresh: Data, settings: Settings
) -> dict[str, Any]:
    """A fit that stops by itself, with its held-out loss after each epoch."""
    curve = Curve(lambda: held_out_loss(contestant, fresh))
    contestant.fit(*train, seed=SEED, epochs=2, patience=PATIENCE, watch=curve.watch)  # compiles
    with Clock()(f"fit of {name}, until converged"):
        curve = Curve(lambda: held_out_loss(contestant, fresh))
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
        "held_out_loss": held_out_loss(contestant, fresh),
        "curve": {"losses": curve.losses, "seconds": curve.seconds},
    }


def _to_target(
    fit: Mapping[str, Any], rate: Mapping[str, Any], target: float | None
) -> dict[str, Any] | None:
    """Epochs, steps and seconds until the held-out loss is that of the target.

    `seconds` are the steps at the median rate of the repeats that the contestants took in turn;
    `measured_seconds` those of the one fit, which nothing was beside.
    """
    if target is None:
        return None
    epochs = first_at_most(fit["curve"]["losses"], target + TOLERANCE)
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
    """Seconds of draws, of log densities and of a pass of SBC, by contestant."""
    draws: dict[str, np.ndarray] = {}

    def sample(name: str) -> None:
        draws[name] = contestants[name].sample(x, settings.draws, seed=SEED)

    work: dict[str, Callable[[str], Any]] = {
        "sample": sample,
        "log_prob": lambda n: contestants[n].log_prob(draws[n], x),
        "sbc": lambda n: sbc_ranks(contestants[n], checked, settings.check_draws, SEED),
    }
    return {
        what: interleaved({name: partial(do, name) for name in contestants}, settings.repeats, what)
        for what, do in work.items()
    }


def _c2st(contestant: Contestant, task: Task, settings: Settings) -> dict[str, Any]:
    """Accuracies against exact draws; none where the task has no exact sampler."""
    if task.sample_reference is None:
        return {"mean": None, "values": []}
    count, n = min(settings.observations, task.num_observations), settings.draws
    numbers = range(1, count + 1)
    references = [np.asarray(task.reference(i, n)) for i in numbers]
    draws = [contestant.sample(_batch(task, i), n, seed=i)[0] for i in numbers]
    accuracies = c2st_jax(np.stack(references), np.stack(draws))
    return {"mean": float(np.mean(accuracies)), "values": list(accuracies)}


def _simulated(task: Task, prior: sf.Prior, i: int, n: int) -> Data:
    key = jax.random.fold_in(jax.random.key(SEED), i)
    sims = sf.simulate(key, prior, task.simulator, n, progress=False).only_valid()
    return Data(np.asarray(sims.theta), jax.tree.map(np.asarray, sims.x))


def _batch(task: Task, i: int) -> Any:
    """Observation i as a batch of one."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], task.observation(i))

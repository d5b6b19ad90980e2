"""One run: simulate, fit, C2ST against the exact posterior, calibration, and the time of each.

Public names: `Settings`, `estimator`, `run`, `run_one`.
"""

from __future__ import annotations

import dataclasses
import sys
import zipfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sbi_flows as sf
import simulators
from benchmarks.records import BadInput, Clock, provenance, writable_folder, write_json
from sbi_flows.diagnostics import c2st, check
from sbi_flows.diagnostics.tables import table
from sbi_flows.typing import Key, Obs
from simulators import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run, and how large.

    Attributes:
        tasks: Names of the tasks.
        budgets: Numbers of simulations.
        seeds: Number of seeds; they are 1, 2, ...
        observations: Number of observations to compare at, or as many as the task has.
        observations_from: Folder of `<task>.npz` files whose `x_1`, `x_2`, ... replace the task's
            own observations.
        draws: Draws on either side of a C2ST.
        datasets: Data sets of the calibration check.
        check_draws: Draws of the posterior for each of them.
        held_out: Fresh simulations behind the held-out negative log density.
        results: Folder for the records.

    Raises:
        BadInput: An unknown task, a number that is not positive, or too few draws or data sets.
    """

    tasks: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: int = 1
    observations: int = 5
    observations_from: Path | None = None
    draws: int = 10_000
    datasets: int = 1_000
    check_draws: int = 1_000
    held_out: int = 10_000
    results: Path = Path("results")

    def __post_init__(self) -> None:
        """Refuse what would fail later."""
        unknown = [name for name in self.tasks if name not in simulators.names()]
        if unknown:
            known = ", ".join(simulators.names())
            raise BadInput(f"--tasks: expected names out of {known}; got {', '.join(unknown)}")
        lowest = {"seeds": 1, "observations": 1, "draws": 10, "datasets": 50, "check_draws": 20}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                got = getattr(self, name)
                raise BadInput(f"--{option}: expected at least {least}, got {got}")
        if min(self.budgets) < 10:
            raise BadInput(f"--budgets: expected at least 10 simulations, got {min(self.budgets)}")


def estimator(task: Task) -> sf.NPE:
    """What is measured: the library's defaults, the same for every task."""
    return sf.NPE(task.prior)


def run(settings: Settings, *, import_seconds: float = 0.0) -> list[dict[str, Any]]:
    """Every task at every budget with every seed; a file a run, a table at the end.

    Args:
        settings: What to run.
        import_seconds: Time that the imports took, to be recorded.

    Returns:
        The records, as they were written.

    Raises:
        BadInput: The results folder is not writable, or observations are missing; before any work.
    """
    folder = writable_folder(settings.results, "--results")
    tasks = {name: simulators.get(name) for name in settings.tasks}
    observed = {name: observations_of(task, settings) for name, task in tasks.items()}
    estimators = {name: estimator(task) for name, task in tasks.items()}
    shared = {**provenance(), "settings": _settings_record(settings)}
    records = []
    for name, budget, seed in _grid(settings):
        print(f"{name}, {budget:,} simulations, seed {seed}", file=sys.stderr, flush=True)
        clock = Clock()
        clock.seconds["import"] = import_seconds
        result = run_one(
            tasks[name], estimators[name], budget, seed, observed[name], settings, clock
        )
        record = {**shared, "kind": "run", **result}
        records.append(record)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        write_json(folder / f"run-{name}-{budget}-seed{seed}-{stamp}.json", record)
    print(results_table(records))
    return records


def run_one(
    task: Task,
    npe: sf.NPE,
    budget: int,
    seed: int,
    observed: list[Obs],
    settings: Settings,
    clock: Clock,
) -> dict[str, Any]:
    """Simulate, fit and judge one posterior.

    Args:
        task: The task.
        npe: The estimator; with the same one, later seeds find everything compiled.
        budget: Number of simulations, failed ones included.
        seed: Seed of everything random, with the budget.
        observed: Observations to compare at.
        settings: Numbers of draws and data sets.
        clock: Takes the time of each phase.

    Returns:
        The part of a record that belongs to this run.
    """
    root = jax.random.fold_in(jax.random.key(seed), budget)
    keys = dict(zip(_PHASES, jax.random.split(root, len(_PHASES)), strict=True))
    with clock("simulate"):
        sims = sf.simulate(keys["simulate"], npe.prior, task.simulator, budget)
        jax.block_until_ready(sims)
    with clock("fit"):
        posterior, history = npe.fit(keys["fit"], sims)
    draw_keys = jax.random.split(keys["draw"], len(observed))
    with clock("draw"):  # compilation included; the other observations find it compiled
        draws = [jax.block_until_ready(posterior.sample(draw_keys[0], observed[0], settings.draws))]
    with clock("draw again"):
        for key, x in zip(draw_keys[1:], observed[1:], strict=True):
            draws.append(jax.block_until_ready(posterior.sample(key, x, settings.draws)))
    outside = sum(int(jnp.sum(~posterior.prior.contains(d))) for d in draws)
    with clock("held-out"):
        held_out = held_out_loss(keys["held-out"], posterior, task, settings.held_out)
    with clock("c2st"):
        accuracies = _accuracies(keys["reference"], task, observed, draws)
    with clock("check"):
        report = check(
            keys["check"],
            posterior,
            task.simulator,
            datasets=settings.datasets,
            draws=settings.check_draws,
        )
    return {
        "task": task.name,
        "budget": budget,
        "seed": seed,
        "valid": sims.num_valid,
        "estimator": describe(npe),
        "c2st": _c2st_record(accuracies),
        "outside_support": outside / sum(len(d) for d in draws),
        "held_out_loss": held_out,
        "check": report.to_dict(),
        "history": {
            "epochs": history.epochs,
            "stop_reason": history.stop_reason,
            "best_epoch": history.best_epoch,
            "best_loss": history.best_loss,
        },
        "seconds": {**clock.seconds, "total": clock.total},
    }


_SPREAD = 2_000
"""Draws from which it pays to start processes for the folds of a C2ST."""

_PHASES = ("simulate", "fit", "draw", "held-out", "reference", "check")


def observations_of(task: Task, settings: Settings) -> list[Obs]:
    """The observations to compare at: the task's own, or those of the folder.

    Raises:
        BadInput: A file or an observation is missing or has another shape; one line.
    """
    count = min(settings.observations, task.num_observations)
    own = [task.observation(i + 1) for i in range(count)]
    if settings.observations_from is None:
        return own
    path = settings.observations_from / f"{task.name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            given = [np.asarray(stored[f"x_{i + 1}"]) for i in range(count)]
    except KeyError as error:
        raise BadInput(f"--observations-from: {path}: no {str(error).split()[0]}") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not an .npz file of numbers"
        raise BadInput(f"--observations-from: cannot read {path}: {reason}") from None
    for i, (x, like) in enumerate(zip(given, own, strict=True), start=1):
        if x.shape != np.shape(like):
            raise BadInput(
                f"--observations-from: {path}: expected x_{i} of shape {np.shape(like)}, "
                f"got {x.shape}"
            )
    return [jnp.asarray(x) for x in given]


def held_out_loss(key: Key, posterior: sf.Posterior, task: Task, n: int) -> float:
    """Mean negative log density, in nats, of n fresh pairs of parameters and observations."""
    sims = sf.simulate(key, posterior.prior, task.simulator, n, progress=False).only_valid()
    return -float(jnp.mean(posterior.log_prob(sims.theta, sims.x)))


def describe(npe: sf.NPE) -> dict[str, Any]:
    """The estimator's settings in words."""
    return {
        "method": type(npe).__name__,
        "density": repr(npe.density),
        "training": repr(npe.training),
        "members": npe.members,
    }


def results_table(records: list[dict[str, Any]]) -> str:
    """One row a run: accuracy, calibration and times."""
    rows = [f"{r['task']} {r['budget']:,} seed {r['seed']}" for r in records]
    columns = {
        "C2ST": (_cell(r["c2st"]["mean"], ".3f") for r in records),
        "worst": (_cell(max(r["c2st"]["values"], default=None), ".3f") for r in records),
        "held-out": (_cell(r["held_out_loss"], ".3f") for r in records),
        "outside": (f"{r['outside_support']:.2%}" for r in records),
        "calibrated": ("yes" if r["check"]["calibrated"] else "no" for r in records),
        **{
            f"{phase} s": [f"{r['seconds'][phase]:.1f}" for r in records]
            for phase in ("simulate", "fit", "draw", "check", "total")
        },
    }
    return table(rows, columns)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _grid(settings: Settings) -> Iterator[tuple[str, int, int]]:
    for name in settings.tasks:
        for budget in settings.budgets:
            for seed in range(1, settings.seeds + 1):
                yield name, budget, seed


def _accuracies(key: Key, task: Task, observed: list[Obs], draws: list[Array]) -> list[float]:
    """C2ST at each observation against exact draws for it; none where there is no exact sampler."""
    if task.sample_reference is None:
        return []
    values = []
    for i, (x, d) in enumerate(zip(observed, draws, strict=True)):
        reference = task.sample_reference(jax.random.fold_in(key, i), jnp.asarray(x), len(d))
        values.append(c2st(reference, d, jobs=-1 if len(d) >= _SPREAD else None))
    return values


def _c2st_record(values: list[float]) -> Mapping[str, Any]:
    mean = float(np.mean(values)) if values else None
    return {"mean": mean, "values": values}


def _settings_record(settings: Settings) -> dict[str, Any]:
    """The settings without the machine's paths."""
    record = dataclasses.asdict(settings)
    del record["results"]
    record["observations_from"] = "given" if settings.observations_from else "task"
    return record

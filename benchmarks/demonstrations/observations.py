"""`python -m benchmarks observations`: posteriors given sets, series, images, or missing entries.

Fits of the library are compared with the reference posterior of each task.

Public names: `run`, `c2st_scores`, `draws_of`, `CASES`, `Case`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sbi_flows as sf
import simulators
from benchmarks.suite.embedded import embedded
from benchmarks.suite.records import BadInput, provenance, writable_folder, write_json
from sbi_flows.core.typing import Key, Obs
from simulators.tasks import drift_diffusion, normal_set, sensors, two_instruments

SEED = 24
OBSERVATIONS = 5
"""Number of observations of each kind, over which the C2ST is averaged."""

DRAWS = 2_500
"""Number of draws of each posterior in a C2ST."""

DATASETS, CHECK_DRAWS = 500, 300
"""Number of data sets of a check, and of draws for each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Simulations of a task, and the kinds of observations that are scored.

    Attributes:
        simulations: Number of simulations.
        kinds: For each kind of observation, a function from the number i = 1, 2, ... to
            observation i.
        groups: For each group of data sets that is checked, the pattern that hides entries; None
            hides nothing.
    """

    simulations: int
    kinds: dict[str, Callable[[int], Obs]]
    groups: dict[str, Any]


def _sizes(observation: Callable[..., Obs], *sizes: int) -> dict[str, Callable[[int], Obs]]:
    return {f"{n} trials": partial(observation, trials=n) for n in sizes}


def _exactly(*sizes: int) -> dict[str, Any]:
    return {f"{n} trials": sf.RandomSubset(n, n) for n in sizes}


CASES: dict[str, Case] = {
    "normal_set": Case(
        20_000, _sizes(normal_set.observation, 5, 20, 100), _exactly(5, 10, 20, 50, 100)
    ),
    "drift_diffusion": Case(
        50_000, _sizes(drift_diffusion.observation, 20, 100, 300), _exactly(20, 50, 100, 300)
    ),
    "sensors": Case(
        50_000,
        {f"{30 - n} of 30 missing": partial(sensors.observation, present=n) for n in (30, 24, 0)},
        {f"rate {rate:g}": sf.RandomEntries(rate) for rate in (0.1, 0.2, 0.4, 0.6)},
    ),
    "two_instruments": Case(
        50_000,
        {
            "both": two_instruments.observation,
            "no redshift": partial(two_instruments.observation, instruments=("spectrum",)),
            "no spectrum": partial(two_instruments.observation, instruments=("redshift",)),
        },
        {"both": None, "each absent with probability 0.5": sf.RandomParts(0.5)},
    ),
    **{
        name: Case(simulations, {"all": simulators.get(name).observation}, {"all": None})
        for name, simulations in {
            "random_field": 20_000,
            "lens": 50_000,
            "ornstein_uhlenbeck": 50_000,
            "g_and_k": 50_000,
            "stochastic_volatility": 50_000,
            "hodgkin_huxley": 50_000,
        }.items()
    },
}
"""Cases by the name of their task."""


def run(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Fit each case, compare its posteriors with the references, and write `observations.json`.

    Args:
        folder: Folder of the record. If it contains a record, the cases that are not run again are
            kept.
        names: Names of the cases; None for all.

    Returns:
        The record.

    Raises:
        BadInput: A name is unknown, or the folder is not writable.
    """
    unknown = sorted(set(names or ()) - set(CASES))
    if unknown:
        raise BadInput(f"--cases: expected names out of {', '.join(CASES)}; got {unknown[0]}")
    path = writable_folder(folder, "--results") / "observations.json"
    results = _earlier(path)
    record: dict[str, Any] = {"kind": "observations", "cases": results}
    for i, (name, case) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        results[name] = _score(jax.random.fold_in(jax.random.key(SEED), i), name, case)
        print(f"{name}: {results[name]}", flush=True)
        record = {**provenance(), "kind": "observations", "cases": results}
        write_json(path, record)
    return record


def _earlier(path: Path) -> dict[str, Any]:
    """Return the cases of an earlier record; none if there is no record."""
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def _score(key: Key, name: str, case: Case) -> dict[str, Any]:
    """Fit, draw, compare and check one case."""
    task = simulators.get(name)
    keys = jax.random.split(key, 5)
    simulate = partial(sf.simulate, missing=task.missing, progress=False)
    sims = simulate(keys[0], task.prior, task.simulator, case.simulations)
    began = time.perf_counter()
    posterior, history = embedded(task).fit(keys[1], sims)
    seconds = time.perf_counter() - began
    draw = partial(draws_of, posterior)
    scores = {
        kind: c2st_scores(jax.random.fold_in(keys[2], j), task, draw, observe)
        for j, (kind, observe) in enumerate(case.kinds.items())
    }
    fresh = simulate(keys[3], task.prior, task.simulator, DATASETS)
    checks = {}
    for j, (group, pattern) in enumerate(case.groups.items()):
        hide_key, check_key = jax.random.split(jax.random.fold_in(keys[4], j))
        held_out = fresh if pattern is None else fresh.hide(hide_key, pattern)
        report = sf.check(
            check_key, posterior, simulations=held_out, draws=CHECK_DRAWS, progress=False
        )
        checks[group] = report.verdict.splitlines()
    return {
        "simulations": case.simulations,
        "fit_seconds": seconds,
        "epochs": history.epochs,
        "linear_start_loss": float(np.mean(history.start_loss)),
        "held_out_loss": float(np.mean(np.min(history.validation_loss, axis=0))),
        "c2st": scores,
        "checks": checks,
    }


def draws_of(posterior: sf.Posterior, key: Key, x: Obs, n: int) -> np.ndarray:
    """Draw from a posterior; return a NumPy array (n, D)."""
    return np.asarray(posterior.sample(key, x, n))


def c2st_scores(
    key: Key,
    task: simulators.Task,
    draw: Callable[[Key, Obs, int], np.ndarray],
    observe: Callable[[int], Obs],
) -> dict[str, Any]:
    """Return the C2ST at each observation of a kind, and their mean.

    Args:
        key: Random key.
        task: The task, which must have a reference posterior.
        draw: Function of a random key, an observation and the number n of draws; it returns (n, D).
        observe: Function from the number i = 1, 2, ... to observation i.
    """
    assert task.sample_reference is not None
    values = []
    for i in range(1, OBSERVATIONS + 1):
        draw_key, reference_key = jax.random.split(jax.random.fold_in(key, i))
        x = observe(i)
        reference = np.asarray(task.sample_reference(reference_key, x, DRAWS))
        values.append(sf.c2st(reference, draw(draw_key, x, DRAWS)))
    return {"mean": float(np.mean(values)), "values": values}

"""`python -m benchmarks rounds`: truncated sequential inference, compared with exact posteriors.

Public names: `CASES`, `Case`, `run`, `rounds_at`, `markdown`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sbi_flows as sf
import simulators
from benchmarks.suite.description import describe
from benchmarks.suite.records import BadInput, provenance, writable_folder, write_json
from benchmarks.suite.runner import observations_of, references_of
from benchmarks.suite.settings import Settings
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics import CompiledMLP, c2st
from simulators import Task
from simulators.gallery.lynx_hare_fit import with_fit

SEED = 1
DRAWS = 10_000


def _identity(x: Obs) -> Obs:
    return x


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of the truncated rounds for one task.

    Attributes:
        simulations: Number of new simulations in each round.
        rounds: Maximum number of rounds.
        summary: Function that maps an observation to the input of the estimator.
        estimator: Function that makes an estimator for a prior.
        shrink_below: Argument of `sf.truncated_rounds`. With 1, all rounds are run.
    """

    simulations: int
    rounds: int
    summary: Callable[[Any], Obs] = _identity
    estimator: Callable[[Any], sf.NPE] = sf.NPE
    shrink_below: float = 0.7


CASES: Mapping[str, Case] = {
    "sir": Case(
        5_000, 2, estimator=partial(sf.NPE, emulator=sf.Emulator(), members=2), shrink_below=1.0
    ),
    # the posterior has one mode and is nearly Gaussian
    "lynx_hare": Case(15_000, 4, with_fit, partial(sf.NPE, density=sf.MAF())),
}
"""Settings of the rounds, by task name."""


def run(
    folder: Path, tasks: tuple[str, ...] = (), observations_from: Path | None = None
) -> dict[str, Any]:
    """Run rounds at the observations of each task, print a table, and write `rounds.json`.

    Args:
        folder: Folder in which the record is written.
        tasks: Names of tasks, keys of `CASES`; by default all.
        observations_from: Folder of `<task>.npz` files with observations. For a task without a
            file, the observations of the task itself are used.

    Returns:
        The record.

    Raises:
        BadInput: A task is unknown, the folder is not writable, or observations are missing.
    """
    unknown = set(tasks) - set(CASES)
    if unknown:
        got = ", ".join(sorted(unknown))
        raise BadInput(f"--tasks: expected names out of {', '.join(CASES)}; got {got}")
    folder = writable_folder(folder, "--results")
    results: dict[str, list[dict[str, Any]]] = {}
    estimators: dict[str, dict[str, Any]] = {}
    for name in tasks or CASES:
        task, source = simulators.get(name), observations_from
        estimators[name] = describe(CASES[name].estimator(task.prior))
        if source is not None and not (source / f"{name}.npz").exists():
            source = None
        observed = observations_of(task, Settings(tasks=(name,), observations_from=source))
        reference_key, key = jax.random.split(jax.random.key(SEED))
        exact = references_of(reference_key, task, observed, DRAWS, own=source is None)
        results[name] = []
        for i, (x, reference) in enumerate(zip(observed, exact, strict=True), start=1):
            result = rounds_at(jax.random.fold_in(key, i), task, CASES[name], x, reference)
            results[name].append({"observation": i, **result})
            print(markdown({name: results[name][-1:]})[-1], flush=True)
    print("\n".join(markdown(results)), flush=True)
    record = {**provenance(), "kind": "rounds", "estimators": estimators, "rounds": results}
    write_json(folder / "rounds.json", record)
    return record


def rounds_at(key: Key, task: Task, case: Case, x: Obs, reference: Any) -> dict[str, Any]:
    """Run truncated rounds for one observation, and compare the result with the exact posterior.

    Args:
        key: Random key.
        task: The task.
        case: Settings of the rounds.
        x: The observation, to which `case.summary` is applied.
        reference: Draws of the exact posterior, shape (n, D).

    Returns:
        A dict of `simulations`, the total number of simulations; `masses`, the prior mass inside
        the truncation box of each round; `c2st`, the C2ST between the draws of the posterior and
        the reference; `shifts`, the difference of the means for each parameter, divided by the
        standard deviation of the reference; `ratios`, the ratio of the standard deviations for each
        parameter; and `seconds`, the time.
    """

    def simulator(key: Key, theta: Any) -> Obs:
        return case.summary(task.simulator(key, theta))

    start = time.perf_counter()
    rounds_key, draw_key = jax.random.split(key)
    summary = jax.jit(case.summary)(x)
    posterior, rounds = sf.truncated_rounds(
        rounds_key,
        case.estimator(task.prior),
        simulator,
        summary,
        simulations=case.simulations,
        rounds=case.rounds,
        shrink_below=case.shrink_below,
    )
    exact = np.asarray(reference, np.float64)
    draws = np.asarray(posterior.sample(draw_key, summary, len(exact)), np.float64)
    seconds = time.perf_counter() - start
    return {
        "simulations": sum(r.simulations for r in rounds),
        "masses": [r.mass for r in rounds],
        "c2st": float(c2st(exact, draws, backend=CompiledMLP())),
        "shifts": ((draws.mean(axis=0) - exact.mean(axis=0)) / exact.std(axis=0)).tolist(),
        "ratios": (draws.std(axis=0) / exact.std(axis=0)).tolist(),
        "seconds": seconds,
    }


def markdown(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Format a Markdown table with a row per observation; return its lines.

    Args:
        results: For each task, the results of `rounds_at`, with the observation number added.
    """
    head = (
        *("task", "observation", "simulations", "prior mass of the last box", "C2ST"),
        *("largest difference of means, sd", "ratios of the sds", "s"),
    )
    lines = [list(head), ["---"] * len(head)]
    for task, rows in results.items():
        for row in rows:
            shift = max(row["shifts"], key=abs)
            ratios = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
            lines.append(
                [
                    *(f"`{task}`", f"{row['observation']}", f"{row['simulations']:,}"),
                    *(f"{row['masses'][-1]:.2g}", f"{row['c2st']:.3f}", f"{shift:+.2f}", ratios),
                    f"{row['seconds']:.0f}",
                ]
            )
    return [f"| {' | '.join(line)} |" for line in lines]

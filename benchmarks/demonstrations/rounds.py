"""Truncated rounds: all simulations of a budget for one observation, beside the exact posterior.

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
from benchmarks.suite.records import BadInput, provenance, writable_folder, write_json
from benchmarks.suite.runner import describe, observations_of, references_of
from benchmarks.suite.settings import Settings
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics import c2st_jax
from simulators import Task
from simulators.gallery.lynx_hare_fit import with_fit

SEED = 1
DRAWS = 10_000


def _same(x: Obs) -> Obs:
    return x


@dataclasses.dataclass(frozen=True)
class Case:
    """How a task is run.

    Attributes:
        simulations: New simulations a round.
        rounds: Most rounds.
        summary: What the posterior is given of an observation.
        estimator: Prior to estimator.
        paying: As of `sf.truncated_rounds`; 1 spends the whole budget, whatever it pays.
    """

    simulations: int
    rounds: int
    summary: Callable[[Any], Obs] = _same
    estimator: Callable[[Any], sf.NPE] = sf.NPE
    paying: float = 0.7


CASES: Mapping[str, Case] = {
    "sir": Case(5_000, 2, estimator=partial(sf.NPE, emulator=sf.Emulator(), members=2), paying=1.0),
    # one mode, close to a Gaussian
    "lynx_hare": Case(15_000, 4, with_fit, partial(sf.NPE, density=sf.MAF())),
}
"""Tasks by name."""


def run(
    folder: Path, tasks: tuple[str, ...] = (), observations_from: Path | None = None
) -> dict[str, Any]:
    """Run rounds at the observations of each task, print the table, and write `rounds.json`.

    Args:
        folder: Where the record goes.
        tasks: Names of `CASES`; all by default.
        observations_from: Folder of `<task>.npz` files with observations, for the tasks that it has
            a file of.

    Returns:
        The record.

    Raises:
        BadInput: An unknown task, a folder that cannot be written to, or no observations there.
    """
    unknown = set(tasks) - set(CASES)
    if unknown:
        got = ", ".join(sorted(unknown))
        raise BadInput(f"--tasks: expected names out of {', '.join(CASES)}; got {got}")
    folder = writable_folder(folder, "--results")
    found: dict[str, list[dict[str, Any]]] = {}
    used: dict[str, dict[str, Any]] = {}
    for name in tasks or CASES:
        task, source = simulators.get(name), observations_from
        used[name] = describe(CASES[name].estimator(task.prior))
        if source is not None and not (source / f"{name}.npz").exists():
            source = None
        observed = observations_of(task, Settings(tasks=(name,), observations_from=source))
        reference_key, key = jax.random.split(jax.random.key(SEED))
        exact = references_of(reference_key, task, observed, DRAWS, own=source is None)
        found[name] = []
        for i, (x, reference) in enumerate(zip(observed, exact, strict=True), start=1):
            result = rounds_at(jax.random.fold_in(key, i), task, CASES[name], x, reference)
            found[name].append({"observation": i, **result})
            print(markdown({name: found[name][-1:]})[-1], flush=True)
    print("\n".join(markdown(found)), flush=True)
    record = {**provenance(), "kind": "rounds", "estimators": used, "rounds": found}
    write_json(folder / "rounds.json", record)
    return record


def rounds_at(key: Key, task: Task, case: Case, x: Obs, reference: Any) -> dict[str, Any]:
    """Rounds of `sf.NPE` at one observation, beside draws of the exact posterior.

    Args:
        key: Random key.
        task: The task.
        case: How many simulations, and of what.
        x: The observation, before the summary.
        reference: Draws of the exact posterior, shape (n, D).

    Returns:
        `simulations` in all, `masses`, the share of the prior in the box of each round, `c2st`,
        `shifts` of the means in sds of the reference, `ratios` of the sds, and `seconds`.
    """

    def simulator(key: Key, theta: Any) -> Obs:
        return case.summary(task.simulator(key, theta))

    began = time.perf_counter()
    rounds_key, draw_key = jax.random.split(key)
    given = jax.jit(case.summary)(x)
    posterior, rounds = sf.truncated_rounds(
        rounds_key,
        case.estimator(task.prior),
        simulator,
        given,
        simulations=case.simulations,
        rounds=case.rounds,
        paying=case.paying,
    )
    exact = np.asarray(reference, np.float64)
    draws = np.asarray(posterior.sample(draw_key, given, len(exact)), np.float64)
    seconds = time.perf_counter() - began
    return {
        "simulations": sum(r.simulations for r in rounds),
        "masses": [r.mass for r in rounds],
        "c2st": float(c2st_jax(exact, draws)),
        "shifts": ((draws.mean(axis=0) - exact.mean(axis=0)) / exact.std(axis=0)).tolist(),
        "ratios": (draws.std(axis=0) / exact.std(axis=0)).tolist(),
        "seconds": seconds,
    }


def markdown(found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of a table: a row for each observation."""
    head = (
        *("task", "observation", "simulations", "prior in the last box", "C2ST"),
        *("largest shift of a mean, sd", "sds over exact ones", "s"),
    )
    lines = [list(head), ["---"] * len(head)]
    for task, rows in found.items():
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

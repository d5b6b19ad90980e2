"""Runs of the benchmark: simulate, fit, compare with the exact posterior, check calibration.

Public names: `run`, `run_one`, `observations_of`, `references_of`, `results_table`.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import sys
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import sbi_flows as sf
import simulators
from benchmarks.suite import methods
from benchmarks.suite.description import describe, history_record
from benchmarks.suite.memory import drop_programs, forget_peak_memory, peak_memory_gib
from benchmarks.suite.records import BadInput, Clock, now, provenance, writable_folder
from benchmarks.suite.scores import held_out_loss, mmd, normalisation
from benchmarks.suite.settings import Settings
from benchmarks.suite.store import Run, Store
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics import CompiledMLP, c2st, check
from simulators import ReferenceFailed, Task


def run(settings: Settings, *, import_seconds: float = 0.0) -> list[dict[str, Any]]:
    """Run every combination of task, method, budget and seed.

    Write a record per run and print a table.

    A run is skipped if its record exists.

    Args:
        settings: Tasks, methods and sizes.
        import_seconds: Time that Python took for the imports, which is written to the records.

    Returns:
        The records of all runs, including those of earlier calls.

    Raises:
        BadInput: The results folder is not writable or contains records made with other settings,
            or observations are missing. These errors are raised before the first run. If a run
            fails, the error is raised after all runs.
    """
    store = Store(writable_folder(settings.results, "--results"), settings.record())
    digests = {}
    for name in settings.names:
        task = settings.task(name)
        digests[name] = _digest(task, observations_of(task, settings), settings)
    records = {
        run: store.find(run, _required_fields(run, digests, settings)) for run in _grid(settings)
    }
    pending = [run for run, record in records.items() if record is None]
    if len(pending) < len(records):
        print(f"{len(records) - len(pending)} runs are already finished", file=sys.stderr)
    # read the git revision now, because later commits do not change the running code
    origin = {**provenance(), "jobs": settings.jobs, "import_seconds": import_seconds}
    failed: dict[Run, str] = {}
    bar = tqdm(total=len(pending), desc="runs", unit="run", disable=len(pending) < 2)
    with bar:
        for run, result in _results(pending, settings, store, origin):
            if isinstance(result, str):
                failed[run] = result
            else:
                records[run] = result
            bar.update()
    finished = [record for record in records.values() if record is not None]
    if finished:
        print(results_table(finished))
    if failed:
        first = next(iter(failed))
        raise BadInput(f"{len(failed)} of {len(pending)} runs failed; {first}: {failed[first]}")
    return finished


def _results(
    pending: list[Run], settings: Settings, store: Store, origin: Mapping[str, Any]
) -> Iterator[tuple[Run, dict[str, Any] | str]]:
    """Yield each finished run with its record, or each failed run with the error message.

    The runs take place in this process, or in `settings.jobs` processes if there are several jobs.
    """
    run_and_store = partial(_run_and_store, settings, store, origin)
    if settings.jobs == 1:
        yield from ((run, run_and_store(run)) for run in pending)
        return
    context = multiprocessing.get_context("spawn")  # JAX does not work in forked processes
    with ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        futures = {pool.submit(run_and_store, run): run for run in pending}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def _run_and_store(
    settings: Settings, store: Store, origin: Mapping[str, Any], run: Run
) -> dict[str, Any] | str:
    """Carry out a run and write its record; return the record, or the message of an error."""
    print(str(run), file=sys.stderr, flush=True)
    drop_programs()
    forget_peak_memory()
    task = settings.task(run.task)
    observed = observations_of(task, settings)
    estimator = _estimator(run.method, task)
    try:
        result = run_one(task, estimator, run.budget, run.seed, observed, settings, Clock())
    except (BadInput, sf.errors.SbiFlowsError, ReferenceFailed) as error:
        reason = " ".join(str(error).split())
        print(f"  failed: {reason}", file=sys.stderr, flush=True)
        return reason
    digest = _digest(task, observed, settings)
    return store.write(run, {**origin, **digest, **result, "time": now()})


def _required_fields(
    run: Run, digests: Mapping[str, Mapping[str, str]], settings: Settings
) -> dict[str, Any]:
    """Return the fields that a record of the run must have in addition to the settings."""
    estimator = _estimator(run.method, settings.task(run.task))
    return {"estimator": describe(estimator), **digests[run.task]}


def _digest(task: Task, observed: list[Obs], settings: Settings) -> dict[str, str]:
    """Return a hash of the user's observations in a dict, empty for built-in observations."""
    if settings.observations_from is None and task.name in simulators.names():
        return {}
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(observed):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {"observed": digest.hexdigest()[:16]}


@cache
def _estimator(method: str, task: Task) -> methods.Estimator:
    # all seeds share one estimator, so that its programs are compiled only once
    return methods.get(method)(task)


def run_one(
    task: Task,
    estimator: methods.Estimator,
    budget: int,
    seed: int,
    observed: list[Obs],
    settings: Settings,
    clock: Clock,
) -> dict[str, Any]:
    """Simulate, fit and score one posterior.

    Args:
        task: The task.
        estimator: The estimator.
        budget: Number of simulations, including failed ones.
        seed: Seed of the run. The random numbers depend on the seed and on the budget.
        observed: Observations at which the posterior is compared with the reference.
        settings: Settings, used for the numbers of draws and data sets.
        clock: Clock that measures each phase.

    Returns:
        The results: a dict of fields for the record.
    """
    root = jax.random.fold_in(jax.random.key(seed), budget)
    keys: dict[str, Key] = dict(zip(_PHASES, jax.random.split(root, len(_PHASES)), strict=True))
    with clock("simulate"):
        with _as_bad_input(task):
            sims = sf.simulate(
                keys["simulate"], estimator.prior, task.simulator, budget, missing=task.missing
            )
            jax.block_until_ready(sims)
    with clock("reference"):
        own = settings.observations_from is None
        references = references_of(keys["reference"], task, observed, settings.draws, own=own)
    with clock("fit"):
        posterior, history = estimator.fit(keys["fit"], sims)
    results = _scores(keys, posterior, task, observed, references, settings, clock)
    return {
        "valid": sims.num_valid,
        "estimator": describe(estimator),
        **results,
        "history": history_record(history),
        "seconds": {**clock.seconds, "total": clock.total},
        "compile_seconds": clock.compile_seconds,
        "peak_memory_gib": peak_memory_gib(),
    }


_PHASES = ("simulate", "fit", "draw", "held-out", "reference", "check", "predictive")
"""Names of the phases that use random numbers."""


def _scores(
    keys: Mapping[str, Key],
    posterior: sf.Posterior,
    task: Task,
    observed: list[Obs],
    references: list[np.ndarray],
    settings: Settings,
    clock: Clock,
) -> dict[str, Any]:
    """Compute all scores of a posterior, and measure the time of each score."""
    draws = _draws(keys["draw"], posterior, observed, settings.draws, clock)
    num_outside = sum(int(jnp.sum(~posterior.prior.contains(d))) for d in draws)
    with clock("held-out"):
        held_out = held_out_loss(keys["held-out"], posterior, task, settings.held_out)
    accuracies: list[float] = []
    with clock("c2st"):
        if references:
            pairs = np.stack(references), np.stack(draws)
            accuracies = list(c2st(*pairs, backend=CompiledMLP()))
    with clock("check"):
        report = check(
            keys["check"],
            posterior,
            task.simulator,
            datasets=settings.datasets,
            draws=settings.check_draws,
        )
    with clock("predictive"):
        predictive = _predictive(keys["predictive"], posterior, task, observed)
    return {
        "c2st": _mean_record(accuracies),
        "mmd": _mean_record([mmd(r, d) for r, d in zip(references, draws, strict=False)]),
        "normalisation": normalisation(posterior, observed[0], draws[0]),
        "outside_support": num_outside / sum(len(d) for d in draws),
        "held_out_loss": held_out,
        "check": report.to_dict(),
        "predictive": predictive,
    }


def _draws(
    key: Key, posterior: sf.Posterior, observed: list[Obs], n: int, clock: Clock
) -> list[jax.Array]:
    """Draw n times at each observation. The time of the phase "draw" includes compilation."""
    first_key, *other_keys = jax.random.split(key, len(observed))
    with clock("draw"):
        draws = [jax.block_until_ready(posterior.sample(first_key, observed[0], n))]
    with clock("draw again"):
        for other_key, x in zip(other_keys, observed[1:], strict=True):
            draws.append(jax.block_until_ready(posterior.sample(other_key, x, n)))
    return draws


def _predictive(
    key: Key, posterior: sf.Posterior, task: Task, observed: list[Obs]
) -> list[dict[str, float]]:
    """Compute the p-values of `sf.predictive_check` at each observation."""
    keys, simulator = jax.random.split(key, len(observed)), task.simulator
    checks = [
        sf.predictive_check(k, posterior, x, simulator, progress=False)
        for k, x in zip(keys, observed, strict=True)
    ]
    return [{"distance_p": c.distance_p, "worst_p": c.worst_p} for c in checks]


@contextmanager
def _as_bad_input(task: Task) -> Iterator[None]:
    """Context manager that converts exceptions of a task's simulator to a one-line BadInput."""
    try:
        yield
    except Exception as error:  # the user's simulator can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{task.name}: the simulator failed: {reason}") from error


def observations_of(task: Task, settings: Settings) -> list[Obs]:
    """Return a task's observations, from the folder `settings.observations_from` if it is given.

    Raises:
        BadInput: The task's simulator fails, a file or an observation is missing, or the shape of
            an observation differs from the shape of the task's observations.
    """
    count = min(settings.observations, task.num_observations)
    with _as_bad_input(task):
        own = [task.observation(i + 1) for i in range(count)]
    if settings.observations_from is None:
        return own
    path = settings.observations_from / f"{task.name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = [f"x_{i + 1}" for i in range(count)]
            missing = [name for name in names if name not in stored.files]
            if missing:
                raise BadInput(f"--observations-from: {path}: expected an array {missing[0]}")
            loaded = [np.asarray(stored[name]) for name in names]
    except BadInput:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not an .npz file of numeric arrays"
        raise BadInput(f"--observations-from: cannot read {path}: {reason}") from None
    for i, (x, own_x) in enumerate(zip(loaded, own, strict=True), start=1):
        if x.shape != np.shape(own_x):
            raise BadInput(
                f"--observations-from: {path}: expected x_{i} of shape {np.shape(own_x)}, "
                f"got {x.shape}"
            )
    return [jnp.asarray(x) for x in loaded]


def results_table(records: list[dict[str, Any]]) -> str:
    """Format a table with a row per run: accuracy, calibration and times."""
    rows = [f"{r['task']} {r['method']} {r['budget']:,} seed {r['seed']}" for r in records]
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


def _grid(settings: Settings) -> Iterator[Run]:
    seeds = range(1, settings.seeds + 1)
    for cell in itertools.product(settings.names, settings.methods, settings.budgets, seeds):
        yield Run(*cell)


def references_of(
    key: Key, task: Task, observed: list[Obs], n: int, *, own: bool
) -> list[np.ndarray]:
    """Draw from the exact posterior at each observation.

    Args:
        key: Random key. It is not used if `own` is True.
        task: The task.
        observed: The observations.
        n: Number of draws at each observation.
        own: Whether `observed` are the numbered observations of the task. If they are, stored draws
            are used where they exist.

    Returns:
        Draws (n, D) for each observation; an empty list if the task has no exact sampler.

    Raises:
        ReferenceFailed: The sampler failed.
    """
    if task.sample_reference is None:
        return []
    if own:
        return [np.asarray(task.reference(i + 1, n)) for i in range(len(observed))]
    keys = jax.random.split(key, len(observed))
    draws = [
        np.asarray(task.sample_reference(k, jnp.asarray(x), n))
        for k, x in zip(keys, observed, strict=True)
    ]
    if not all(np.all(np.isfinite(d)) for d in draws):
        raise ReferenceFailed(f"{task.name}: the exact sampler failed at a given observation")
    return draws


def _mean_record(values: list[float]) -> Mapping[str, Any]:
    return {"mean": float(np.mean(values)) if values else None, "values": values}

"""One run: simulate, fit, C2ST against the exact posterior, calibration, and the time of each.

Public names: `run`, `run_one`.
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
from benchmarks.suite.memory import drop_programs, forget_peak_memory, peak_memory_gib
from benchmarks.suite.records import BadInput, Clock, now, provenance, writable_folder
from benchmarks.suite.scores import held_out_loss, mmd, normalisation
from benchmarks.suite.settings import Settings
from benchmarks.suite.store import Run, Store
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics import c2st_jax, check
from sbi_flows.estimators.stacking import StackHistory
from simulators import ReferenceFailed, Task


def run(settings: Settings, *, import_seconds: float = 0.0) -> list[dict[str, Any]]:
    """Every task with every method, budget and seed; a file a run, a table at the end.

    Runs whose file is there already are not repeated.

    Args:
        settings: What to run.
        import_seconds: Time that the imports took, to be recorded.

    Returns:
        The records, as they were written, those of earlier calls too.

    Raises:
        BadInput: The results folder is not writable, holds runs with other settings, or
            observations are missing; before any work. A run failed; after all others.
    """
    store = Store(writable_folder(settings.results, "--results"), settings.record())
    made_of = {}
    for name in settings.names:
        task = settings.task(name)
        made_of[name] = _observed(task, observations_of(task, settings), settings)
    records = {run: store.find(run, _made_of(run, made_of, settings)) for run in _grid(settings)}
    pending = [run for run, record in records.items() if record is None]
    if len(pending) < len(records):
        print(f"{len(records) - len(pending)} runs are finished already", file=sys.stderr)
    # what is imported by now is what runs, whatever is committed meanwhile
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
    """Runs and their records, or why they failed, as they end, in this process or in several."""
    once = partial(_stored, settings, store, origin)
    if settings.jobs == 1:
        yield from ((run, once(run)) for run in pending)
        return
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        done = {pool.submit(once, run): run for run in pending}
        yield from ((done[future], future.result()) for future in as_completed(done))


def _stored(
    settings: Settings, store: Store, origin: Mapping[str, Any], run: Run
) -> dict[str, Any] | str:
    """The record of a run, which is written; or in one line why there is none."""
    print(str(run), file=sys.stderr, flush=True)
    drop_programs()
    forget_peak_memory()
    task = settings.task(run.task)
    observed = observations_of(task, settings)
    estimator = _estimator(run.method, task)
    try:
        result = run_one(task, estimator, run.budget, run.seed, observed, settings, Clock())
    except (BadInput, sf.SbiFlowsError, ReferenceFailed) as error:
        said = " ".join(str(error).split())
        print(f"  failed: {said}", file=sys.stderr, flush=True)
        return said
    made_of = _observed(task, observed, settings)
    return store.write(run, {**origin, **made_of, **result, "time": now()})


def _made_of(
    run: Run, observed: Mapping[str, Mapping[str, str]], settings: Settings
) -> dict[str, Any]:
    """What a record of the run must be of, besides the settings."""
    estimator = _estimator(run.method, settings.task(run.task))
    return {"estimator": describe(estimator), **observed[run.task]}


def _observed(task: Task, observed: list[Obs], settings: Settings) -> dict[str, str]:
    """What tells observations of the user's from others: a digest. Nothing for the tasks' own."""
    if settings.observations_from is None and task.name in simulators.names():
        return {}
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(observed):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {"observed": digest.hexdigest()[:16]}


@cache
def _estimator(method: str, task: Task) -> methods.Estimator:
    # the same one for later seeds, which then find everything compiled
    return methods.get(method)(task)


def run_one(
    task: Task,
    npe: methods.Estimator,
    budget: int,
    seed: int,
    observed: list[Obs],
    settings: Settings,
    clock: Clock,
) -> dict[str, Any]:
    """Simulate, fit and judge one posterior.

    Args:
        task: The task.
        npe: The estimator.
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
        with _blamed_on(task):
            sims = sf.simulate(keys["simulate"], npe.prior, task.simulator, budget)
            jax.block_until_ready(sims)
    with clock("reference"):
        own = settings.observations_from is None
        references = references_of(keys["reference"], task, observed, settings.draws, own=own)
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
        accuracies = list(c2st_jax(np.stack(references), np.stack(draws))) if references else []
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
        "valid": sims.num_valid,
        "estimator": describe(npe),
        "c2st": _mean_record(accuracies),
        "mmd": _mean_record([mmd(r, d) for r, d in zip(references, draws, strict=False)]),
        "normalisation": normalisation(posterior, observed[0], draws[0]),
        "outside_support": outside / sum(len(d) for d in draws),
        "held_out_loss": held_out,
        "check": report.to_dict(),
        "predictive": predictive,
        "history": _history_record(history),
        "seconds": {**clock.seconds, "total": clock.total},
        "compile_seconds": clock.compile_seconds,
        "peak_memory_gib": peak_memory_gib(),
    }


_PHASES = ("simulate", "fit", "draw", "held-out", "reference", "check", "predictive")


def _predictive(
    key: Key, posterior: sf.Posterior, task: Task, observed: list[Obs]
) -> list[dict[str, float]]:
    """P-values of `sf.predictive_check` at each observation."""
    keys, simulator = jax.random.split(key, len(observed)), task.simulator
    found = [
        sf.predictive_check(k, posterior, simulator, x, progress=False)
        for k, x in zip(keys, observed, strict=True)
    ]
    return [{"distance_p": f.distance_p, "worst_p": f.worst_p} for f in found]


@contextmanager
def _blamed_on(task: Task) -> Iterator[None]:
    """What a task's simulator raises, as one line."""
    try:
        yield
    except Exception as error:  # whatever the user's simulator raises
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{task.name}: the simulator cannot be run: {first}") from error


def observations_of(task: Task, settings: Settings) -> list[Obs]:
    """The observations to compare at: the task's own, or those of the folder.

    Raises:
        BadInput: A file or an observation is missing or has another shape; one line.
    """
    count = min(settings.observations, task.num_observations)
    with _blamed_on(task):
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


def describe(estimator: methods.Estimator) -> dict[str, Any]:
    """The estimator's settings in words."""
    if isinstance(estimator, methods.Distilling):
        return {"method": "distil", "steps": estimator.steps, "of": describe(estimator.npe)}
    if isinstance(estimator, sf.Stack):
        return {"method": "Stack", "estimators": [describe(e) for e in estimator.estimators]}
    return {
        "method": type(estimator).__name__,
        "density": repr(estimator.density),
        "training": repr(estimator.training),
        "members": estimator.members,
        "emulator": estimator.emulator and repr(estimator.emulator),
        "screening": estimator.screening,
    }


def _history_record(history: sf.History | StackHistory) -> dict[str, Any]:
    if isinstance(history, StackHistory):
        return {
            "shares": history.shares,
            "held_out_loss": history.held_out_loss,
            "mixture_loss": history.mixture_loss,
            "parts": [h and _history_record(h) for h in history.histories],
        }
    return {
        "epochs": history.epochs,
        "stop_reason": history.stop_reason,
        "best_epoch": history.best_epoch,
        "best_loss": history.best_loss,
        "held_out_loss": history.held_out_loss.mean(),
        "seconds": history.seconds,
        "emulator": history.emulator and _history_record(history.emulator),
        "kept": history.kept,
    }


def results_table(records: list[dict[str, Any]]) -> str:
    """One row a run: accuracy, calibration and times."""
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
    """Exact draws for each observation, the task's own or others; none without an exact sampler."""
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
        raise ReferenceFailed(f"{task.name}: no exact draws at the observations that were given")
    return draws


def _mean_record(values: list[float]) -> Mapping[str, Any]:
    return {"mean": float(np.mean(values)) if values else None, "values": values}

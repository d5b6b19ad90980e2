"""`python -m benchmarks speed`: times of training, of a calibration check, of a new process.

Public names: `run`, `training_speed`, `check_speed`, `cold_process`, `large_fit`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

import sbi_flows as sf
from benchmarks.peers.contestant import Recipe
from benchmarks.peers.flowjax_flow import flowjax_peer
from benchmarks.speed import growth, profile
from benchmarks.suite.records import ROOT, provenance, write_json
from sbi_flows.core.tables import table
from sbi_flows.diagnostics import check
from sbi_flows.observations.standardise import fit_standardiser
from simulators import slcp, two_moons

TRANSFORMS, HIDDEN, BINS, BOUND = 5, (50, 50), 10, 5.0
BATCH, LEARNING_RATE, HELD_OUT = 200, 5e-4, 0.1

COLD = """
import jax, sbi_flows as sf
from simulators import two_moons
task = two_moons()
sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, {budget}, progress=False)
posterior, history = sf.NPE(task.prior).fit(jax.random.key(1), sims, progress=False)
jax.block_until_ready(posterior.sample(jax.random.key(2), task.observation(1), 10_000))
"""


LARGE = """
import jax, sbi_flows as sf
from benchmarks.suite.memory import peak_memory_gib
from simulators import slcp
task = slcp()
sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, {budget}, progress=False)
before = peak_memory_gib()
training = sf.Training(max_epochs=1)
sf.NPE(task.prior, training=training).fit(jax.random.key(1), sims, progress=False)
print(sum(a.nbytes for a in (sims.theta, sims.x)) / 2**30, before, peak_memory_gib())
"""


def run(folder: Path) -> dict[str, Any]:
    """Carry out all measurements, print them, and write a record.

    Args:
        folder: Folder in which the record is written. It must exist and be writable.

    Returns:
        The record, also written as `speed-<time>.json`.
    """
    training = training_speed()
    print(_training_text(training), flush=True)
    checked = check_speed()
    print(
        f"check of two_moons with {checked['datasets']} data sets x {checked['draws']} draws: "
        f"{checked['seconds']:.1f} s (first call, with compilation: "
        f"{checked['first_seconds']:.1f} s)",
        flush=True,
    )
    cold = cold_process()
    print(
        f"two_moons, {cold['budget']:,} simulations, from a cold process to 10,000 draws: "
        f"{cold['seconds']:.1f} s"
    )
    large = large_fit()
    print(
        f"slcp, {large['budget']:,} simulations ({large['data_gib']:.2f} GiB), one epoch: peak "
        f"memory {large['peak_gib']:.2f} GiB"
    )
    step = profile.step_profile()
    print(profile.text(step))
    grown = {axis: growth.growth(axis, sizes) for axis, sizes in growth.AXES.items()}
    print(growth.text(grown))
    record = {
        **provenance(),
        "kind": "speed",
        "large": large,
        "step": step,
        "growth": grown,
        "training": training,
        "check": checked,
        "cold": cold,
    }
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    print(f"written: {write_json(folder / f'speed-{stamp}.json', record)}")
    return record


def training_speed(
    *, simulations: int = 10_000, epochs: int = 20, repeats: int = 5
) -> dict[str, Any]:
    """Compare the training steps per second of this library and flowjax on the task slcp.

    Both libraries train one coupling spline flow on the same data in the same coordinates, with the
    same batch size and number of epochs. The times include the validation after each epoch and the
    overhead of each library's `fit`, but not the compilation. The timed fits of the two libraries
    alternate, so that other load on the machine slows both equally.

    Args:
        simulations: Number of simulations.
        epochs: Number of epochs of each fit.
        repeats: Number of timed fits.

    Returns:
        A dict of the sizes; `steps_per_second`, the rates of all repeats, by name of the fit;
        `median`, the median rate, by name of the fit; and `ratio`, the median of "ours" divided by
        the median of "flowjax", or None if flowjax is not installed. The names are "ours",
        "flowjax" and "ours, defaults". The fit "ours, defaults" has the context network and the
        dropout of `sf.NSF()`, which flowjax lacks.
    """
    task = slcp()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, simulations, progress=False)
    sizes: dict[str, Any] = {"transforms": TRANSFORMS, "hidden": HIDDEN, "bins": BINS}
    flow_only = sf.NSF(coupling=True, bound=BOUND, context_width=0, dropout=0.0, **sizes)
    defaults = sf.NSF(coupling=True, bound=BOUND, **sizes)
    fits: dict[str, Callable[[], float]] = {
        "ours": _our_fit(task, sims, flow_only, epochs),
        "ours, defaults": _our_fit(task, sims, defaults, epochs),
    }
    peer = flowjax_peer(
        sf.as_prior(task.prior).to_standard(sims.theta),
        fit_standardiser(sims.x)(sims.x),
        Recipe(
            bound=BOUND,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            held_out=HELD_OUT,
            clip_norm=None,
            **sizes,
        ),
        epochs=epochs,
    )
    if peer is not None:
        fits["flowjax"] = peer
    # both libraries drop the last, incomplete batch of an epoch
    steps = epochs * (round((1 - HELD_OUT) * simulations) // BATCH)
    rates: dict[str, list[float]] = {name: [] for name in fits}
    for fit in fits.values():
        fit()  # the first fit compiles the program
    for _ in tqdm(range(repeats), desc="training speed"):
        for name, fit in fits.items():
            rates[name].append(steps / fit())
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **sizes,
        "batch": BATCH,
        "simulations": simulations,
        "steps": steps,
        "steps_per_second": rates,
        "median": median,
        "ratio": median["ours"] / median["flowjax"] if "flowjax" in median else None,
    }


def check_speed(
    *, budget: int = 10_000, datasets: int = 1_000, draws: int = 1_000, repeats: int = 3
) -> dict[str, Any]:
    """Measure the time of `sf.check` on two_moons with the default estimator, after a short fit.

    Args:
        budget: Number of simulations of the fit.
        datasets: Number of data sets of the check.
        draws: Number of draws for each data set.
        repeats: Number of timed calls after the first.

    Returns:
        A dict of the arguments; `seconds`, the median time without compilation; and
        `first_seconds`, the time of the first call, which includes compilation.
    """
    task = two_moons()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, budget, progress=False)
    short = sf.Training(max_epochs=2)  # the time of a check does not depend on the weights
    posterior, _ = sf.NPE(task.prior, training=short).fit(jax.random.key(1), sims, progress=False)
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        check(
            jax.random.key(i),
            posterior,
            task.simulator,
            datasets=datasets,
            draws=draws,
            progress=False,
        )
        seconds.append(time.perf_counter() - start)
    return {
        "datasets": datasets,
        "draws": draws,
        "seconds": statistics.median(seconds[1:]),
        "first_seconds": seconds[0],
    }


def cold_process(budget: int = 10_000) -> dict[str, Any]:
    """Measure the time of a new Python process that simulates, fits and draws on two_moons.

    All settings are the defaults. The process draws 10,000 posterior samples. It does not use a
    compilation cache, even if an environment variable sets one.

    Args:
        budget: Number of simulations.

    Returns:
        A dict of `budget` and `seconds`, the time of the process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", COLD.format(budget=budget)], cwd=ROOT, env=environment, check=True
    )
    return {"budget": budget, "seconds": time.perf_counter() - start}


def large_fit(budget: int = 1_000_000) -> dict[str, Any]:
    """Measure the peak memory of a new process that trains on many simulations of slcp.

    The process trains the default estimator for one epoch.

    Args:
        budget: Number of simulations.

    Returns:
        A dict of `budget`, and of three numbers in GiB: `data_gib`, the size of the simulations;
        `before_gib`, the peak memory before the fit; and `peak_gib`, the peak memory after the fit.
    """
    process = subprocess.run(
        [sys.executable, "-c", LARGE.format(budget=budget)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    data, before, peak = map(float, process.stdout.split())
    return {"budget": budget, "data_gib": data, "before_gib": before, "peak_gib": peak}


def _our_fit(task: Any, sims: sf.Simulations, density: sf.NSF, epochs: int) -> Callable[[], float]:
    training = sf.Training(
        batch_size=BATCH,
        max_epochs=epochs,
        patience=epochs,
        validation_fraction=HELD_OUT,
        learning_rate=LEARNING_RATE,
    )
    npe = sf.NPE(task.prior, density, training=training, members=1)

    def fit() -> float:
        start = time.perf_counter()
        posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        jax.block_until_ready(posterior.weights)
        return time.perf_counter() - start

    return fit


def _training_text(training: dict[str, Any]) -> str:
    median = training["median"]
    rates = table(list(median), {"steps per second": (f"{m:.0f}" for m in median.values())})
    if training["ratio"] is None:
        return f"{rates}\nno flowjax to compare with: pip install 'sbi-flows[peers]'"
    return f"{rates}\nours / flowjax: {training['ratio']:.2f}"

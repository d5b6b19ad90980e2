"""`python -m benchmarks verdict`: level and power of the verdict of `sf.check`.

Public names: `run`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import sbi_flows as sf
import simulators
from benchmarks.demonstrations.verdict_cases import CASES, EXACT, Case, Narrow, make_exact
from benchmarks.suite.records import BadInput, provenance, writable_folder, write_json
from sbi_flows.core.typing import Key

SEED = 20
PARTS = ("exact", "unused", "few", "held_out", "learning")
"""Parts of the record."""

FEW = (50, 100, 200)
"""Small numbers of data sets."""

HELD_OUT_FITS, HELD_OUT_ROWS = 8, 1_000
"""Number of fits whose held-out rows are checked, and of simulations of each."""

HELD_OUT = ("two_moons", "gaussian_linear")
"""Tasks of these fits."""

CURVES = ("two_moons", "slcp", "gaussian_linear")
"""Tasks whose learning curves are compared with fits to more simulations."""

CURVE_ROWS, FRESH_ROWS = 2_500, 4_000
"""Number of simulations of a learning curve, and of fresh ones that measure the gain of a fit."""

DATASETS, DRAWS = 1_000, 300
"""Number of data sets of a check, and of draws for each."""


def run(folder: Path, repeats: int = 40, fits: int = 4) -> dict[str, Any]:
    """Measure level and power of the verdict, print them, and write `verdict.json`.

    The record is written after each part; an interrupted run goes on with the next one.

    Args:
        folder: Folder in which the record is written.
        repeats: Number of checks of each posterior.
        fits: Number of fits over which the checks of a fitted posterior are divided.

    Returns:
        The results by part and name.

    Raises:
        BadInput: The folder is not writable, or holds a record with other settings.
    """
    path = writable_folder(folder, "--results") / "verdict.json"
    key = jax.random.key(SEED)
    parts: list[tuple[str, str, Callable[[], Any]]] = []
    for i, (name, count) in enumerate(EXACT.items()):
        parts.append(("exact", name, partial(_exact, jax.random.fold_in(key, i), name, count)))
    for i, name in enumerate(CASES, start=10):
        case = partial(_unused, jax.random.fold_in(key, i), name, repeats, fits)
        parts.append(("unused", name, case))
    for n in FEW:
        parts.append(("few", str(n), partial(_few, jax.random.fold_in(key, 20 + n), n, repeats)))
    for i, name in enumerate(HELD_OUT, start=30):
        parts.append(("held_out", name, partial(_optimism, jax.random.fold_in(key, i), name)))
    for i, name in enumerate(CURVES, start=40):
        parts.append(("learning", name, partial(_learning, jax.random.fold_in(key, i), name)))
    settings = {"repeats": repeats, "fits": fits}
    results = _earlier(path, settings)
    for part, name, measure in parts:
        if name not in results.setdefault(part, {}):
            results[part][name] = measure()
            # after each part, so that an interrupted run goes on
            write_json(path, {**provenance(), "kind": "verdict", **settings, **results})
        print(f"{part}, {name}: {results[part][name]}", flush=True)
    return results


def _earlier(path: Path, settings: dict[str, int]) -> dict[str, Any]:
    """Return the parts of an unfinished record with the same settings; none without a record."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if any(record.get(name) != value for name, value in settings.items()):
        raise BadInput(f"--results: {path} was made with other settings; remove it first")
    return {name: record[name] for name in PARTS if name in record}


def _exact(key: Key, name: str, count: int) -> dict[str, Any]:
    """Check an exact posterior."""
    return _share(_checks(key, [make_exact(name)], count, name), "unused information")


def _unused(key: Key, name: str, repeats: int, fits: int) -> dict[str, Any]:
    """Check posteriors that leave information unused."""
    case_key, check_key = jax.random.split(key)
    count = fits if name.startswith(("raw", "trials")) else 1
    cases = [CASES[name](k) for k in jax.random.split(case_key, count)]
    found = _checks(check_key, cases, repeats, name)
    return {
        **_share(found, "unused information"),
        "exact_nats": [c.nats for c in cases],
        "named": float(np.mean([_named(r, cases[0]) for r in found])),
    }


def _few(key: Key, datasets: int, repeats: int) -> dict[str, Any]:
    """Check a posterior that is 1.3 times too narrow with few data sets; count the verdicts."""
    case = make_exact("gaussian 2")
    narrow = Narrow(case.posterior, 1.3)
    words: dict[str, int] = {}
    least = 0.0
    for r in range(repeats):
        report = sf.check(
            jax.random.fold_in(key, r),
            narrow,
            case.simulator,
            datasets=datasets,
            draws=DRAWS,
            progress=False,
        )
        word = "cannot tell" if report.verdict.startswith("cannot tell") else "calibrated"
        word = report.findings[0].kind if report.findings else word
        words[word] = words.get(word, 0) + 1
        least = report.least_width
    return {"checks": repeats, "verdicts": words, "least_width": least}


def _optimism(key: Key, name: str) -> list[dict[str, float]]:
    """Compare checks of members on rows that they held out with checks on fresh rows."""
    task = simulators.get(name)
    rows = []
    for fit in range(HELD_OUT_FITS):
        keys = jax.random.split(jax.random.fold_in(key, fit), 4)
        sims = sf.simulate(keys[0], task.prior, task.simulator, HELD_OUT_ROWS, progress=False)
        posterior, history = sf.NPE(task.prior).fit(keys[1], sims, progress=False)
        own = sf.check(keys[2], posterior, simulations=sims, history=history, progress=False)
        fresh = sf.check(keys[3], posterior, task.simulator, progress=False)
        rows.append(
            {
                "gain_held_out": own.information.gain,
                "gain_fresh_mixture": fresh.information.gain,
                "width_held_out": float(np.mean(own.sbc.width)),
                "width_fresh_mixture": float(np.mean(fresh.sbc.width)),
            }
        )
        members = [_member_gain(keys[3], posterior, m, task) for m in range(posterior.members)]
        rows[-1]["gain_fresh_members"] = float(np.mean([m[0] for m in members]))
        rows[-1]["width_fresh_members"] = float(np.mean([m[1] for m in members]))
    return rows


def _member_gain(key: Key, posterior: sf.Posterior, member: int, task: Any) -> tuple[float, float]:
    """Return gain over the prior and width of one member on fresh simulations."""
    weights = jax.tree.map(lambda leaf: leaf[member : member + 1], posterior.weights)
    alone = dataclasses.replace(posterior, weights=weights)
    report = sf.check(key, alone, task.simulator, progress=False)
    return report.information.gain, float(np.mean(report.sbc.width))


def _learning(key: Key, name: str) -> dict[str, Any]:
    """Compare predicted with measured gains of fits to more simulations."""
    task, keys = simulators.get(name), jax.random.split(key, 3)
    estimator, simulate = sf.NPE(task.prior), partial(sf.simulate, progress=False)
    sims = simulate(keys[0], task.prior, task.simulator, CURVE_ROWS)
    curve = sf.learning_curve(keys[1], estimator, sims, progress=False)
    fresh = simulate(keys[2], task.prior, task.simulator, FRESH_ROWS)
    sizes = [int(curve.rows[-1]), *curve.more[1:3].tolist()]
    gains = []
    for i, size in enumerate(sizes):
        more_key, fit_key = jax.random.split(jax.random.fold_in(keys[2], 1 + i))
        more = simulate(more_key, task.prior, task.simulator, size)
        posterior, _ = estimator.fit(fit_key, more, progress=False)
        log_prob = np.asarray(posterior.log_prob(fresh.theta, fresh.x))
        gains.append(float(np.mean(log_prob - posterior.prior.log_prob(fresh.theta))))
    return {
        "rows": sizes,
        "gain": curve.gain.tolist(),
        "predicted": (curve.predicted[1:3] - curve.gain[-1]).tolist(),
        "measured": [gain - gains[0] for gain in gains[1:]],
        "verdict": curve.verdict,
    }


def _checks(key: Key, cases: list[Case], repeats: int, name: str) -> list[sf.Report]:
    """Check each case in turn, `repeats` times in all."""
    reports = []
    for r in tqdm(range(repeats), desc=name):
        case, (simulate_key, check_key) = (
            cases[r % len(cases)],
            jax.random.split(jax.random.fold_in(key, r)),
        )
        posterior, simulator = case.posterior, case.simulator
        sims = sf.simulate(simulate_key, posterior.prior, simulator, DATASETS, progress=False)
        report = sf.check(check_key, posterior, simulations=sims, draws=DRAWS, progress=False)
        reports.append(report)
    return reports


def _share(reports: list[sf.Report], kind: str) -> dict[str, Any]:
    """Return the fraction of reports of a kind, and the estimated nats."""
    nats = np.array([r.information.unused for r in reports])
    return {
        "checks": len(reports),
        kind: float(np.mean([r.information.kind == kind for r in reports])),
        "calibrated": float(np.mean([r.calibrated for r in reports])),
        "nats": float(nats.mean()),
        "nats_range": [float(nats.min()), float(nats.max())],
    }


def _named(report: sf.Report, case: Case) -> bool:
    """Return True if the report names the right parameters with unused information."""
    return set(report.information.unused_labels) == set(case.parameters)

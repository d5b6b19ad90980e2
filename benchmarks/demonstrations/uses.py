"""`python -m benchmarks uses`: analyses of the influenza data and of the eight schools data.

Public names: `run`, `influenza_use`, `schools_use`, `costs`, `quantiles`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import sbi_flows as sf
from benchmarks.suite.records import Clock, provenance, write_json
from sbi_flows import plots
from sbi_flows.core.tables import table
from sbi_flows.diagnostics import check
from simulators import Task, eight_schools, influenza

SEED = 1
DRAWS, PREDICTIONS = 10_000, 300
DPI = 130


def run(folder: Path) -> dict[str, Any]:
    """Run both analyses, print their results, and write figures and a record to a folder.

    Args:
        folder: Output folder. It must exist and be writable.

    Returns:
        The record, also written as `uses.json`.
    """
    import matplotlib

    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        results = {"influenza": influenza_use(folder), "eight_schools": schools_use(folder)}
    finally:
        matplotlib.use(backend)
    record = {**provenance(), "kind": "uses", **results}
    write_json(folder / "uses.json", record)
    return record


def influenza_use(folder: Path, simulations: int = 20_000, datasets: int = 500) -> dict[str, Any]:
    """Fit and check the influenza model, and compare its predictions with the counts.

    Args:
        folder: Folder in which the figures are saved.
        simulations: Number of simulations.
        datasets: Number of simulated data sets in the calibration check.

    Returns:
        The results of this analysis, which become an entry of the record.
    """
    task = influenza()
    fit = _fit(task, simulations, datasets)
    sims = sf.simulate_at(
        jax.random.key(SEED + 1),
        task.prior,
        task.simulator,
        fit.draws[:PREDICTIONS],
        progress=False,
    )
    axes = plots.predictive(
        task.observation(1),
        np.asarray(sims.x),
        time=1 + np.arange(len(task.observation(1))),
        labels=["boys in bed"],
        time_label="day",
    )
    _save(axes, folder / "influenza.png")
    _save(plots.corner({"NPE": fit.draws}, labels=task.labels), folder / "influenza-corner.png")
    counts = np.asarray(task.observation(1))
    low, high = np.nanquantile(np.asarray(sims.x, float), (0.05, 0.95), axis=0)
    num_inside = int(np.sum((low <= counts) & (counts <= high)))
    print(
        f"  {num_inside} of {len(counts)} counts inside the central 90% of the predictions",
        flush=True,
    )
    return {**fit.record, "days": len(counts), "days_inside": num_inside}


def schools_use(folder: Path, simulations: int = 50_000, datasets: int = 500) -> dict[str, Any]:
    """Fit the eight schools model, and compare its posterior with NUTS draws of the same model.

    Args:
        folder: Folder in which the figure is saved.
        simulations: Number of simulations.
        datasets: Number of simulated data sets in the calibration check.

    Returns:
        The results of this analysis, which become an entry of the record.
    """
    task = eight_schools()
    fit = _fit(task, simulations, datasets)
    reference = np.asarray(task.reference(1, DRAWS))
    score = float(sf.c2st(reference, fit.draws))
    print(f"  C2ST against NUTS: {score:.3f}", flush=True)

    def effects(draws: np.ndarray) -> np.ndarray:
        mean, spread, standardised = draws[:, :1], draws[:, 1:2], draws[:, 2:]
        return mean + spread * standardised

    sets = {"NPE": effects(fit.draws), "NUTS": effects(reference)}
    names = [f"school {name}" for name in "ABCDEFGH"]
    _save(_intervals(sets, names), folder / "eight_schools.png")
    return {**fit.record, "c2st": score}


def costs(record: dict[str, Any]) -> list[str]:
    """Format a Markdown table with the times and the verdict of each analysis; return its lines.

    Args:
        record: Record returned by `run`.
    """
    lines = [
        ["use", "simulations", "simulate, s", "fit, s", "10,000 draws, s", "check, s", "verdict"],
        ["---"] * 7,
    ]
    for name in ("influenza", "eight_schools"):
        use = record[name]
        seconds = [f"{use['seconds'][part]:.0f}" for part in ("simulate", "fit", "draw", "check")]
        total = f"{use['simulations']['total']:,}"
        lines.append([f"`{name}`", total, *seconds, use["check"]["verdict"].splitlines()[0]])
    return [f"| {' | '.join(line)} |" for line in lines]


def quantiles(use: dict[str, Any]) -> list[str]:
    """Format a Markdown table with the posterior quantiles of one analysis; return its lines.

    Args:
        use: Results of the analysis, an entry of the record.
    """
    rows = [["parameter", "5%", "median", "95%"], ["---"] * 4]
    rows += [[f"`{k}`", *(f"{v:.2f}" for v in row)] for k, row in use["quantiles"].items()]
    return [f"| {' | '.join(row)} |" for row in rows]


class _Fit(NamedTuple):
    """Posterior draws (n, D) at the real observation, and the results for the record."""

    draws: np.ndarray
    record: dict[str, Any]


def _fit(task: Task, simulations: int, datasets: int) -> _Fit:
    """Simulate, fit the default estimator, draw at the real observation, and check calibration."""
    simulate_key, fit_key, draw_key, check_key = jax.random.split(jax.random.key(SEED), 4)
    print(f"{task.name}: {task.dim} parameters, {simulations:,} simulations", flush=True)
    clock = Clock(log=lambda line: print(f"  {line}", flush=True))
    with clock("simulate"):
        sims = sf.simulate(simulate_key, task.prior, task.simulator, simulations)
        jax.block_until_ready(sims)
    with clock("fit"):
        posterior, history = sf.NPE(task.prior).fit(fit_key, sims)
    with clock("draw"):
        draws = np.asarray(posterior.sample(draw_key, task.observation(1), DRAWS))
    with clock("check"):
        report = check(check_key, posterior, task.simulator, datasets=datasets, draws=500)
    print(f"  {report.verdict}", flush=True)
    low, middle, high = np.quantile(draws, (0.05, 0.5, 0.95), axis=0)
    columns = {
        name: [f"{v:.3g}" for v in values]
        for name, values in (("5%", low), ("median", middle), ("95%", high))
    }
    print(table(list(task.labels), columns), flush=True)
    record = {
        "simulations": {"total": len(sims), "valid": sims.num_valid},
        "history": {"epochs": history.epochs, "held_out_loss": float(history.held_out_loss.mean())},
        "quantiles": {
            label: [float(v) for v in row]
            for label, row in zip(task.labels, np.stack([low, middle, high], 1), strict=True)
        },
        "check": report.to_dict(),
        "seconds": dict(clock.seconds),
    }
    return _Fit(draws, record)


def _intervals(sets: dict[str, np.ndarray], names: list[str]) -> Any:
    """Plot median, 50% and 90% interval of each parameter, for each set of draws (n, D)."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for k, (label, draws) in enumerate(sets.items()):
        heights = np.arange(len(names)) + 0.25 * (k - 0.5)
        quantiles = np.quantile(draws, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        ax.hlines(heights, quantiles[0], quantiles[4], color=f"C{k}", lw=1.2)
        ax.hlines(heights, quantiles[1], quantiles[3], color=f"C{k}", lw=3.5)
        ax.plot(quantiles[2], heights, "o", color=f"C{k}", ms=4, label=label)
    ax.set_yticks(np.arange(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("effect of coaching (points)")
    ax.legend(frameon=False, loc="lower right")
    return np.array([ax])


def _save(axes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    print(f"  {path}", flush=True)

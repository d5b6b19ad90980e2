"""`python -m benchmarks demo`: full analysis of the lynx and hare data, compared with NUTS.

Public names: `run`, `comparison`, `within_targets`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sbi_flows as sf
from benchmarks.demonstrations.demo_figures import save_figures
from benchmarks.suite.description import describe
from benchmarks.suite.records import Clock, provenance, write_json
from sbi_flows.diagnostics import check
from simulators import lynx_hare
from simulators.gallery.lynx_hare_fit import with_fit
from simulators.gallery.lynx_hare_model import nuts

SEED = 1
SIMULATIONS = 100_000
MEMBERS = 2
# The posterior has one mode, so affine layers suffice. A wide network reads the two time series.
DENSITY = sf.MAF(context_width=128, dropout=0.0)
TRAINING = sf.Training(batch_size=256, max_epochs=8, validation_fraction=0.03)
DRAWS = 10_000
PREDICTIONS = 1_000
CHECK_DATASETS, CHECK_DRAWS = 500, 500

MAX_SHIFT = 0.75
MAX_RATIO = 1.5
"""Maximum deviations of a posterior that agrees with NUTS.

The first limit is for the difference of the means, divided by the standard deviation of NUTS. The
second limit is for the larger standard deviation divided by the smaller one.
"""


def run(folder: Path) -> dict[str, Any]:
    """Run the demonstration, print its results, and write figures and files to a folder.

    Args:
        folder: Output folder. It must exist and be writable.

    Returns:
        The record, also written as `summary.json`.
    """
    start = time.perf_counter()
    clock = Clock(log=lambda line: print(f"  {line}", flush=True))
    simulate_key, fit_key, draw_key, nuts_key, predict_key, check_key = jax.random.split(
        jax.random.key(SEED), 6
    )
    task = lynx_hare()
    x = task.observation(1)
    inputs = jax.jit(with_fit)(x)

    def simulator(key: jax.Array, theta: Any) -> dict[str, jax.Array]:
        return with_fit(task.simulator(key, theta))

    print(f"lynx and hare, 1900-1920: {task.dim} parameters, {SIMULATIONS:,} simulations")
    with clock("simulate"):
        sims = sf.simulate(simulate_key, task.prior, simulator, SIMULATIONS)
        jax.block_until_ready(sims)
    npe = sf.NPE(task.prior, DENSITY, training=TRAINING, members=MEMBERS)
    with clock("fit"):
        posterior, history = npe.fit(fit_key, sims)
    print(f"  {history}")
    with clock("draw"):
        idata = posterior.to_arviz(draw_key, inputs, n=DRAWS)
    with clock("NUTS"):
        reference = _nuts(nuts_key, x)
    compared = comparison(idata, reference, posterior.prior.labels)
    with clock("check"):
        report = check(check_key, posterior, simulator, datasets=CHECK_DATASETS, draws=CHECK_DRAWS)
    prior = posterior.prior
    draws = {"NPE": flat_draws(idata, prior), "NUTS": flat_draws(reference, prior)}
    with clock("figures"):
        predictions = _predict(predict_key, task, prior, draws["NPE"][:PREDICTIONS])
        files = save_figures(folder, prior.labels, draws, x, predictions, report, history)
        files.append(folder / "posterior.nc")
        idata.to_netcdf(str(files[-1]))
    agrees = within_targets(compared)
    record = {
        **provenance(),
        "kind": "demo",
        "seed": SEED,
        "simulations": {"total": len(sims), "valid": sims.num_valid},
        "estimator": describe(npe),
        "history": {"epochs": history.epochs, "best_loss": history.best_loss},
        "comparison": {label: dict(row) for label, row in compared.iterrows()},
        "within_targets": agrees,
        "check": report.to_dict(),
        "seconds": {**clock.seconds, "total": time.perf_counter() - start},
    }
    files.append(write_json(folder / "summary.json", record))
    _print_results(compared, agrees, report, record["seconds"], files)
    return record


def comparison(idata: Any, reference: Any, labels: tuple[str, ...]) -> Any:
    """Compare the ArviZ summaries of a posterior and a reference.

    Args:
        idata: Draws of the posterior, as ArviZ data.
        reference: Draws of the reference, as ArviZ data.
        labels: Labels of the parameters, in order.

    Returns:
        A data frame with a row per parameter. The columns are the mean, standard deviation and 90%
        highest-density interval of the posterior and of the reference; `shift/sd`, the absolute
        difference of the means divided by the standard deviation of the reference; `sd ratio`, the
        ratio of the standard deviations; and R-hat of the reference.
    """
    import pandas as pd

    ours, theirs = (summary(data).loc[list(labels)] for data in (idata, reference))
    interval = [column for column in ours.columns if column.startswith("hdi")]
    low, high = interval[0], interval[1]
    return pd.DataFrame(
        {
            "mean": ours["mean"],
            "sd": ours["sd"],
            "5%": ours[low],
            "95%": ours[high],
            "NUTS mean": theirs["mean"],
            "NUTS sd": theirs["sd"],
            "NUTS 5%": theirs[low],
            "NUTS 95%": theirs[high],
            "shift/sd": (ours["mean"] - theirs["mean"]).abs() / theirs["sd"],
            "sd ratio": ours["sd"] / theirs["sd"],
            "NUTS R-hat": theirs["r_hat"],
        }
    )


def summary(idata: Any) -> Any:
    """Compute the ArviZ summary, not rounded, with 90% highest-density intervals."""
    import arviz as az

    is_old = int(az.__version__.split(".")[0]) < 1
    interval: Any = {"hdi_prob": 0.9} if is_old else {"ci_prob": 0.9, "ci_kind": "hdi"}
    return az.summary(idata, kind="all", round_to="none", **interval)


def within_targets(compared: Any) -> bool:
    """Return whether all means and standard deviations agree with the reference.

    Args:
        compared: Data frame returned by `comparison`.
    """
    ratio = compared["sd ratio"]
    differs = (compared["shift/sd"] > MAX_SHIFT) | (ratio > MAX_RATIO) | (ratio < 1 / MAX_RATIO)
    return not bool(differs.any())


def flat_draws(idata: Any, prior: sf.Prior) -> np.ndarray:
    """Convert the posterior of ArviZ data to draws (n, D), in the parameter order of the prior."""
    group = idata["posterior"]
    columns = [np.asarray(group[name]) for name in prior.names]
    chains, draws = columns[0].shape[:2]
    return np.concatenate([c.reshape(chains * draws, -1) for c in columns], axis=1)


def _nuts(key: jax.Array, x: jax.Array) -> Any:
    import arviz as az

    return az.from_numpyro(nuts(key, x))


def _predict(key: jax.Array, task: Any, prior: sf.Prior, draws: np.ndarray) -> np.ndarray:
    """Simulate one data set for each posterior draw, shape (n, 21, 2)."""
    keys = jax.random.split(key, len(draws))
    return np.asarray(jax.jit(jax.vmap(task.simulator))(keys, prior.structured(jnp.asarray(draws))))


def _print_results(
    compared: Any, agrees: bool, report: Any, seconds: Mapping[str, float], files: list[Path]
) -> None:
    print("\nposterior at the real data, and NUTS on the same model")
    print(compared.to_string(float_format=lambda v: f"{v:.3g}"))
    worst = compared["sd ratio"].map(lambda r: max(r, 1 / r)).max()
    print(
        f"\nlargest difference of means {compared['shift/sd'].max():.2f} sd (limit {MAX_SHIFT}), "
        f"largest ratio of sds {worst:.2f} (limit {MAX_RATIO}): "
        f"{'NPE and NUTS agree' if agrees else 'NPE and NUTS DISAGREE'}"
    )
    print(f"\n{report.summary()}\n")
    print("written: " + ", ".join(str(path) for path in files))
    print(", ".join(f"{phase} {s:.0f} s" for phase, s in seconds.items()))

"""Time of a training epoch as a function of the sizes, such as the number of simulations.

Public names: `BASE`, `AXES`, `growth`, `training`, `text`, `markdown`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import sbi_flows as sf
from benchmarks.peers.measure import interleaved
from sbi_flows.core.tables import table
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.densities.sizes import Sizes
from sbi_flows.training import FitKeys, TrainingData
from sbi_flows.training.ensemble import Ensemble

BASE = {"rows": 10_000, "dim": 4, "features": 8, "members": 1, "batch": 128}
"""Default sizes: numbers of simulations, parameters, features and members, and batch size."""

AXES: dict[str, tuple[int, ...]] = {
    "rows": (1_000, 10_000, 100_000, 1_000_000),
    "dim": (2, 10, 30, 100),
    "features": (2, 30, 300, 1_000),
    "members": (1, 2, 4, 8),
    "batch": (32, 128, 512, 2_048),
}


def growth(axis: str, sizes: tuple[int, ...], *, repeats: int = 3) -> dict[str, Any]:
    """Measure the time of an epoch of the default estimator as one of the sizes grows.

    The times exclude compilation and the linear fit before the training. Epochs of different sizes
    alternate, so that other load on the machine slows all of them equally.

    Args:
        axis: Name of the size, a key of `AXES`.
        sizes: Values of the size in ascending order.
        repeats: Number of timed epochs for each value of the size.

    Returns:
        A dict of `sizes`, the values of the size; `seconds`, the median time of an epoch at each
        value; and `exponent`, the exponent p in seconds ~ size^p, from the two largest values.
    """
    with contextlib.ExitStack() as stack:
        fits = [stack.enter_context(training({**BASE, axis: size})) for size in sizes]
        calls = {
            f"{size}": partial(fit.epoch, jax.random.key(0))
            for size, fit in zip(sizes, fits, strict=True)
        }
        timings = interleaved(calls, repeats, f"growth with {axis}")
    median = [timing.median for timing in timings.values()]
    exponent = np.log(median[-1] / median[-2]) / np.log(sizes[-1] / sizes[-2])
    return {"sizes": list(sizes), "seconds": median, "exponent": float(exponent)}


@contextlib.contextmanager
def training(
    sizes: dict[str, int], density: sf.NSF | None = None, precision: str | None = None
) -> Iterator[Ensemble]:
    """Context manager that provides an ensemble ready for training on artificial data.

    The features of the data depend on the parameters.

    Args:
        sizes: Sizes of the problem, with the keys of `BASE`.
        density: Conditional density of the ensemble members, by default `sf.NSF()`.
        precision: Precision of matrix products, as in `sf.Training(matmul_precision=...)`.
    """
    rows, dim, count = sizes["rows"], sizes["dim"], sizes["features"]
    y_key, map_key, noise_key = jax.random.split(jax.random.key(0), 3)
    y = jax.random.uniform(y_key, (rows, dim), minval=-1.7, maxval=1.7)
    mixed = y @ jax.random.normal(map_key, (dim, count)) / np.sqrt(dim)
    features = mixed + jax.random.normal(noise_key, (rows, count))
    facts = Sizes((True,) * dim, jax.tree.structure(0), ((count,),))
    blueprint = Blueprint(density or sf.NSF(), None, facts)
    # no member stops early, so each epoch trains all members
    settings = sf.Training(batch_size=sizes["batch"], patience=10**6, matmul_precision=precision)
    data = TrainingData.of_rows(y, features)
    keys = FitKeys.of(jax.random.key(1))
    with Ensemble(keys, blueprint, settings, data, sizes["members"]) as ensemble:
        yield ensemble


def markdown(grown: dict[str, dict[str, Any]]) -> list[str]:
    """Format a Markdown table of the results of `growth` for several sizes; return its lines."""
    lines = [["", *_columns(grown)], ["---"] * 4]
    lines += [list(row) for row in zip(grown, *_columns(grown).values(), strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


def text(grown: dict[str, dict[str, Any]]) -> str:
    """Format a table of the results of `growth` for several sizes, for the terminal."""
    return table(list(grown), _columns(grown))


def _columns(grown: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    return {
        "sizes": [" ".join(f"{s:,}" for s in g["sizes"]) for g in grown.values()],
        "seconds per epoch": [" ".join(f"{s:.3g}" for s in g["seconds"]) for g in grown.values()],
        "exponent of the last step": [f"{g['exponent']:.2f}" for g in grown.values()],
    }

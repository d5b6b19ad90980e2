"""Passes over many data sets, a chunk of one compiled shape at a time.

Public names: `usable`, `chunks_of`, `continuous_ranks`, `MIN_DATASETS`, `MIN_DRAWS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.typing import Key
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.simulations.simulations import Simulations

CHUNK = 4_000_000
"""Numbers (data sets x draws x D) held at once; 16 MB in single precision."""

MIN_DATASETS = 50
MIN_DRAWS = 20


def usable(posterior: PosteriorLike, simulations: Simulations, draws: int) -> Simulations:
    """The simulations that succeeded, after the checks that come before any work.

    Raises:
        ValueError: Too few data sets succeeded, too few draws, or parameters of another width.
    """
    if draws < MIN_DRAWS:
        raise ValueError(f"draws: expected at least {MIN_DRAWS}, got {draws}")
    dim = simulations.theta.shape[1]
    if dim != posterior.prior.dim:
        raise ValueError(
            f"simulations: expected {posterior.prior.dim} parameters "
            f"{posterior.prior.labels} as the posterior has, got {dim}"
        )
    valid = simulations.only_valid()
    if len(valid) < MIN_DATASETS:
        raise ValueError(
            f"simulations: expected at least {MIN_DATASETS} that succeeded, "
            f"got {len(valid)} of {len(simulations)}"
        )
    return valid


def chunks_of(
    key: Key, n: int, numbers: int, label: str, progress: bool
) -> Iterator[tuple[Key, np.ndarray, int]]:
    """Chunks of n data sets, equally long (the last one wraps round), under a progress bar.

    Args:
        key: Random key.
        n: Number of data sets.
        numbers: Numbers held for each at once.
        label: What the bar says.
        progress: Show it, if there are several chunks.

    Yields:
        A key, numbers of data sets, and how many of these to keep.
    """
    count = -(-n // max(1, CHUNK // numbers))
    size = -(-n // count)
    starts = range(0, n, size)
    bar = tqdm(starts, desc=label, disable=not progress or len(starts) < 2)
    for own, start in zip(jax.random.split(key, len(starts)), bar, strict=True):
        yield own, np.arange(start, start + size) % n, min(size, n - start)


def continuous_ranks(key: Key, below: Any, equal: Any, draws: int) -> np.ndarray:
    """Spread integer ranks among `draws` draws evenly over (0, 1).

    A rank takes one of `draws` + 1 values, so that a Kolmogorov-Smirnov test on rank / draws sees
    steps. Ties with the true value are broken at random, and each rank is then placed at random
    within its own cell of width 1 / (draws + 1); both make it uniform exactly under the null.

    Args:
        key: Random key.
        below: Number of draws below the true value, integers of any shape.
        equal: Number of draws equal to the true value, same shape.
        draws: Number of draws.

    Returns:
        Values in (0, 1), float64, the shape of `below`.
    """
    below, equal = np.asarray(below), np.asarray(equal)
    # on the host, in double precision: a cell next to 1 must not round to 1
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    rank = below + rng.integers(0, equal + 1)
    return (rank + rng.uniform(1e-9, 1.0 - 1e-9, below.shape)) / (draws + 1)

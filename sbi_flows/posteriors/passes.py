"""Loops over many data sets in chunks of equal shape, so that one compiled program is used.

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

MAX_CHUNK_ENTRIES = 4_000_000
"""Maximum number of entries (data sets x draws x D) in a chunk: 16 MB in single precision."""

MIN_DATASETS = 50
MIN_DRAWS = 20


def usable(posterior: PosteriorLike, simulations: Simulations, draws: int) -> Simulations:
    """Check the arguments of a calibration, and return the valid simulations.

    Raises:
        ValueError: Fewer than `MIN_DATASETS` simulations are valid, `draws` is below `MIN_DRAWS`,
            or the number of parameters differs from the posterior's.
    """
    if draws < MIN_DRAWS:
        raise ValueError(f"draws: expected at least {MIN_DRAWS}, got {draws}")
    simulations = simulations.aligned(posterior.prior)
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
    key: Key, n: int, entries: int, label: str, progress: bool
) -> Iterator[tuple[Key, np.ndarray, int]]:
    """Split n data sets into chunks of equal length; yield them with a progress bar.

    The last chunk is padded to the length of the others with the first data sets.

    Args:
        key: Random key.
        n: Number of data sets.
        entries: Number of entries in memory for each data set.
        label: Label of the progress bar.
        progress: Whether to show the bar; it is shown only if there are several chunks.

    Yields:
        A random key, the indices of the data sets in a chunk, and the number of data sets in the
        chunk without the padding.
    """
    count = -(-n // max(1, MAX_CHUNK_ENTRIES // entries))
    size = -(-n // count)
    starts = range(0, n, size)
    bar = tqdm(starts, desc=label, disable=not progress or len(starts) < 2)
    for chunk_key, start in zip(jax.random.split(key, len(starts)), bar, strict=True):
        yield chunk_key, np.arange(start, start + size) % n, min(size, n - start)


def continuous_ranks(key: Key, below: Any, equal: Any, draws: int) -> np.ndarray:
    """Convert integer ranks among draws to continuous ranks in (0, 1).

    A Kolmogorov-Smirnov test needs continuous ranks, but an integer rank has only `draws` + 1
    possible values. Ties with the true value are therefore broken at random, and a uniform random
    number is added to each integer rank before it is divided by `draws` + 1. The result is exactly
    uniform under the null hypothesis.

    Args:
        key: Random key.
        below: Number of draws below the true value, integers of any shape.
        equal: Number of draws equal to the true value, same shape.
        draws: Number of draws.

    Returns:
        Ranks in (0, 1), float64, with the shape of `below`.
    """
    below, equal = np.asarray(below), np.asarray(equal)
    # use numpy's double precision, so that the largest ranks are not rounded to 1
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    rank = below + rng.integers(0, equal + 1)
    return (rank + rng.uniform(1e-9, 1.0 - 1e-9, below.shape)) / (draws + 1)

"""Groups of sets of similar size, so that a training step computes less for small sets.

A fit that hides a random number of trials would compute hidden trials as well. Instead, each batch
is divided into groups of equal numbers of rows; the arrays of a group are only as long as its
largest set. The groups have about equal ranges of the logarithm of the size. Weights of the rows
make up for the rounding, so that the distribution of sizes stays the same.

Public names: `MAX_GROUPS`, `size_groups`, `weights_of`, `shorten`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.observations.missing import RandomSubset

MAX_GROUPS = 4
"""Maximum number of groups; each one adds a copy of the embedding to the compiled program."""

_SMALLEST_RATIO = 1.5
"""Smallest ratio of the largest sizes of two groups; closer groups would save little."""


def size_groups(pattern: RandomSubset, rows: int) -> tuple[RandomSubset, ...]:
    """Divide the sizes of a pattern into groups; the result is empty if there are fewer than two.

    Args:
        pattern: Pattern of which each group covers a part.
        rows: Number of rows in a batch; the number of groups is a divisor of it.

    Returns:
        Pattern of each group, from small to large sets, all of order "first". For a pattern of
        order "random", `shorten` starts at a random element, so the first elements are a random
        choice.
    """
    if pattern.smallest == 0:  # sets would be empty in 5% of the first group only, not of all rows
        return ()
    ratio = (pattern.largest + 1) / pattern.smallest
    count = min(MAX_GROUPS, int(math.log(ratio) / math.log(_SMALLEST_RATIO)))
    edges = _edges(pattern.smallest, ratio, count)
    while count > 1 and (rows % count or len(set(edges)) <= count):
        count -= 1
        edges = _edges(pattern.smallest, ratio, count)
    if count < 2:
        return ()
    return tuple(
        dataclasses.replace(pattern, smallest=low, largest=high - 1, order="first")
        for low, high in itertools.pairwise(edges)
    )


def _edges(smallest: int, ratio: float, count: int) -> list[int]:
    return [round(smallest * ratio ** (i / count)) for i in range(count + 1)] if count else []


def weights_of(groups: Sequence[RandomSubset]) -> list[float]:
    """Return the probability of each group, times the number of groups.

    The rows of a group are weighted by this number, because the rounded ranges of sizes do not have
    exactly equal probabilities.
    """
    logs = [math.log((group.largest + 1) / group.smallest) for group in groups]
    return [len(groups) * each / sum(logs) for each in logs]


def shorten(key: Key, x: Array, length: int, *, at_random: bool) -> Array:
    """Keep `length` consecutive elements along axis 1.

    Args:
        key: Random key.
        x: Array (B, n, ...).
        length: Number of elements, at most n.
        at_random: Whether the first element is random, with the first following after the last one;
            otherwise it is the first element of x.
    """
    if not at_random:
        return x[:, :length]
    n = x.shape[1]
    start = jax.random.randint(key, (len(x), 1), 0, n)
    index = (start + jnp.arange(length)[None]) % n
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

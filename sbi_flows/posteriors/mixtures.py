"""Compiled functions that sample a mixture of ensembles and compute its log density.

Under a prior with a condition, draws that violate it are rejected and drawn again, and densities
are divided by the fraction of accepted draws.

Public names: `Parts`, `count`, `sample`, `log_prob`, `standard_log_prob`, `log_acceptance`,
`split_shares`, `choose`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import sample_per_context
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.networks.mlp import hashed_words
from sbi_flows.prior.constrained import ConstrainedPrior, fill_by_rejection
from sbi_flows.prior.prior import Prior

ACCEPTANCE_DRAWS = 4096
"""Number of draws from which the probability of a prior's condition is estimated."""

MAX_ROUNDS = 1000
"""Maximum number of rounds of proposals for draws that meet a prior's condition."""

Parts: TypeAlias = tuple[tuple[Blueprint, float], ...]
"""Static part of a mixture: the blueprint and the share (mixture weight) of each ensemble."""


def count(weights: Weights) -> int:
    """Return the number of members of an ensemble."""
    return len(jax.tree.leaves(weights)[0])


def _member(blueprint: Blueprint, weights: Weights, inputs: Array) -> distrax.Distribution:
    """Return one member's distribution of standard coordinates given inputs (B, I)."""
    return nnx.merge(graph_of(blueprint), *weights)(inputs)


def standard_log_prob(
    parts: Parts,
    weights: tuple[Weights, ...],
    y: Array,
    features: Array,
    *,
    side_by_side: bool = False,
) -> Array:
    """Compute the log density (n, B) of standard coordinates y (n, B, d) given features (B, C).

    Args:
        parts: Static part of the mixture.
        weights: Arrays of the members of each ensemble.
        y: Standard coordinates, shape (n, B, d).
        features: Features of the observations, shape (B, C).
        side_by_side: Whether all members are computed at once, which is faster for a single point,
            instead of one after the other, which needs less memory.
    """

    def ensemble(blueprint: Blueprint, stacked: Weights) -> Array:
        inputs = blueprint.inputs(features)

        def member(weights: Weights) -> Array:
            return _member(blueprint, weights, inputs).log_prob(y)

        return jax.vmap(member)(stacked) if side_by_side else jax.lax.map(member, stacked)

    members = [
        ensemble(blueprint, stacked) + math.log(share / count(stacked))
        for (blueprint, share), stacked in zip(parts, weights, strict=True)
    ]
    return jax.nn.logsumexp(jnp.concatenate(members), axis=0)


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_precision
def sample(
    parts: Parts,
    n: int,
    with_log_prob: bool,
    prior: Prior,
    weights: tuple[Weights, ...],
    features: Array,
    keys: Key,
) -> tuple[Array, Array]:
    """Draw parameters (B, n, D), and compute their log densities (B, n).

    The number of draws from each ensemble is proportional to its share. Draws are shuffled.

    Args:
        parts: Static part of the mixture.
        n: Number of draws for each observation.
        with_log_prob: Whether to compute log densities; otherwise they are zeros.
        prior: The prior.
        weights: Arrays of the members of each ensemble.
        features: Features of the observations, shape (B, C).
        keys: One random key for each observation, shape (B,).
    """
    if isinstance(prior, ConstrainedPrior):
        y, theta = _accepted(parts, n, prior, weights, features, keys)
    else:
        y = _propose(parts, n, weights, features, keys)
        theta = prior.unchecked_from_standard(y)
    if not with_log_prob:
        return theta, jnp.zeros(y.shape[:2], y.dtype)
    log_prob = standard_log_prob(parts, weights, jnp.swapaxes(y, 0, 1), features).T
    return theta, log_prob - prior.unchecked_log_det(y, theta)


def _propose(
    parts: Parts, n: int, weights: tuple[Weights, ...], features: Array, keys: Key
) -> Array:
    """Draw standard coordinates (B, n, d), which may violate the prior's condition."""
    counts, fractions = split_shares([share for _, share in parts], n)
    split = jax.vmap(lambda key: jax.random.split(key, 1 + len(parts)))(keys)
    draws = [
        _ensemble_draws(split[:, 1 + i], blueprint, stacked, features, int(m + (rest > 0)))
        for i, ((blueprint, _), stacked, m, rest) in enumerate(
            zip(parts, weights, counts, fractions, strict=True)
        )
    ]
    join = partial(choose, counts=counts, fractions=fractions, n=n)
    return draws[0] if len(parts) == 1 else jax.vmap(join)(split[:, 0], draws)


def _accepted(
    parts: Parts,
    n: int,
    prior: ConstrainedPrior,
    weights: tuple[Weights, ...],
    features: Array,
    keys: Key,
) -> tuple[Array, Array]:
    """Draw standard coordinates (B, n, d) and parameters (B, n, D) that meet the condition.

    Both are NaN where no draw is accepted after `MAX_ROUNDS` rounds.
    """

    def propose(keys: Key) -> tuple[Array, Array]:
        y = _propose(parts, n, weights, features, keys)
        theta = prior.unchecked_from_standard(y)
        return jnp.concatenate([y, theta], axis=-1), prior.unchecked_contains(theta)

    both = fill_by_rejection(keys, propose, n, MAX_ROUNDS)
    return both[..., : prior.standard_dim], both[..., prior.standard_dim :]


@partial(jax.jit, static_argnums=0)
@full_precision
def log_acceptance(
    parts: Parts, prior: Prior, weights: tuple[Weights, ...], features: Array, keys: Key
) -> tuple[Array]:
    """Estimate the log probability (B,) that a draw given features (B, C) meets the condition.

    It is estimated from `ACCEPTANCE_DRAWS` draws with the keys (B,).
    """
    y = _propose(parts, ACCEPTANCE_DRAWS, weights, features, keys)
    accepted = jnp.sum(prior.unchecked_contains(prior.unchecked_from_standard(y)), axis=1)
    return (jnp.log(jnp.maximum(accepted, 0.5) / ACCEPTANCE_DRAWS),)


def split_shares(shares: Sequence[float], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Split n draws between ensembles in proportion to their shares.

    Returns:
        Integer part and fractional part of the expected number of draws of each ensemble.
    """
    expected = np.array(shares) * n
    counts = np.floor(expected + 1e-6).astype(int)
    return counts, np.where(expected - counts > 1e-6, expected - counts, 0.0)


def _ensemble_draws(
    keys: Key, blueprint: Blueprint, weights: Weights, features: Array, n: int
) -> Array:
    """Draw (B, n, d) for features (B, C), with equal numbers of draws from each member.

    The members are put in a random order, and their draws alternate. If n is not a multiple of the
    number of members, every member has the same probability of giving an extra draw.
    """
    members = count(weights)
    share = math.ceil(n / members)
    split = jax.vmap(lambda key: jax.random.split(key, 1 + members))(keys)
    inputs = blueprint.inputs(features)

    def draw(member_and_keys: tuple[Weights, Key]) -> Array:
        member, member_keys = member_and_keys
        return sample_per_context(partial(_member, blueprint, member), inputs, member_keys, share)

    y = jax.lax.map(draw, (weights, jnp.swapaxes(split[:, 1:], 0, 1)))

    def interleave(key: Key, y: Array) -> Array:
        order = jnp.argsort(hashed_words(key, (members,)))
        return jnp.swapaxes(y[order], 0, 1).reshape(share * members, -1)[:n]

    return jax.vmap(interleave, in_axes=(0, 2))(split[:, 0], y)


def choose(
    key: Key, draws: list[Array], *, counts: np.ndarray, fractions: np.ndarray, n: int
) -> Array:
    """Choose n draws from the draws of all ensembles, in random order.

    Ensemble k gives `counts[k]` draws, and one more with probability `fractions[k]`. Systematic
    sampling makes the total exactly n.

    Args:
        key: Random key.
        draws: Draws of each ensemble; shape (counts[k] + 1, d) if fractions[k] > 0, otherwise
            (counts[k], d).
        counts: Integer part of the expected number of draws of each ensemble.
        fractions: Fractional part of the expected number of draws of each ensemble.
        n: Total number of draws.
    """
    first, second = jax.random.split(key)
    ends = np.cumsum(fractions)
    ends[-1] = n - counts.sum()
    steps = jnp.ceil(jnp.asarray(np.concatenate([[0.0], ends])) - jax.random.uniform(first))
    extra = jnp.diff(steps) > 0
    masks = [
        jnp.where(jnp.arange(len(part)) < m, True, keep)
        for part, m, keep in zip(draws, counts, extra, strict=True)
    ]
    mask = jnp.concatenate(masks)
    place = jnp.where(mask, jax.random.uniform(second, mask.shape), 2.0)
    return jnp.concatenate(draws)[jnp.argsort(place)[:n]]


@partial(jax.jit, static_argnums=0)
@full_precision
def log_prob(
    parts: Parts, prior: Prior, weights: tuple[Weights, ...], features: Array, theta: Array
) -> tuple[Array]:
    """Compute log densities (B, n) of theta (B, n, D) given features (B, C)."""
    inside = prior.unchecked_contains(theta)
    safe = jnp.where(inside[..., None], theta, prior.unchecked_center(theta.shape[:-1]))
    y = prior.unchecked_to_standard(safe)
    single = theta.shape[0] * theta.shape[1] == 1
    points = jnp.swapaxes(y, 0, 1)
    log_prob = standard_log_prob(parts, weights, points, features, side_by_side=single).T
    return (jnp.where(inside, log_prob - prior.unchecked_log_det(y, safe), -jnp.inf),)

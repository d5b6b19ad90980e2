"""Compiled programs of a mixture of ensembles: its draws, its density and its modes.

Public names: `Parts`, `count`, `sample`, `log_prob`, `ascend`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import sample_per_context
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.networks.mlp import hashed_words
from sbi_flows.prior.maps import HALF_WIDTH
from sbi_flows.prior.prior import Prior

Parts: TypeAlias = tuple[tuple[Blueprint, float], ...]
"""What is static about a mixture: the blueprint and the share of each ensemble."""


def count(weights: Weights) -> int:
    """Number of members."""
    return len(jax.tree.leaves(weights)[0])


def _member(blueprint: Blueprint, weights: Weights, features: Array) -> distrax.Distribution:
    """One member's distributions over standard coordinates for features (B, C)."""
    return nnx.merge(graph_of(blueprint), *weights)(blueprint.select_features(features))


def _mixture(parts: Parts, weights: tuple[Weights, ...], y: Array, features: Array) -> Array:
    """Log density of the mixture at y (n, B, d) given features (B, C); shape (n, B)."""

    def ensemble(blueprint: Blueprint, stacked: Weights) -> Array:
        return jax.lax.map(lambda own: _member(blueprint, own, features).log_prob(y), stacked)

    members = [
        ensemble(blueprint, stacked) + math.log(share / count(stacked))
        for (blueprint, share), stacked in zip(parts, weights, strict=True)
    ]
    return jax.nn.logsumexp(jnp.concatenate(members), axis=0)


@partial(jax.jit, static_argnums=(0, 2, 3))
@full_precision
def sample(
    parts: Parts,
    prior: Prior,
    n: int,
    with_log_prob: bool,
    weights: tuple[Weights, ...],
    features: Array,
    keys: Key,
) -> tuple[Array, Array]:
    """Draws (B, n, D) and log densities (B, n): each ensemble gives its share, at random places."""
    expected = np.array([share for _, share in parts]) * n
    sure = np.floor(expected + 1e-6).astype(int)
    left = np.where(expected - sure > 1e-6, expected - sure, 0.0)

    own = jax.vmap(lambda key: jax.random.split(key, 1 + len(parts)))(keys)
    draws = [
        _ensemble_draws(own[:, 1 + i], blueprint, stacked, features, int(m + (rest > 0)))
        for i, ((blueprint, _), stacked, m, rest) in enumerate(
            zip(parts, weights, sure, left, strict=True)
        )
    ]
    chosen = partial(_chosen, sure=sure, left=left, n=n)
    y = draws[0] if len(parts) == 1 else jax.vmap(chosen)(own[:, 0], draws)
    theta = prior.from_standard(y)
    if not with_log_prob:
        return theta, jnp.zeros(y.shape[:2], y.dtype)
    log_prob = _mixture(parts, weights, jnp.swapaxes(y, 0, 1), features).T
    return theta, log_prob - prior.standard_log_det(y, theta)


def _ensemble_draws(
    keys: Key, blueprint: Blueprint, weights: Weights, features: Array, n: int
) -> Array:
    """Draws (B, n, d) for features (B, C): each member gives its share, interleaved.

    Their order is random: what is left over by whole shares comes from any of the members alike.
    """
    members = count(weights)
    share = math.ceil(n / members)
    own = jax.vmap(lambda key: jax.random.split(key, 1 + members))(keys)

    def one(inputs: tuple[Weights, Key]) -> Array:
        member, member_keys = inputs
        return sample_per_context(partial(_member, blueprint, member), features, member_keys, share)

    y = jax.lax.map(one, (weights, jnp.swapaxes(own[:, 1:], 0, 1)))

    def mixed(key: Key, y: Array) -> Array:
        order = jnp.argsort(hashed_words(key, (members,)))
        return jnp.swapaxes(y[order], 0, 1).reshape(share * members, -1)[:n]

    return jax.vmap(mixed, in_axes=(0, 2))(own[:, 0], y)


def _chosen(key: Key, draws: list[Array], *, sure: np.ndarray, left: np.ndarray, n: int) -> Array:
    """N draws in random order: the sure ones of each ensemble, and some of the last ones.

    An ensemble whose share is not whole has drawn one more than is sure; that one is kept with the
    probability that is left, by systematic sampling, so that n are kept in all.
    """
    first, second = jax.random.split(key)
    ends = np.cumsum(left)
    ends[-1] = n - sure.sum()
    steps = jnp.ceil(jnp.asarray(np.concatenate([[0.0], ends])) - jax.random.uniform(first))
    kept = jnp.diff(steps) > 0
    whole = [
        jnp.where(jnp.arange(len(part)) < m, True, keep)
        for part, m, keep in zip(draws, sure, kept, strict=True)
    ]
    mask = jnp.concatenate(whole)
    place = jnp.where(mask, jax.random.uniform(second, mask.shape), 2.0)
    return jnp.concatenate(draws)[jnp.argsort(place)[:n]]


@partial(jax.jit, static_argnums=0)
@full_precision
def log_prob(
    parts: Parts, prior: Prior, weights: tuple[Weights, ...], features: Array, theta: Array
) -> tuple[Array]:
    """Log densities (B, n) of theta (B, n, D) given features (B, C)."""
    inside = prior.contains(theta)
    safe = jnp.where(inside[..., None], theta, prior.center(theta.shape[:-1]))
    y = prior.to_standard(safe)
    log_prob = _mixture(parts, weights, jnp.swapaxes(y, 0, 1), features).T
    return (jnp.where(inside, log_prob - prior.standard_log_det(y, safe), -jnp.inf),)


@partial(jax.jit, static_argnums=(0, 2))
@full_precision
def ascend(
    parts: Parts,
    prior: Prior,
    steps: int,
    weights: tuple[Weights, ...],
    features: Array,
    theta: Array,
) -> tuple[Array]:
    """Adam on unconstrained coordinates from theta (B, D); keeps the best point seen."""
    bounded = jnp.asarray(prior.bounded)[None]
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def standard(u: Array) -> Array:
        return jnp.where(bounded, HALF_WIDTH * jnp.tanh(u), u)

    def objective(u: Array) -> Array:
        y = standard(u)
        log_prob = _mixture(parts, weights, y[None], features)[0]
        return log_prob - prior.standard_log_det(y, prior.from_standard(y))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        u, state, best, best_value = carry
        value, pull = jax.vjp(objective, u)
        better = value > best_value
        best = jnp.where(better[:, None], u, best)
        gradient = pull(-jnp.ones_like(value))[0]
        updates, state = optimiser.update(gradient, state)
        u = optax.apply_updates(u, updates)
        return (u, state, best, jnp.maximum(value, best_value)), None

    y = prior.to_standard(theta)
    edge = 1.0 - 1e-6
    u = jnp.where(bounded, jnp.arctanh(jnp.clip(y / HALF_WIDTH, -edge, edge)), y)
    carry = (u, optimiser.init(u), u, jnp.full(len(u), -jnp.inf, u.dtype))
    (_, _, best, _), _ = jax.lax.scan(step, carry, None, length=steps)
    return (prior.from_standard(standard(best)),)

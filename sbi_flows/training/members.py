"""What the members of an ensemble do in a fit, as compiled programs.

Public names: `Best`, `Group`, `Source`, `Plan`, `prepare`, `epoch`, `chunk`, `score`, `densities`.

A group of members is one vmapped program; every array of it has a leading axis of members.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from sbi_flows.core.precision import full_precision, precision_context
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import (
    Blueprint,
    Conditional,
    graph_of,
    initial_weights,
    ravel_weights,
    unravel_weights,
)
from sbi_flows.densities.ode import SolverStats
from sbi_flows.densities.start import fit_linear_start
from sbi_flows.networks.mlp import hashed_words, split_keys
from sbi_flows.training.devices import MEMBERS, split_rows
from sbi_flows.training.settings import Training

ROWS = 2**14
"""Rows at once where they are not a batch of the training, which bounds the memory."""


class Best(NamedTuple):
    """The weights with the lowest validation loss so far, that loss, and epochs since then.

    Attributes:
        params: The weights, as one vector.
        loss: Mean loss of the validation rows.
        age: Epochs since.
        halves: Lowest mean loss so far of the validation rows of even and of odd place, shape (2,).
        crossed: Loss of each validation row at the epoch that was best for the half that it does
            not belong to, shape (V,): no row has a say in which epoch it is judged by, as long as
            there are two.
    """

    params: Array
    loss: Array
    age: Array
    halves: Array
    crossed: Array


class State(NamedTuple):
    """What a step of the optimiser changes; the programs that do so reuse its memory."""

    params: Array
    average: Array
    optimiser: Any


class Units(NamedTuple):
    """What turns a loss into a negative log density in the parameters' own units.

    Attributes:
        train: Mean over the training rows, shape ().
        held_out: Of each validation row, shape (V,).
    """

    train: Array
    held_out: Array


class Group(NamedTuple):
    """What one group of members trains with, but its state.

    The noise is that of the training rows, then of the held-out ones, in their order.
    """

    best: Best
    rest: Any
    noise: Array
    units: Units
    train: Array
    held_out: Array
    rate: Array


class Source(NamedTuple):
    """What all members are made from: see `Ensemble`; `given` is `Blueprint.embedding_weights`."""

    y: Array
    features: Array
    offset: Array
    given: Any


class Plan(NamedTuple):
    """What is static about a fit, and part of its programs."""

    blueprint: Blueprint
    training: Training
    mesh: Mesh | None


def prepare(
    blueprint: Blueprint,
    training: Training,
    source: Source,
    keys: Key,
    train: Array,
    held_out: Array,
    rate: Array,
) -> tuple[State, Group]:
    """New members; most of the work does not depend on the settings of the training."""
    params, rest, noise, units = _start(blueprint, source, keys, train, held_out)
    m, dtype = len(keys), source.y.dtype
    infinite = jnp.full((m, 3), jnp.inf, dtype)
    crossed = jnp.zeros(held_out.shape, dtype)
    best = Best(params, infinite[:, 0], jnp.zeros(m, int), infinite[:, 1:], crossed)
    group = Group(best, rest, noise, units, train, held_out, rate)
    return _first_state(blueprint, training, params), group


@partial(jax.jit, static_argnums=(0, 1))
def _first_state(blueprint: Blueprint, training: Training, params: Array) -> State:
    # copies: the best weights so far must outlive the state's memory
    optimiser = _transform(blueprint, training, 1, 1.0)
    return State(jnp.copy(params), jnp.copy(params), jax.vmap(optimiser.init)(params))


def _transform(
    blueprint: Blueprint, training: Training, steps: int, rate: float | Array
) -> optax.GradientTransformation:
    """The optimiser, of weights as one vector."""
    transform = training.transform(steps, rate)
    if training.optimizer is None:
        return transform
    unravel = partial(unravel_weights, blueprint)

    def update(gradient: Array, state: Any, params: Array) -> tuple[Array, Any]:
        updates, state = transform.update(unravel(gradient), state, unravel(params))
        return ravel_weights(updates), state

    return optax.GradientTransformation(lambda params: transform.init(unravel(params)), update)


@partial(jax.jit, static_argnums=0)
@full_precision
def _start(
    blueprint: Blueprint, source: Source, keys: Key, train: Array, held_out: Array
) -> tuple[Array, Any, Array, Units]:
    """Initial weights, fitted starts, the parameters as these whiten them, and the units."""
    y, features, offset, given = source

    def one(
        params: Any, rest: Any, train: Array, held_out: Array
    ) -> tuple[Array, Any, Array, Units]:
        start = fit_linear_start(y, features, train, held_out, blueprint.sizes.bounded)
        rest = {**rest, "start": start}
        rows = jnp.concatenate([train, held_out])
        model = nnx.merge(graph_of(blueprint), params, rest)
        noise, log_det = _by_rows(lambda places: model.whiten(y[places], features[places]), rows)
        units = offset[rows] - log_det
        return (
            ravel_weights(params),
            rest,
            noise,
            Units(units[: len(train)].mean(), units[len(train) :]),
        )

    # in turn, as their generator would give members side by side other weights than each alone
    params, rest = jax.lax.map(lambda key: initial_weights(blueprint, key, given), keys)
    return jax.vmap(one)(params, rest, train, held_out)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
@full_precision
def epoch(
    plan: Plan,
    state: State,
    group: Group,
    features: Array,
    keys: Key,
    active: bool | Array,
) -> tuple[State, Best, Array, Array]:
    """One pass over the training rows and one over the validation rows, for a group's members.

    Without `active`, which is no constant of the program, the validation rows alone.
    """

    def one(state: State, group: Group, key: Key) -> tuple[State, Best, Array, Array]:
        rows = len(group.train)
        batch = plan.training.batch(rows)
        steps = rows // batch

        def data(places: Array) -> tuple[Array, Array]:
            places = split_rows(plan.mesh, places)
            return group.noise[places], features[group.train[places]]

        loop = _Loop(plan, steps * plan.training.max_epochs, jnp.where(active, steps, 0))
        state, total = loop.run(state, group, key, data, (rows, batch))
        best, validation = _scored(plan, state, group, features)
        return state, best, total / steps, validation

    return _over_members(one, plan.mesh)(state, group, keys)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
@full_precision
def chunk(
    plan: Plan,
    chunks: int,
    state: State,
    group: Group,
    y: Array,
    features: Array,
    keys: Key,
) -> tuple[State, Array]:
    """One pass over the rows of one of an epoch's chunks: standard coordinates and features.

    Returns:
        The states, and the mean loss of the steps.
    """
    batch = min(plan.training.batch(chunks * len(y)), len(y))
    steps = len(y) // batch

    def one(state: State, group: Group, key: Key) -> tuple[State, Array]:
        model = _model(plan.blueprint, state.params, group.rest)
        noise = model.whiten(y, features)[0]

        def data(places: Array) -> tuple[Array, Array]:
            places = split_rows(plan.mesh, places)
            return noise[places], features[places]

        loop = _Loop(plan, steps * chunks * plan.training.max_epochs, steps)
        state, total = loop.run(state, group, key, data, (len(y), batch))
        return state, total / steps

    return _over_members(one, plan.mesh)(state, group, keys)


@partial(jax.jit, static_argnums=0)
@full_precision
def score(
    plan: Plan,
    state: State,
    group: Group,
    features: Array,
) -> tuple[Best, Array]:
    """One pass over the validation rows."""
    one = partial(_scored, plan, features=features)
    return _over_members(one, plan.mesh)(state, group)


@partial(jax.jit, static_argnums=0)
@full_precision
def densities(plan: Plan, best: Best, group: Group, features: Array) -> tuple[Array, SolverStats]:
    """Negative log density (m, V) of the validation rows' noise at the best weights, by an ODE."""

    def one(best: Best, group: Group) -> tuple[Array, SolverStats]:
        model = _model(plan.blueprint, best.params, group.rest)
        noise = group.noise[len(group.train) :]
        return _by_rows(
            lambda places: model.negative_log_prob(noise[places], features[group.held_out[places]]),
            jnp.arange(len(noise)),
        )

    return _over_members(one, plan.mesh)(best, group)


def _over_members(one: Any, mesh: Mesh | None) -> Any:
    return jax.vmap(one, spmd_axis_name=MEMBERS if mesh else None)


class _Loop(NamedTuple):
    """Steps of the optimiser: `count` of them, of `total` in the whole fit."""

    plan: Plan
    total: int
    count: int | Array

    def run(
        self, state: State, group: Group, key: Key, data: Any, sizes: tuple[int, int]
    ) -> tuple[State, Array]:
        """Train on batches of `data(places)`, of the first `sizes` in random order.

        Returns:
            The state and the sum of the steps' losses.
        """
        rows, batch = sizes
        transform = _transform(self.plan.blueprint, self.plan.training, self.total, group.rate)
        decay = self.plan.training.ema_decay or 0.0
        order_key, dropout_key = split_keys(key, 2)
        steps = rows // batch
        order = jnp.argsort(hashed_words(order_key, (rows,)))[: steps * batch]
        order, keys = order.reshape(steps, batch), split_keys(dropout_key, steps)

        def loss(params: Array, key: Key, noise: Array, features: Array) -> Array:
            losses = _losses(self.plan, params, group.rest)
            return jnp.mean(losses(key, noise, features))

        def step(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            state, total = carry
            value, gradient = jax.value_and_grad(loss)(state.params, keys[i], *data(order[i]))
            updates, optimiser = transform.update(gradient, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
            average = optax.incremental_update(params, state.average, 1.0 - decay)
            return State(params, average, optimiser), total + value

        zero = jnp.zeros((), group.noise.dtype)
        return jax.lax.fori_loop(0, self.count, step, (state, zero))


def _scored(plan: Plan, state: State, group: Group, features: Array) -> tuple[Best, Array]:
    """The best so far and the mean loss of the validation rows."""
    noise = group.noise[len(group.train) :]
    one = partial(_losses(plan, state.average, group.rest), None)
    losses = _by_rows(
        lambda places: one(noise[places], features[group.held_out[places]]), jnp.arange(len(noise))
    )
    # one that has stopped may still be computed, beside others
    best = updated(group.best, state.average, losses, group.best.age < plan.training.patience)
    return best, jnp.mean(losses)


def _by_rows(one: Callable[[Array], Any], places: Array) -> Any:
    """What `one` says of row numbers (B,), its leading axis those of `places`, `ROWS` at a time."""
    n, count = len(places), -(-len(places) // ROWS)
    if count == 1:
        return one(places)
    out = jax.lax.map(one, jnp.resize(places, (count, ROWS)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)


def updated(best: Best, params: Array, losses: Array, running: Array) -> Best:
    """The best so far, after an epoch with these losses (V,) of the validation rows."""
    validation = jnp.mean(losses)
    new = (params, validation, jnp.zeros_like(best.age))
    old = (best.params, best.loss, best.age + 1)
    better = running & (validation < best.loss)
    params, loss, age = jax.tree.map(partial(jnp.where, better), new, old)
    # a single row is both halves
    halves = jnp.stack([jnp.mean(losses[0::2]), jnp.mean(losses[min(1, len(losses) - 1) :: 2])])
    improved = running & (halves < best.halves)
    other = jnp.where(jnp.arange(len(losses)) % 2 == 0, improved[1], improved[0])
    crossed = jnp.where(other, losses, best.crossed)
    return Best(params, loss, age, jnp.where(improved, halves, best.halves), crossed)


def _losses(plan: Plan, params: Array, rest: Any) -> Any:
    """Loss of each row: a key or None, noise (B, d) and features (B, C) to (B,)."""

    def losses(key: Key | None, noise: Array, features: Array) -> Array:
        with precision_context(plan.training.matmul_precision):
            return _model(plan.blueprint, params, rest).loss(key, noise, features)

    return losses


def _model(blueprint: Blueprint, params: Array, rest: Any) -> Conditional:
    return nnx.merge(graph_of(blueprint), unravel_weights(blueprint, params), rest)

"""Compiled programs that prepare, train and validate the members of an ensemble.

Public names: `prepare`, `epoch`, `chunk`, `score`, `densities`.

One vmapped program trains a group of m members; every array of a group has a leading axis of length
m. V is the number of validation rows, d the number of standard coordinates and C the number of
features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from sbi_flows.core.compilation import compiled_per_size
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
from sbi_flows.densities.scaling import ROWS_PER_SUMMARY, Scaling
from sbi_flows.densities.start import fit_linear_start
from sbi_flows.networks.mlp import hashed_words, split_keys
from sbi_flows.training.data import Rows, TrainingData
from sbi_flows.training.devices import MEMBERS, shard_rows
from sbi_flows.training.group import Best, Group, LossOffsets, Plan, Source, State, updated
from sbi_flows.training.settings import Training

MAX_ROWS, MAX_ENTRIES = 2**14, 2**24
"""Maximum number of rows, and of inputs in them, in one evaluation outside training steps."""


def prepare(
    blueprint: Blueprint,
    training: Training,
    source: Source,
    keys: Key,
    train_rows: Array,
    validation_rows: Array,
    learning_rate: Array,
) -> tuple[State, Group]:
    """Make the initial state and the arrays of a group.

    Args:
        blueprint: Description of the model of each member.
        training: Settings of the fit.
        source: Training data, and weights of an embedding.
        keys: A random key for each member.
        train_rows: Row numbers of each member's training rows.
        validation_rows: Row numbers of each member's validation rows, shape (m, V).
        learning_rate: Peak learning rate of each member, shape (m,).
    """
    params, rest, whitened, offsets = _start(blueprint, source, keys, train_rows, validation_rows)
    m, dtype = len(keys), source.data.y.dtype
    infinite = jnp.full((m, 3), jnp.inf, dtype)
    cross_losses = jnp.zeros(validation_rows.shape, dtype)
    best = Best(params, infinite[:, 0], jnp.zeros(m, int), infinite[:, 1:], cross_losses)
    group = Group(best, rest, whitened, offsets, train_rows, validation_rows, learning_rate)
    return _first_state(blueprint, training, params), group


@partial(jax.jit, static_argnums=(0, 1))
def _first_state(blueprint: Blueprint, training: Training, params: Array) -> State:
    # copies, because training steps overwrite the memory of the state, but not of the best weights
    optimiser = _optimiser(blueprint, training, 1, 1.0)
    return State(jnp.copy(params), jnp.copy(params), jax.vmap(optimiser.init)(params))


def _optimiser(
    blueprint: Blueprint, training: Training, steps: int, learning_rate: float | Array
) -> optax.GradientTransformation:
    """Return an optimiser for weights that are stored as one vector.

    A user's optimiser gets the weights as a tree: the vector is converted before each update.
    """
    transform = training.transform(steps, learning_rate)
    if training.optimizer is None:
        return transform
    unravel = partial(unravel_weights, blueprint)

    def update(gradient: Array, state: Any, params: Array) -> tuple[Array, Any]:
        updates, state = transform.update(unravel(gradient), state, unravel(params))
        return ravel_weights(updates), state

    return optax.GradientTransformation(lambda params: transform.init(unravel(params)), update)


@compiled_per_size
@partial(jax.jit, static_argnums=0)
@full_precision
def _start(
    blueprint: Blueprint, source: Source, keys: Key, train_rows: Array, validation_rows: Array
) -> tuple[Array, Any, Array, LossOffsets]:
    """Return the initial arrays of a group of members.

    Returns:
        Initial weights, arrays that are not trained (with the fitted linear start), whitened
        parameters, and loss offsets.
    """
    # lax.map instead of vmap: under vmap the random generator would give other weights than for a
    # single member
    params, rest = jax.lax.map(
        lambda key: initial_weights(blueprint, key, source.embedding_weights), keys
    )
    one = partial(_start_of_member, blueprint, source.data)
    return jax.vmap(one)(params, rest, train_rows, validation_rows)


def _start_of_member(
    blueprint: Blueprint,
    data: TrainingData,
    params: Any,
    rest: Any,
    train_rows: Array,
    validation_rows: Array,
) -> tuple[Array, Any, Array, LossOffsets]:
    y, features, rest, sizes = data.y, data.rows.validation, dict(rest), blueprint.sizes
    if blueprint.linear_start:
        regressors, flags = sizes.regressors(features), (sizes.bounded, sizes.circular)
        rest["start"] = fit_linear_start(y, regressors, train_rows, validation_rows, *flags)
    if sizes.summaries_only and len(train_rows) >= ROWS_PER_SUMMARY * sizes.summaries:
        rest["scaling"] = Scaling.fitted(features[train_rows])
    rows = jnp.concatenate([train_rows, validation_rows])
    model = nnx.merge(graph_of(blueprint), params, rest)
    whitened, log_det = _by_rows(
        lambda places: model.whiten(y[places], features[places]), rows, features
    )
    offsets, n = data.log_det[rows] - log_det, len(train_rows)
    if blueprint.missing is not None:  # each training step whitens what it hides
        whitened = jnp.concatenate([y[train_rows], whitened[n:]])
    return ravel_weights(params), rest, whitened, LossOffsets(offsets[:n].mean(), offsets[n:])


@compiled_per_size
@partial(jax.jit, static_argnums=0, donate_argnums=1)
@full_precision
def epoch(
    plan: Plan,
    state: State,
    group: Group,
    features: Rows,
    keys: Key,
    is_active: bool | Array,
) -> tuple[State, Best, Array, Array]:
    """Train a group for one epoch and validate it.

    Args:
        plan: Static settings of the fit.
        state: State of the members. The call overwrites it, so do not use it afterwards.
        group: Arrays of the members.
        features: Inputs of all rows.
        keys: A random key for each member.
        is_active: Whether to train; False only validates. Both cases use the same compiled program.

    Returns:
        The new state, the best weights so far, the mean loss of the training steps, shape (m,), and
        the mean loss of the validation rows, shape (m,).
    """

    def one(state: State, group: Group, key: Key) -> tuple[State, Best, Array, Array]:
        rows = len(group.train_rows)
        batch_size = plan.training.batch(rows)
        steps = rows // batch_size

        def data(places: Array) -> tuple[Array, Array]:
            places = shard_rows(plan.mesh, places)
            return group.whitened[places], features.training[group.train_rows[places]]

        loop = _Loop(plan, steps * plan.training.max_epochs, jnp.where(is_active, steps, 0))
        state, total = loop.run(state, group, key, data, (rows, batch_size))
        best, validation = _score(plan, state, group, features.validation)
        return state, best, total / steps, validation

    return _over_members(one, plan.mesh)(state, group, keys)


@compiled_per_size
@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
@full_precision
def chunk(
    plan: Plan,
    num_chunks: int,
    state: State,
    group: Group,
    rows: tuple[Array, Array],
    keys: Key,
) -> tuple[State, Array]:
    """Train a group on one chunk of an epoch.

    Args:
        plan: Static settings of the fit.
        num_chunks: Number of chunks in an epoch.
        state: State of the members. The call overwrites it, so do not use it afterwards.
        group: Arrays of the members.
        rows: Standard coordinates (n, d) and features (n, C) of the chunk.
        keys: A random key for each member.

    Returns:
        The new state, and the mean loss of the training steps, shape (m,).
    """
    y, features = rows
    batch_size = min(plan.training.batch(num_chunks * len(y)), len(y))
    steps = len(y) // batch_size

    def one(state: State, group: Group, key: Key) -> tuple[State, Array]:
        whitened = y
        if plan.blueprint.missing is None:
            whitened = _model(plan.blueprint, state.params, group.rest).whiten(y, features)[0]

        def data(places: Array) -> tuple[Array, Array]:
            places = shard_rows(plan.mesh, places)
            return whitened[places], features[places]

        loop = _Loop(plan, steps * num_chunks * plan.training.max_epochs, steps)
        state, total = loop.run(state, group, key, data, (len(y), batch_size))
        return state, total / steps

    return _over_members(one, plan.mesh)(state, group, keys)


@compiled_per_size
@partial(jax.jit, static_argnums=0)
@full_precision
def score(plan: Plan, state: State, group: Group, features: Rows) -> tuple[Best, Array]:
    """Validate a group; return the best weights so far and the mean validation losses (m,)."""
    one = partial(_score, plan, features=features.validation)
    return _over_members(one, plan.mesh)(state, group)


@compiled_per_size
@partial(jax.jit, static_argnums=0)
@full_precision
def densities(plan: Plan, best: Best, group: Group, features: Rows) -> tuple[Array, SolverStats]:
    """Compute negative log densities (m, V) of whitened validation rows by solving an ODE."""

    def one(best: Best, group: Group) -> tuple[Array, SolverStats]:
        model = _model(plan.blueprint, best.params, group.rest)
        whitened = group.whitened[len(group.train_rows) :]
        return _by_rows(
            lambda places: model.negative_log_prob(
                whitened[places], features.validation[group.validation_rows[places]]
            ),
            jnp.arange(len(whitened)),
            features.validation,
        )

    return _over_members(one, plan.mesh)(best, group)


def _over_members(one: Any, mesh: Mesh | None) -> Any:
    return jax.vmap(one, spmd_axis_name=MEMBERS if mesh else None)


class _Loop(NamedTuple):
    """Loop over `count` steps of the optimiser, out of `total` steps in the whole fit."""

    plan: Plan
    total: int
    count: int | Array

    def run(
        self, state: State, group: Group, key: Key, data: Any, sizes: tuple[int, int]
    ) -> tuple[State, Array]:
        """Train one member on batches of rows in random order.

        Args:
            state: State of the member.
            group: Arrays of the member.
            key: Random key.
            data: Function that maps indices (B,) of the rows of a batch to whitened parameters
                (B, d) and inputs (B, I). If the model hides entries at random, the parameters are
                standard coordinates, which a step whitens after it has hidden entries.
            sizes: Number of rows, and batch size.

        Returns:
            The new state, and the sum of the losses of all steps.
        """
        rows, batch_size = sizes
        optimiser = _optimiser(
            self.plan.blueprint, self.plan.training, self.total, group.learning_rate
        )
        decay = self.plan.training.ema_decay or 0.0
        order_key, dropout_key = split_keys(key, 2)
        steps = rows // batch_size
        order = jnp.argsort(hashed_words(order_key, (rows,)))[: steps * batch_size]
        order, keys = order.reshape(steps, batch_size), split_keys(dropout_key, steps)
        hides = self.plan.blueprint.missing is not None

        def loss(params: Array, key: Key, whitened: Array, features: Array) -> Array:
            losses = _hidden_losses if hides else _losses
            return jnp.mean(losses(self.plan, params, group.rest)(key, whitened, features))

        def step(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            state, total = carry
            value, gradient = jax.value_and_grad(loss)(state.params, keys[i], *data(order[i]))
            updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
            average = optax.incremental_update(params, state.average, 1.0 - decay)
            return State(params, average, optimiser_state), total + value

        zero = jnp.zeros((), group.whitened.dtype)
        return jax.lax.fori_loop(0, self.count, step, (state, zero))


def _score(plan: Plan, state: State, group: Group, features: Array) -> tuple[Best, Array]:
    """Validate one member; return the best weights so far and the mean validation loss."""
    whitened = group.whitened[len(group.train_rows) :]
    losses_at = partial(_losses(plan, state.average, group.rest), None)
    losses = _by_rows(
        lambda places: losses_at(whitened[places], features[group.validation_rows[places]]),
        jnp.arange(len(whitened)),
        features,
    )
    # the program also computes members of the group that have stopped
    is_running = group.best.age < plan.training.patience
    return updated(group.best, state.average, losses, is_running), jnp.mean(losses)


def _by_rows(function: Callable[[Array], Any], places: Array, features: Array) -> Any:
    """Apply a function to row numbers in blocks, and join the results.

    Args:
        function: Function of row numbers (B,).
        places: Row numbers.
        features: Inputs of the rows (N, I), whose length determines the size of a block.
    """
    size = min(MAX_ROWS, max(64, MAX_ENTRIES // features.shape[1]))
    n, count = len(places), -(-len(places) // size)
    if count == 1:
        return function(places)
    out = jax.lax.map(function, jnp.resize(places, (count, size)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)


def _losses(plan: Plan, params: Array, rest: Any) -> Any:
    """Return a function that computes the loss of each row of a batch.

    The function maps a random key or None, whitened parameters (B, d) and features (B, C) to losses
    (B,).
    """

    def losses(key: Key | None, whitened: Array, features: Array) -> Array:
        with precision_context(plan.training.matmul_precision):
            return _model(plan.blueprint, params, rest).loss(key, whitened, features)

    return losses


def _hidden_losses(plan: Plan, params: Array, rest: Any) -> Any:
    """Return a function that hides entries at random and then computes losses as `_losses` does.

    It maps a random key, standard coordinates (B, d) and features (B, 2 C) to losses (B,).
    """

    def losses(key: Key, y: Array, features: Array) -> Array:
        key, mask_key = split_keys(key, 2)
        hidden = plan.blueprint.hide_by_groups(mask_key, features)
        blueprints, inputs, weights = zip(*hidden, strict=True)
        parts = [_model(blueprint, params, rest) for blueprint in blueprints]
        noise = parts[0].whiten_parts(y, inputs, parts)
        with precision_context(plan.training.matmul_precision):
            losses = parts[0].loss_of_parts(key, noise, inputs, parts)
        repeats = [len(given) for given in inputs]
        return losses * np.repeat(np.asarray(weights, losses.dtype), repeats)

    return losses


def _model(blueprint: Blueprint, params: Array, rest: Any) -> Conditional:
    return nnx.merge(graph_of(blueprint), unravel_weights(blueprint, params), rest)

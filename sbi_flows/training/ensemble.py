"""What the members of an ensemble do in a fit, compiled.

Public names: `Ensemble`.

The members stand in groups, each of them one vmapped program. On an accelerator there is one group
of all. On a CPU, where the small products of a vmapped ensemble would stay on one core, each member
is a group, and threads run as many at once as there are cores: what comes out does not depend on
how many that is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from sbi_flows.densities.conditional import Blueprint, Weights, graph_of, initial_weights
from sbi_flows.densities.start import fit_linear_start
from sbi_flows.networks.mlp import fast_key
from sbi_flows.training.settings import Training
from sbi_flows.typing import Key


class Best(NamedTuple):
    """The weights with the lowest validation loss so far, that loss, and epochs since then.

    Attributes:
        params: The weights.
        loss: Mean loss of the validation rows.
        age: Epochs since.
        halves: Lowest mean loss so far of the validation rows of even and of odd place, shape (2,).
        crossed: Loss of each validation row at the epoch that was best for the half that it does
            not belong to, shape (V,): no row has a say in which epoch it is judged by, as long as
            there are two.
    """

    params: Any
    loss: Array
    age: Array
    halves: Array
    crossed: Array


class _State(NamedTuple):
    """What a step of the optimiser changes."""

    params: Any
    average: Any
    optimiser: Any


class _Group(NamedTuple):
    """All that one group of members trains with; every array has a leading axis of members.

    The noise is that of the training rows, then of the held-out ones, in their order.
    """

    state: _State
    best: Best
    rest: Any
    noise: Array
    units: _Units
    train: Array
    held_out: Array


class _Units(NamedTuple):
    """What turns a loss into a negative log density in the parameters' own units.

    Attributes:
        train: Mean over the training rows, shape ().
        held_out: Of each validation row, shape (V,).
    """

    train: Array
    held_out: Array


class _Data(NamedTuple):
    """What all members are made from: see `Ensemble`; `given` is `Blueprint.given_weights`."""

    y: Array
    features: Array
    offset: Array
    given: Any


class Ensemble:
    """Members in training: other initial weights, data orders and validation rows each.

    Use as a context manager, which ends its threads.

    Args:
        key: Random key.
        blueprint: What to build.
        training: Settings of the fit.
        y: Parameters in standard coordinates, shape (N, d).
        features: Standardised observations, shape (N, C).
        offset: Log Jacobian from y to the parameters' own units, shape (N,).
        members: Number of models M.
        own: Number of rows that each member has for itself: the last M * own rows, which only
            train, and which go to the members in order.

    Attributes:
        best: Weights, validation losses and ages of the best epochs so far, one a group; a new
            tuple after each epoch.
        held_out: Numbers of the rows that each member is validated on, shape (M, V).
        units: What is added to losses to make them negative log densities in the parameters' own
            units: to the mean over training rows (M,), and to each validation row's (M, V).

    Raises:
        ValueError: Too few rows to hold any out.
    """

    def __init__(
        self,
        key: Key,
        blueprint: Blueprint,
        training: Training,
        y: Array,
        features: Array,
        offset: Array,
        members: int,
        own: int = 0,
    ) -> None:
        """Fit the starts and compile an epoch, side by side."""
        shared = len(y) - members * own
        held_out = _held_out_rows(shared, training.validation_fraction)
        fold_key, weight_key = jax.random.split(key)
        folds = _folds(fold_key, shared, held_out, members, own)
        self.held_out = np.asarray(folds[1])
        keys = jax.random.split(weight_key, members)
        self._slices = _slices(members)
        self._patience, self._members = training.patience, members
        self._epoch = partial(_epoch, blueprint, training, features)
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, len(self._slices)))
        data = _Data(y, features, offset, blueprint.given_weights())
        prepare = partial(_prepare, blueprint, training, data)
        indices = range(len(self._slices))
        first, *others = [(keys[s], *(rows[s] for rows in folds)) for s in self._slices]
        # each program is compiled before the members share it: threads that met one that nobody
        # had compiled would each do so
        compiled = self._pool.submit(_compile, self._epoch, prepare, first)
        self._groups = [prepare(*first), *self._pool.map(lambda args: prepare(*args), others)]
        compiled.result()
        units = zip(*(group.units for group in self._groups), strict=True)
        self.units = _Units(*(jnp.asarray(np.concatenate(arrays)) for arrays in units))
        # an epoch without a step scores the starts, so that no other program has to
        scored = self._pool.map(lambda i: self._advance(i, keys[self._slices[i]], False), indices)
        self._groups = [group for group, *_ in scored]
        self.best = tuple(group.best for group in self._groups)
        self._losses = (self.best_loss, self.best_loss)

    def __enter__(self) -> Ensemble:
        """Nothing more to set up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what runs, and end the threads."""
        self._pool.shutdown()

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the weights that each member keeps, shape (M,)."""
        return np.concatenate([best.loss for best in self.best])

    @property
    def running(self) -> np.ndarray:
        """Which members have not run out of patience, shape (M,)."""
        return np.concatenate([best.age for best in self.best]) < self._patience

    def epoch(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Train the members that still run for one epoch.

        Returns:
            Mean training loss and validation loss, shape (M,) each, before `units` are added; of a
            member that has stopped, the last ones.
        """
        keys, running = jax.random.split(key, self._members), self.running
        active = [i for i, s in enumerate(self._slices) if running[s].any()]
        results = self._pool.map(lambda i: self._advance(i, keys[self._slices[i]], True), active)
        losses = [np.array(values) for values in self._losses]
        groups = list(self._groups)
        for i, (group, *means) in zip(active, results, strict=True):
            groups[i], s = group, self._slices[i]
            for values, mean in zip(losses, means, strict=True):
                values[s] = np.where(running[s], mean, values[s])
        self._groups, self._losses = groups, (losses[0], losses[1])
        self.best = tuple(group.best for group in groups)
        return self._losses

    @property
    def latest(self) -> tuple[Best, ...]:
        """What `best` is, with the weights after the last epoch (their average, if one is kept)."""
        return tuple(group.best._replace(params=group.state.average) for group in self._groups)

    def weights(self, best: tuple[Best, ...]) -> Weights:
        """Best weights and the arrays that are not trained, stacked over all members."""
        params = _stack([b.params for b in best])
        return Weights(params, _stack([group.rest for group in self._groups]))

    def _advance(self, i: int, keys: Key, active: bool) -> tuple[_Group, np.ndarray, np.ndarray]:
        group = self._groups[i]
        state, best, train, validation = self._epoch(group, keys, active)
        return group._replace(state=state, best=best), np.asarray(train), np.asarray(validation)


def _slices(members: int) -> list[slice]:
    """Members of each group."""
    if jax.default_backend() == "cpu":
        return [slice(i, i + 1) for i in range(members)]
    return [slice(0, members)]


def _stack(trees: list[Any]) -> Any:
    if len(trees) == 1:
        return trees[0]
    # by numpy: the arrays are on the host already, and nothing needs to be compiled
    return jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *trees)


def _held_out_rows(n: int, fraction: float) -> int:
    held_out = math.ceil(fraction * n)
    if n < 10 or held_out >= n:
        raise ValueError(
            f"simulations: expected at least 10 valid rows to train on, and some that "
            f"validation_fraction={fraction:g} leaves, got {n}"
        )
    return held_out


def _folds(key: Key, n: int, held_out: int, members: int, own: int = 0) -> tuple[Array, Array]:
    """Training rows (M, N - V + own) and validation rows (M, V).

    Member m holds out the m-th fold of n rows; which one that is depends on the key, n and V alone.
    """
    order = jax.random.permutation(key, n)
    rolled = jnp.stack([jnp.roll(order, -m * held_out) for m in range(members)])
    extra = n + jnp.arange(members * own).reshape(members, own)
    return jnp.concatenate([rolled[:, held_out:], extra], axis=1), rolled[:, :held_out]


def _compile(epoch: Callable, prepare: Callable, first: tuple) -> None:
    """Compile an epoch, which the jitted function then finds done."""
    group = jax.eval_shape(prepare, *first)
    epoch.func.lower(*epoch.args, group, first[0], True).compile()


def _prepare(
    blueprint: Blueprint, training: Training, data: _Data, keys: Key, train: Array, held_out: Array
) -> _Group:
    """New members; most of the work does not depend on the settings of the training."""
    params, rest, noise, units = _start(blueprint, data, keys, train, held_out)
    state = _State(params, params, _optimiser_state(training, params))
    m, dtype = len(keys), data.y.dtype
    infinite = jnp.full((m, 3), jnp.inf, dtype)
    crossed = jnp.zeros(held_out.shape, dtype)
    best = Best(params, infinite[:, 0], jnp.zeros(m, int), infinite[:, 1:], crossed)
    return _Group(state, best, rest, noise, units, train, held_out)


@partial(jax.jit, static_argnums=0)
def _optimiser_state(training: Training, params: Any) -> Any:
    return jax.vmap(training.transform(1).init)(params)


@partial(jax.jit, static_argnums=0)
def _start(
    blueprint: Blueprint, data: _Data, keys: Key, train: Array, held_out: Array
) -> tuple[Any, Any, Array, _Units]:
    """Initial weights, fitted starts, the parameters as these whiten them, and the units."""
    y, features, offset, given = data

    def one(key: Key, train: Array, held_out: Array) -> tuple[Any, Any, Array, _Units]:
        params, rest = initial_weights(blueprint, key, given)
        start = fit_linear_start(y, features, train, held_out, blueprint.sizes.bounded)
        rest = {**rest, "start": start}
        rows = jnp.concatenate([train, held_out])
        model = nnx.merge(graph_of(blueprint), params, rest)
        noise, log_det = model.whiten(y[rows], features[rows])
        units = offset[rows] - log_det
        return params, rest, noise, _Units(units[: len(train)].mean(), units[len(train) :])

    return jax.vmap(one)(keys, train, held_out)


@partial(jax.jit, static_argnums=(0, 1))
def _epoch(
    blueprint: Blueprint,
    training: Training,
    features: Array,
    group: _Group,
    keys: Key,
    active: bool | Array,
) -> tuple[_State, Best, Array, Array]:
    """One pass over the training rows and one over the validation rows, for a group's members.

    Without `active`, which is no constant of the program, the validation rows alone.
    """
    one = partial(_member_epoch, blueprint, training, features)
    return jax.vmap(one, in_axes=(0, 0, None))(group, keys, active)


def _member_epoch(
    blueprint: Blueprint,
    training: Training,
    features: Array,
    group: _Group,
    key: Key,
    active: bool | Array,
) -> tuple[_State, Best, Array, Array]:
    state, best, rest, noise, _, train, held_out = group
    batch = training.batch(len(train))
    steps = len(train) // batch
    transform = training.transform(steps * training.max_epochs)
    decay = 0.0 if training.ema_decay is None else training.ema_decay
    order_key, dropout_key = jax.random.split(key)
    # places among the member's own rows, which the noise is of
    places = jax.random.permutation(order_key, len(train))[: steps * batch].reshape(steps, batch)
    keys = jax.random.split(fast_key(dropout_key), steps)

    def loss(params: Any, key: Key, rows: Array) -> Array:
        return jnp.mean(_losses(blueprint, params, rest, key, noise[rows], features[train[rows]]))

    def step(i: Array, carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state, total = carry
        value, gradient = jax.value_and_grad(loss)(state.params, keys[i], places[i])
        updates, optimiser = transform.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, 1.0 - decay)
        return _State(params, average, optimiser), total + value

    zero = jnp.zeros((), noise.dtype)
    state, total = jax.lax.fori_loop(0, jnp.where(active, steps, 0), step, (state, zero))
    own = noise[len(train) :]
    losses = _losses(blueprint, state.average, rest, None, own, features[held_out])
    # one that has stopped may still be computed, beside others
    best = _updated(best, state.average, losses, best.age < training.patience)
    return state, best, total / steps, jnp.mean(losses)


def _updated(best: Best, params: Any, losses: Array, running: Array) -> Best:
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


def _losses(
    blueprint: Blueprint, params: Any, rest: Any, key: Key | None, noise: Array, features: Array
) -> Array:
    return nnx.merge(graph_of(blueprint), params, rest).loss(key, noise, features)

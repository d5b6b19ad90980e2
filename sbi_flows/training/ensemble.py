"""The members of an ensemble in training: which of them run where, and when they stop.

Public names: `Ensemble`, `Snapshot`.

The members stand in groups, each of them one vmapped program. On an accelerator, or where there are
several devices, there is one group of all. On a single CPU, where the small products of a vmapped
ensemble would stay on one core, each member is a group, and threads run as many at once as there
are cores: what comes out does not depend on how many that is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import inherit_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import (
    Blueprint,
    Weights,
    has_likelihood_loss,
    needs_ode,
    unravel_weights,
)
from sbi_flows.densities.ode import SolverStats
from sbi_flows.training import members as programs
from sbi_flows.training.devices import from_words, mesh_of, on_mesh, to_host, words_of
from sbi_flows.training.members import Best, Group, Plan, Source, State, Units
from sbi_flows.training.settings import Training
from sbi_flows.training.stream import Stream


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
        stream: Rows to train on instead: those above are then its sample, which makes the starts,
            and all members hold out the same rows of it.

    Attributes:
        best: Weights, validation losses and ages of the best epochs so far, one a group; a new
            tuple after each epoch.
        held_out: Numbers of the rows that each member is validated on, shape (M, V).
        units: What is added to losses to make them negative log densities in the parameters' own
            units: to the mean over training rows (M,), and to each validation row's (M, V).

    Raises:
        ValueError: Too few rows to hold any out, or too few devices.
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
        stream: Stream | None = None,
    ) -> None:
        """Fit the starts and compile an epoch, side by side."""
        shared = len(y) - members * own
        count = _held_out_rows(shared, training.validation_fraction)
        fold_key, weight_key = jax.random.split(key)
        folds = _folds(fold_key, shared, count, members, own)
        if stream is not None:
            folds = tuple(jnp.stack([rows[0]] * members) for rows in folds)
            stream = stream.without(np.asarray(folds[1][0]))
        batch = training.batch(folds[0].shape[1] if stream is None else len(stream.rows))
        mesh, self._stream = mesh_of(members, batch, training.devices), stream
        # rates are no constants of the programs, which then serve for all of them
        settings = training.without_checkpoint
        settings = dataclasses.replace(settings, learning_rate=1.0, devices=None)
        self._plan = Plan(blueprint, settings, mesh)
        self._slices = _slices(members, together=mesh is not None)
        self._features = on_mesh(self._plan.mesh, features, members=False)
        self.held_out = np.asarray(folds[1])
        if stream is not None:
            self.held_out = stream.sample[self.held_out]
        threads = min(os.cpu_count() or 1, len(self._slices))
        self._pool = ThreadPoolExecutor(threads, initializer=inherit_precision())
        keys = jax.random.split(weight_key, members)
        rates = jnp.asarray(np.resize(training.learning_rate, members), y.dtype)
        train, held_out = folds
        given = [(keys[s], train[s], held_out[s], rates[s]) for s in self._slices]
        source = Source(y, features, offset, blueprint.embedding_weights())
        prepare = partial(programs.prepare, blueprint, settings, source)
        # each program is compiled before the members share it: threads that met one that nobody
        # had compiled would each do so
        compiled = self._pool.submit(self._compile, prepare, given[0])
        pairs = [prepare(*given[0])]
        pairs += self._pool.map(lambda arguments: prepare(*arguments), given[1:])
        compiled.result()
        self._states, self._groups = zip(
            *on_mesh(self._plan.mesh, pairs, members=True), strict=True
        )
        units = zip(*(group.units for group in self._groups), strict=True)
        self.units = Units(*(jnp.asarray(_joined(arrays)) for arrays in units))
        self._losses, indices = (np.zeros(members), np.zeros(members)), range(len(given))
        scored = self._pool.map(lambda i: self._score(i, keys[self._slices[i]]), indices)
        self._keep(indices, np.ones(members, bool), scored)

    def __enter__(self) -> Ensemble:
        """Nothing more to set up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what runs, and end the threads."""
        self._pool.shutdown()

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the weights that each member keeps, shape (M,)."""
        return _joined([best.loss for best in self.best])

    @property
    def more_advice(self) -> str:
        """What else may help where a loss is not finite."""
        blueprint = self._plan.blueprint
        if not (needs_ode(blueprint) and has_likelihood_loss(blueprint)):
            return ""
        return "; so may more max_steps of the solver, as an ODE that is not solved has no density"

    @property
    def running(self) -> np.ndarray:
        """Which members have not run out of patience, shape (M,)."""
        return _joined([best.age for best in self.best]) < self._plan.training.patience

    def epoch(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Train the members that still run for one epoch.

        Returns:
            Mean training loss and validation loss, shape (M,) each, before `units` are added; of a
            member that has stopped, the last ones.
        """
        running = self.running
        active = [i for i, s in enumerate(self._slices) if running[s].any()]
        if self._stream is None:
            keys = jax.random.split(key, len(running))
            results = self._pool.map(
                lambda i: self._advance(i, keys[self._slices[i]], True), active
            )
        else:
            results = self._streamed(key, active, self._stream)
        self._keep(active, running, results)
        return self._losses

    def snapshot(self) -> Snapshot:
        """What epochs have come to, of all members and on the host."""
        pairs = [(s, g.best) for s, g in zip(self._states, self._groups, strict=True)]
        state, best = jax.tree.map(lambda *leaves: _joined(map(words_of, leaves)), *pairs)
        return Snapshot(state, best, self._losses)

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        states, groups = [], []
        for s, *pair in zip(self._slices, self._states, self._groups, strict=True):
            like = (pair[0], pair[1].best)
            found = jax.tree.map(lambda old, new, s=s: _like(old, new[s]), like, snapshot[:2])
            state, best = on_mesh(self._plan.mesh, found, members=True)
            states.append(state)
            groups.append(pair[1]._replace(best=best))
        self._states, self._groups, self._losses = states, groups, snapshot.losses
        self.best = tuple(group.best for group in groups)

    @property
    def latest(self) -> tuple[Best, ...]:
        """What `best` is, with the weights after the last epoch (their average, if one is kept).

        They are there until the next epoch begins.
        """
        pairs = zip(self._states, self._groups, strict=True)
        return tuple(group.best._replace(params=state.average) for state, group in pairs)

    def densities(self, best: tuple[Best, ...]) -> tuple[np.ndarray, SolverStats]:
        """Negative log density (M, V) of the validation rows at these weights, as `units` say.

        For densities that solve an ODE; with it the work of each solve.
        """

        def of(pair: tuple[Best, Group]) -> tuple[Array, SolverStats]:
            return programs.densities(self._plan, *pair, self._features)

        first, *others = zip(best, self._groups, strict=True)
        # alone: threads that meet a program which is not compiled compile it each
        found = [of(first), *self._pool.map(of, others)]
        return jax.tree.map(lambda *arrays: _joined(arrays), *found)

    def weights(self, best: tuple[Best, ...]) -> Weights:
        """Best weights and the arrays that are not trained, stacked over all members."""
        # by numpy: the arrays are on the host already, and nothing needs to be compiled
        params = unravel_weights(self._plan.blueprint, _joined([b.params for b in best]))
        rest = [group.rest for group in self._groups]
        rest = jax.tree.map(lambda *leaves: _joined(leaves), *rest)
        return Weights(*jax.tree.map(jnp.asarray, (params, rest)))

    def _advance(self, i: int, keys: Key, active: bool) -> _Result:
        """An epoch of one group, or without `active` its validation alone."""
        state, best, *means = programs.epoch(
            self._plan,
            self._states[i],
            self._groups[i],
            self._features,
            on_mesh(self._plan.mesh, keys, members=True),
            active,
        )
        return _Result(state, best, *map(to_host, means))

    def _score(self, i: int, keys: Key) -> _Result:
        """The validation of one group; in memory an epoch without a step is the program for it."""
        if self._stream is None:
            return self._advance(i, keys, False)
        return self._scored(i, self._states[i], np.zeros(len(keys)))

    def _scored(self, i: int, state: State, train: np.ndarray) -> _Result:
        best, validation = programs.score(self._plan, state, self._groups[i], self._features)
        return _Result(state, best, train, to_host(validation))

    def _streamed(self, key: Key, active: list[int], stream: Stream) -> Iterator[_Result]:
        """An epoch of chunks, on each of which all groups train."""
        members, count = len(self.held_out), stream.count
        order_key, *keys = jax.random.split(key, 1 + members * count)
        chunk_keys = jnp.stack(keys).reshape(count, members)
        states, train = dict(zip(active, (self._states[i] for i in active), strict=True)), {}
        for own, rows in zip(chunk_keys, stream.chunks(order_key), strict=True):
            y, features = on_mesh(self._plan.mesh, rows, members=False)

            def advance(i: int, own: Key = own, y: Array = y, features: Array = features) -> Any:
                keys = on_mesh(self._plan.mesh, own[self._slices[i]], members=True)
                state, mean = programs.chunk(
                    self._plan, count, states[i], self._groups[i], y, features, keys
                )
                return state, to_host(mean)

            for i, (state, mean) in zip(active, self._pool.map(advance, active), strict=True):
                states[i], train[i] = state, train.get(i, 0.0) + mean / count
        return self._pool.map(lambda i: self._scored(i, states[i], train[i]), active)

    def _keep(self, active: Iterable[int], running: np.ndarray, results: Iterable[_Result]) -> None:
        """Take what the groups have come to, all at once."""
        states, groups = list(self._states), list(self._groups)
        losses = [np.array(values) for values in self._losses]
        for i, (state, best, *means) in zip(active, results, strict=True):
            states[i], groups[i], s = state, groups[i]._replace(best=best), self._slices[i]
            for values, mean in zip(losses, means, strict=True):
                values[s] = np.where(running[s], mean, values[s])
        self._states, self._groups, self._losses = states, groups, (losses[0], losses[1])
        self.best = tuple(group.best for group in groups)

    def _compile(self, prepare: Callable, given: tuple) -> None:
        """Compile an epoch, which the jitted functions then find done."""
        if self._plan.mesh is not None:
            return  # it is compiled for arrays that lie on its devices, by the only group there is
        state, group = jax.eval_shape(prepare, *given)
        if self._stream is None:
            programs.epoch.lower(self._plan, state, group, self._features, given[0], True).compile()
            return
        rows = [
            jax.ShapeDtypeStruct((self._stream.size, width), self._features.dtype)
            for width in (self._plan.blueprint.sizes.dim, self._features.shape[1])
        ]
        arguments = (self._plan, self._stream.count, state, group, *rows, given[0])
        programs.chunk.lower(*arguments).compile()
        programs.score.lower(self._plan, state, group, self._features).compile()


class Snapshot(NamedTuple):
    """What epochs change, of all members: host arrays with a leading axis M."""

    state: State
    best: Best
    losses: tuple[np.ndarray, np.ndarray]


class _Result(NamedTuple):
    """What a group has come to in an epoch; the losses of its members have shape (m,)."""

    state: State
    best: Best
    train: np.ndarray
    validation: np.ndarray


def _slices(members: int, *, together: bool) -> list[slice]:
    """Members of each group."""
    if jax.default_backend() == "cpu" and not together:
        return [slice(i, i + 1) for i in range(members)]
    return [slice(0, members)]


def _joined(arrays: Iterable[Array]) -> np.ndarray:
    return np.concatenate([to_host(a) for a in arrays])


def _like(old: Array, words: np.ndarray) -> Array:
    """The same kind of array; a copy, whose memory a program may use for its result."""
    return from_words(old, jax.device_put(words, may_alias=False))


def _held_out_rows(n: int, fraction: float) -> int:
    """Number of rows that each member holds out, of n.

    Raises:
        ValueError: Too few rows to hold any out.
    """
    held_out = math.ceil(fraction * n)
    if n < 10 or held_out >= n:
        raise ValueError(
            f"simulations: expected at least 10 valid rows to train on, and some that "
            f"validation_fraction={fraction:g} leaves, got {n}"
        )
    return held_out


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _folds(key: Key, n: int, held_out: int, members: int, own: int = 0) -> tuple[Array, Array]:
    """Training rows (M, N - V + own) and validation rows (M, V).

    Member m holds out the m-th fold of n rows; which one that is depends on the key, n and V alone.
    """
    order = jax.random.permutation(key, n)
    rolled = jnp.stack([jnp.roll(order, -m * held_out) for m in range(members)])
    extra = n + jnp.arange(members * own).reshape(members, own)
    return jnp.concatenate([rolled[:, held_out:], extra], axis=1), rolled[:, :held_out]

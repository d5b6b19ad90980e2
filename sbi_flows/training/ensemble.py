"""Training of the members of an ensemble, in groups on devices or CPU cores.

Public names: `Ensemble`, `Snapshot`.

The members are divided into groups. One vmapped program trains all members of a group. On an
accelerator, or with several devices, all members are in one group. On a single CPU, each member is
its own group, because the small matrix products of a vmapped ensemble would use only one core.
Threads then run one group on each core. The result does not depend on the number of cores.
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

from sbi_flows.core.compilation import compiled_per_size
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
from sbi_flows.training.data import FitKeys, TrainingData
from sbi_flows.training.devices import (
    from_numeric,
    make_mesh,
    place_on_mesh,
    to_host,
    to_numeric,
)
from sbi_flows.training.group import Best, Group, LossOffsets, Plan, Source, State
from sbi_flows.training.settings import Training
from sbi_flows.training.stream import Stream

MIN_ROWS = 10
"""Minimum number of rows that all members share."""


class Ensemble:
    """Members of an ensemble during training.

    The members differ in initial weights, order of the data and validation rows. Use the object as
    a context manager: at the end of the `with` block its threads are stopped.

    Args:
        keys: Random keys of the fit.
        blueprint: Description of the model of each member.
        training: Settings of the fit.
        data: Training data.
        members: Number of members M.

    Attributes:
        best: Best weights so far and their validation losses, one `Best` for each group of members
            that one program trains. The tuple is replaced after each epoch.
        held_out: Row numbers of the validation rows of each member, shape (M, V).
        offsets: Terms that convert losses to negative log densities in the units of theta when they
            are added: mean term of the training rows (M,), and term of each validation row (M, V).

    Raises:
        ValueError: There are too few rows to hold any out, or too few devices.
    """

    def __init__(
        self,
        keys: FitKeys,
        blueprint: Blueprint,
        training: Training,
        data: TrainingData,
        members: int,
    ) -> None:
        """Fit the linear starts, and compile the program of an epoch at the same time."""
        folds, stream = _split_rows(keys.folds, training, data, members)
        self._stream, self.held_out = stream, np.asarray(folds[1])
        num_rows = folds[0].shape[1] if stream is None else len(stream.rows)
        if stream is not None:
            self.held_out = stream.sample[self.held_out]
        mesh = make_mesh(members, training.batch(num_rows), training.devices)
        # the learning rate is an argument of the programs, so that members with different rates
        # use the same compiled program
        settings = training.without_checkpoint
        settings = dataclasses.replace(settings, learning_rate=1.0, devices=None)
        self._plan = Plan(blueprint, settings, mesh)
        self._slices = _slices(members, together=mesh is not None)
        self._features = place_on_mesh(mesh, data.rows, over_members=False)
        threads = min(os.cpu_count() or 1, len(self._slices))
        self._pool = ThreadPoolExecutor(threads, initializer=inherit_precision())
        member_keys = jax.random.split(keys.weights, members)
        rates = jnp.asarray(np.resize(training.learning_rate, members), data.y.dtype)
        arguments = [(member_keys[s], folds[0][s], folds[1][s], rates[s]) for s in self._slices]
        source = Source(data.in_memory, blueprint.embedding_weights())
        self._start(partial(programs.prepare, blueprint, settings, source), arguments)
        self._losses, indices = (np.zeros(members), np.zeros(members)), range(len(arguments))
        scores = self._pool.map(lambda i: self._first_score(i, arguments[i][0]), indices)
        self._store(indices, np.ones(members, bool), scores)

    def _start(self, prepare: Callable, arguments: list[tuple]) -> None:
        """Prepare all groups, and compile the program of an epoch at the same time."""
        # compile each program once before other threads call it: otherwise each thread would
        # compile the program
        compiled = self._pool.submit(self._compile, prepare, arguments[0])
        pairs = [prepare(*arguments[0])]
        pairs += self._pool.map(lambda each: prepare(*each), arguments[1:])
        compiled.result()
        pairs = place_on_mesh(self._plan.mesh, pairs, over_members=True)
        self._states, self._groups = zip(*pairs, strict=True)
        offsets = zip(*(group.offsets for group in self._groups), strict=True)
        self.offsets = LossOffsets(*(jnp.asarray(_joined(arrays)) for arrays in offsets))

    def __enter__(self) -> Ensemble:
        """Return the ensemble."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the threads have finished, and stop them."""
        self._pool.shutdown()

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the best weights of each member, shape (M,)."""
        return _joined([best.loss for best in self.best])

    @property
    def divergence_advice(self) -> str:
        """Additional advice for the error message if a loss of this density is not finite."""
        blueprint = self._plan.blueprint
        if not (needs_ode(blueprint) and has_likelihood_loss(blueprint)):
            return ""
        return (
            "; so may more max_steps of the solver, as the density is NaN where its ODE is not "
            "solved"
        )

    @property
    def running(self) -> np.ndarray:
        """Whether each member is still trained (its patience is not exhausted), shape (M,)."""
        return _joined([best.age for best in self.best]) < self._plan.training.patience

    def epoch(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Train the members that have not stopped for one epoch.

        Returns:
            Mean training losses and mean validation losses, shape (M,) each, without `offsets`. A
            member that has stopped keeps its last losses.
        """
        running = self.running
        active = [i for i, s in enumerate(self._slices) if running[s].any()]
        if self._stream is None:
            keys = jax.random.split(key, len(running))
            results = self._pool.map(
                lambda i: self._advance(i, keys[self._slices[i]], True), active
            )
        else:
            results = self._stream_epoch(key, active, self._stream)
        self._store(active, running, results)
        return self._losses

    def snapshot(self) -> Snapshot:
        """Copy all arrays that change during training to the host."""
        pairs = [(s, g.best) for s, g in zip(self._states, self._groups, strict=True)]
        state, best = jax.tree.map(lambda *leaves: _joined(map(to_numeric, leaves)), *pairs)
        return Snapshot(state, best, self._losses)

    def resume(self, snapshot: Snapshot) -> None:
        """Restore the state of a snapshot."""
        states, groups = [], []
        for s, *pair in zip(self._slices, self._states, self._groups, strict=True):
            like = (pair[0], pair[1].best)
            restored = jax.tree.map(lambda old, new, s=s: _like(old, new[s]), like, snapshot[:2])
            state, best = place_on_mesh(self._plan.mesh, restored, over_members=True)
            states.append(state)
            groups.append(pair[1]._replace(best=best))
        self._states, self._groups, self._losses = states, groups, snapshot.losses
        self.best = tuple(group.best for group in groups)

    @property
    def latest(self) -> tuple[Best, ...]:
        """Copy of `best` in which the weights are replaced by the weights after the last epoch.

        If training uses a moving average of the weights, the averaged weights are returned. The
        next epoch overwrites the arrays, so use them before the next epoch begins.
        """
        pairs = zip(self._states, self._groups, strict=True)
        return tuple(group.best._replace(params=state.average) for state, group in pairs)

    def densities(self, best: tuple[Best, ...]) -> tuple[np.ndarray, SolverStats]:
        """Compute negative log densities of the validation rows by solving an ODE for each row.

        Args:
            best: Weights of each group.

        Returns:
            Negative log densities, shape (M, V), without `offsets`, and the numbers of solver steps
            and network evaluations of each solve.
        """

        def of_group(pair: tuple[Best, Group]) -> tuple[Array, SolverStats]:
            return programs.densities(self._plan, *pair, self._features)

        first, *others = zip(best, self._groups, strict=True)
        # the first call compiles the program; the threads then use the compiled program
        parts = [of_group(first), *self._pool.map(of_group, others)]
        return jax.tree.map(lambda *arrays: _joined(arrays), *parts)

    def arrays(self, best: tuple[Best, ...]) -> tuple[np.ndarray, Any]:
        """Copy the weights and the arrays that are not trained to the host.

        Returns:
            Weights as one vector for each member, shape (M, P), and a tree of the arrays that are
            not trained, with a leading axis M.
        """
        rest = [group.rest for group in self._groups]
        rest = jax.tree.map(lambda *leaves: _joined(leaves), *rest)
        return _joined([b.params for b in best]), rest

    def weights(self, best: tuple[Best, ...]) -> Weights:
        """Return weights and arrays that are not trained, stacked over all members."""
        vectors, rest = self.arrays(best)
        # NumPy arrays on the host are unravelled without compiling anything
        params = unravel_weights(self._plan.blueprint, vectors)
        return Weights(*jax.device_put((params, rest)))

    def _advance(self, i: int, keys: Key, is_active: bool) -> _Result:
        """Train group i for one epoch if `is_active` is true, and validate the group."""
        state, best, *means = programs.epoch(
            self._plan,
            self._states[i],
            self._groups[i],
            self._features,
            place_on_mesh(self._plan.mesh, keys, over_members=True),
            is_active,
        )
        return _Result(state, best, *map(to_host, means))

    def _first_score(self, i: int, keys: Key) -> _Result:
        """Validate group i before the first epoch.

        For data in memory this runs the program of an epoch without training, so that no other
        program has to be compiled.
        """
        if self._stream is None:
            return self._advance(i, keys, False)
        return self._score(i, self._states[i], np.zeros(len(keys)))

    def _score(self, i: int, state: State, train: np.ndarray) -> _Result:
        best, validation = programs.score(self._plan, state, self._groups[i], self._features)
        return _Result(state, best, train, to_host(validation))

    def _stream_epoch(self, key: Key, active: list[int], stream: Stream) -> Iterator[_Result]:
        """Train all groups on each chunk of an epoch."""
        members, count = len(self.held_out), stream.num_chunks
        order_key, *keys = jax.random.split(key, 1 + members * count)
        chunk_keys = jnp.stack(keys).reshape(count, members)
        states = {i: self._states[i] for i in active}
        dtype = self._features.training.dtype
        train = {i: np.zeros(len(self._groups[i].train_rows), dtype) for i in active}
        for member_keys, rows in zip(chunk_keys, stream.chunks(order_key), strict=True):
            advance = partial(self._advance_chunk, states, member_keys, self._on_devices(rows))
            for i, (state, mean) in zip(active, self._pool.map(advance, active), strict=True):
                states[i], train[i] = state, train[i] + mean / count
        return self._pool.map(lambda i: self._score(i, states[i], train[i]), active)

    def _advance_chunk(
        self, states: dict[int, State], member_keys: Key, rows: tuple[Array, Array], i: int
    ) -> tuple[State, np.ndarray]:
        assert self._stream is not None
        keys = place_on_mesh(self._plan.mesh, member_keys[self._slices[i]], over_members=True)
        arguments = (states[i], self._groups[i], rows, keys)
        state, mean = programs.chunk(self._plan, self._stream.num_chunks, *arguments)
        return state, to_host(mean)

    def _on_devices(self, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        return place_on_mesh(self._plan.mesh, rows, over_members=False)

    def _store(
        self, active: Iterable[int], running: np.ndarray, results: Iterable[_Result]
    ) -> None:
        """Replace states, best weights and losses by the results of an epoch.

        No attribute changes before all results are complete.
        """
        states, groups = list(self._states), list(self._groups)
        losses = [np.array(values) for values in self._losses]
        for i, (state, best, *means) in zip(active, results, strict=True):
            states[i], groups[i], s = state, groups[i]._replace(best=best), self._slices[i]
            for values, mean in zip(losses, means, strict=True):
                values[s] = np.where(running[s], mean, values[s])
        self._states, self._groups, self._losses = states, groups, (losses[0], losses[1])
        self.best = tuple(group.best for group in groups)

    def _compile(self, prepare: Callable, arguments: tuple) -> None:
        """Compile the program of an epoch, so that later calls find it in JAX's cache."""
        if self._plan.mesh is not None:
            return  # with a mesh, the first call compiles it for arrays placed on the mesh
        state, group = jax.eval_shape(prepare, *arguments)
        plan, features, keys = self._plan, self._features, arguments[0]
        if self._stream is None:
            programs.epoch.lower(plan, state, group, features, keys, True).compile()
            return
        rows = tuple(
            jax.ShapeDtypeStruct((self._stream.chunk_size, width), features.training.dtype)
            for width in (plan.blueprint.sizes.dim, features.training.shape[1])
        )
        programs.chunk.lower(plan, self._stream.num_chunks, state, group, rows, keys).compile()
        programs.score.lower(plan, state, group, features).compile()


class Snapshot(NamedTuple):
    """All arrays that change during training, on the host, with a leading axis M (members)."""

    state: State
    best: Best
    losses: tuple[np.ndarray, np.ndarray]


class _Result(NamedTuple):
    """Result of one epoch of a group with m members; losses have shape (m,)."""

    state: State
    best: Best
    train: np.ndarray
    validation: np.ndarray


def _slices(members: int, *, together: bool) -> list[slice]:
    """Divide the members into groups, each trained by one program; return a slice for each group.

    On a CPU, each member is a group of its own unless `together` is true. On other devices all
    members form one group.
    """
    if jax.default_backend() == "cpu" and not together:
        return [slice(i, i + 1) for i in range(members)]
    return [slice(0, members)]


def _joined(arrays: Iterable[Array]) -> np.ndarray:
    return np.concatenate([to_host(a) for a in arrays])


def _like(old: Array, values: np.ndarray) -> Array:
    """Copy values to an array of the same kind as `old`; programs may overwrite the copy."""
    return from_numeric(old, jax.device_put(values, may_alias=False))


def _split_rows(
    key: Key, training: Training, data: TrainingData, members: int
) -> tuple[tuple[Array, Array], Stream | None]:
    """Choose the training rows and validation rows of each member.

    Returns:
        Row numbers of the training and validation rows of each member, and the stream without the
        validation rows (None without a stream).

    Raises:
        ValueError: There are too few rows to hold any out.
    """
    n, fraction = data.shared_rows(members), training.validation_fraction
    held_out = math.ceil(fraction * n)
    if n < MIN_ROWS or held_out >= n:
        raise ValueError(
            f"simulations: expected at least {MIN_ROWS} valid rows, and some to train on beside "
            f"those that validation_fraction={fraction:g} holds out, got {n}"
        )
    folds = _folds(key, n, held_out, members, data.member_rows)
    if data.stream is None:
        return folds, None
    train, validation = (jnp.stack([rows[0]] * members) for rows in folds)
    return (train, validation), data.stream.without(np.asarray(validation[0]))


@compiled_per_size
@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _folds(
    key: Key, n: int, held_out: int, members: int, member_rows: int = 0
) -> tuple[Array, Array]:
    """Return row numbers of training rows (M, n - V + member_rows) and validation rows (M, V).

    Member m holds out the m-th fold of the n shared rows. The folds depend only on the key, n and
    V = `held_out`.
    """
    order = jax.random.permutation(key, n)
    rolled = jnp.stack([jnp.roll(order, -m * held_out) for m in range(members)])
    extra = n + jnp.arange(members * member_rows).reshape(members, member_rows)
    return jnp.concatenate([rolled[:, held_out:], extra], axis=1), rolled[:, :held_out]

"""The classifier of `c2st`, compiled by JAX.

Public name: `CompiledMLP`.

The network, the optimiser and the stopping rule are the same as in `SklearnMLP`. Initial weights
and the order of the batches use the same random numbers as scikit-learn, so that results differ
only by rounding errors. Every fold of every pair of sets runs the same program. On a CPU, each fold
trains in a separate thread. On an accelerator, all folds with equally many rows train together
under `vmap` until the last fold stops.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.diagnostics.c2st_data import LabelledRows

BATCH_SIZE = 200
LEARNING_RATE = 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Decay rates and epsilon of Adam (Kingma & Ba 2015, arXiv:1412.6980)."""

L2_PENALTY = 1e-4
TOLERANCE, PATIENCE_EPOCHS = 1e-4, 10
MAX_EPOCHS = 10_000

_Weights = list[tuple[Array, Array]]
"""Kernel and bias of each layer."""


class _State(NamedTuple):
    """Training state: weights, Adam's first and second moments, number of steps."""

    weights: _Weights
    first: _Weights
    second: _Weights
    steps: Array


class _FoldRows(NamedTuple):
    """Training rows and labels, and test rows and labels, of one fold."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array


@dataclasses.dataclass(frozen=True)
class CompiledMLP:
    """The multilayer perceptron of `SklearnMLP`, trained by a compiled JAX program.

    Accuracies agree with those of `SklearnMLP` to about 0.01: rounding errors grow over hundreds
    of training steps.
    """

    def accuracies(self, pairs: Sequence[LabelledRows], seed: int) -> np.ndarray:
        """Cross-validate on each pair of sets; return the accuracies, shape (pairs, folds)."""
        rows = [part for pair in pairs for part in _fold_rows(pair)]
        width = 10 * rows[0].x.shape[1]
        train = _train_on_threads if _on_cpu() else _train_under_vmap
        return np.asarray(train(rows, width, seed), float).reshape(len(pairs), -1)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _fold_rows(pair: LabelledRows) -> list[_FoldRows]:
    """Return training and test rows of each fold of a pair."""
    y = pair.y.astype(np.float32)
    arrays = [(pair.x[a], y[a], pair.x[b], y[b]) for a, b in pair.folds]
    return [_FoldRows(*map(jnp.asarray, fold)) for fold in arrays]


def _train_on_threads(rows: list[_FoldRows], width: int, seed: int) -> list[float]:
    """Train each fold in a thread; return the accuracy in each fold."""
    # Compile once per size before the threads start; otherwise every thread would compile.
    by_size = {len(fold.x): fold for fold in rows}
    for size, fold in by_size.items():
        run = _Run(size, fold.x.shape[1], width, seed)
        jax.block_until_ready(_epoch(run.state, fold.x, fold.y, *run.next_batches()))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda fold: _train_one(fold, width, seed), rows))


def _train_one(fold: _FoldRows, width: int, seed: int) -> float:
    """Train until the loss stops falling; return the accuracy on the test rows."""
    run = _Run(len(fold.x), fold.x.shape[1], width, seed)
    state, best_loss, stale_epochs = run.state, np.inf, 0
    while stale_epochs <= PATIENCE_EPOCHS and run.epochs < MAX_EPOCHS:
        state, loss = _epoch(state, fold.x, fold.y, *run.next_batches())
        best_loss, stale_epochs = _updated_patience(float(loss), best_loss, stale_epochs)
    return float(_accuracy(state.weights, fold.x_test, fold.y_test))


def _train_under_vmap(rows: list[_FoldRows], width: int, seed: int) -> list[float]:
    """Train folds with equally many rows together; return the accuracy in each fold."""
    scores = np.zeros(len(rows))
    for size in sorted({len(fold.x) for fold in rows}):
        same_size = [i for i, fold in enumerate(rows) if len(fold.x) == size]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(rows[i] for i in same_size))
        run = _Run(size, stacked.x.shape[2], width, seed)
        scores[same_size] = _train_together(stacked, run)
    return list(scores)


def _train_together(folds: _FoldRows, run: _Run) -> Array:
    """Train F folds that are stacked on a leading axis; return their accuracies, shape (F,).

    All folds run until the last fold stops. Each fold keeps its weights from the epoch in which it
    met the stopping rule.
    """
    count = len(folds.x)
    state = jax.tree.map(lambda a: jnp.stack([a] * count), run.state)
    best_loss, stale_epochs = np.full(count, np.inf), np.zeros(count, int)
    final_weights = state.weights
    while np.any(running := stale_epochs <= PATIENCE_EPOCHS) and run.epochs < MAX_EPOCHS:
        state, loss = _epochs(state, folds.x, folds.y, *run.next_batches())
        final_weights = _select(jnp.asarray(running), state.weights, final_weights)
        best_loss, updated = _updated_patience(np.asarray(loss), best_loss, stale_epochs)
        stale_epochs = np.where(running, updated, stale_epochs)
    return _accuracies(final_weights, folds.x_test, folds.y_test)


def _updated_patience(loss: Any, best_loss: Any, stale_epochs: Any) -> tuple[Any, Any]:
    """Update the lowest loss, and the number of epochs since the loss last fell by `TOLERANCE`.

    All arguments are numbers, or arrays with one number per fold.
    """
    stale_epochs = np.where(loss > best_loss - TOLERANCE, stale_epochs + 1, 0)
    return np.minimum(loss, best_loss), stale_epochs


class _Run:
    """Initial weights and batch order of one training, with the random numbers of scikit-learn.

    Attributes:
        state: Initial state.
        epochs: Number of epochs whose batches have been drawn.
    """

    def __init__(self, rows: int, dim: int, width: int, seed: int) -> None:
        self._rng = np.random.RandomState(seed)
        sizes = (dim, width, width, 1)
        weights = [self._initial_layer(a, b) for a, b in itertools.pairwise(sizes)]
        zeros = jax.tree.map(jnp.zeros_like, weights)
        self.state = _State(weights, zeros, zeros, jnp.zeros((), jnp.int32))
        self.epochs, self._order = 0, np.arange(rows)
        self._batch_size = min(BATCH_SIZE, rows)
        self._steps = -(-rows // self._batch_size)
        self._row_weights = np.zeros(self._steps * self._batch_size, np.float32)
        self._row_weights[:rows] = 1.0

    def next_batches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return row numbers and row weights of the next epoch, shape (steps, batch size).

        The last batch is filled up with rows of weight 0.
        """
        self.epochs += 1
        permutation = np.arange(len(self._order))
        self._rng.shuffle(permutation)
        self._order = self._order[permutation]
        rows = np.resize(self._order, len(self._row_weights))
        shape = (self._steps, self._batch_size)
        return rows.reshape(shape), self._row_weights.reshape(shape)

    def _initial_layer(self, fan_in: int, fan_out: int) -> tuple[Array, Array]:
        bound = np.sqrt(6.0 / (fan_in + fan_out))
        shapes = ((fan_in, fan_out), (fan_out,))
        draws = [self._rng.uniform(-bound, bound, s).astype(np.float32) for s in shapes]
        return jnp.asarray(draws[0]), jnp.asarray(draws[1])


@full_precision
def _train_epoch(
    state: _State, x: Array, y: Array, rows: Array, weight: Array
) -> tuple[_State, Array]:
    """Run one epoch; return the new state and the mean loss per row."""

    def step(state: _State, batch: tuple[Array, Array]) -> tuple[_State, Array]:
        r, w = batch
        loss, gradient = jax.value_and_grad(_loss)(state.weights, x[r], y[r], w)
        return _adam_step(state, gradient), loss * jnp.sum(w)

    state, losses = jax.lax.scan(step, state, (rows, weight))
    return state, jnp.sum(losses) / jnp.sum(weight)


def _adam_step(state: _State, gradient: _Weights) -> _State:
    """Return the state after one Adam step in scikit-learn's form.

    scikit-learn adds epsilon before the bias correction, optax after it. With optax, weights with
    tiny gradients would differ from those of scikit-learn by 0.01 after four epochs.
    """
    steps = state.steps + 1
    a, b = BETAS
    first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, state.first, gradient)
    second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, state.second, gradient)
    rate = LEARNING_RATE * jnp.sqrt(1 - b**steps) / (1 - a**steps)
    weights = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + EPSILON), state.weights, first, second
    )
    return _State(weights, first, second, steps)


def _loss(weights: _Weights, x: Array, y: Array, weight: Array) -> Array:
    """Return the weighted mean binary cross-entropy plus the L2 penalty per row."""
    logits = _logits(weights, x)
    count = jnp.sum(weight)
    penalty = 0.5 * L2_PENALTY * sum(jnp.sum(kernel**2) for kernel, _ in weights)
    return (jnp.sum(weight * (jax.nn.softplus(logits) - y * logits)) + penalty) / count


def _logits(weights: _Weights, x: Array) -> Array:
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    kernel, bias = weights[-1]
    return (x @ kernel + bias[None])[:, 0]


@full_precision
def _score(weights: _Weights, x: Array, y: Array) -> Array:
    return jnp.mean((_logits(weights, x) > 0) == (y > 0.5))


_epoch, _accuracy = jax.jit(_train_epoch), jax.jit(_score)
_epochs = jax.jit(jax.vmap(_train_epoch, in_axes=(0, 0, 0, None, None)))
_accuracies = jax.jit(jax.vmap(_score))


@jax.jit
def _select(is_running: Array, new: _Weights, old: _Weights) -> _Weights:
    """Return the new weights of folds that still run, and the old weights of the others."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.reshape(is_running, (-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)

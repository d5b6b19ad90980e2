"""The classifier two-sample test of `c2st`, compiled: the same network, steps and stopping.

Public name: `c2st_jax`.

Folds, initial weights and the order of the batches are those of scikit-learn, from the same random
numbers; only rounding differs. Every fold of every pair of sets trains the same program: on a CPU
as many at once as there are cores, each on a thread and stopped by itself; on an accelerator side
by side under `vmap`, until the last has stopped.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.diagnostics.c2st import checked_sets, standardised_rows

BATCH = 200
RATE, DECAYS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
PENALTY = 1e-4
TOLERANCE, PATIENCE = 1e-4, 10
MAX_EPOCHS = 10_000


class _Net(NamedTuple):
    """Weights, Adam's moments and the number of steps so far."""

    weights: Any
    first: Any
    second: Any
    steps: Array


class _Fold(NamedTuple):
    """Rows to train on, and rows to score on."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array


def c2st_jax(reference: Any, samples: Any, *, folds: int = 5, seed: int = 1) -> Any:
    """Accuracy of `c2st`, for one pair of sets or for many, without scikit-learn's overhead.

    Args:
        reference: Draws of the reference posterior, shape (N, D), or (B, N, D) for B pairs.
        samples: Draws to judge, shape (M, D) or (B, M, D), in the same units.
        folds: Number of folds of the cross-validation.
        seed: Seed of the folds, of the initial weights and of the order of the batches.

    Returns:
        The mean accuracy over the folds, a float; shape (B,) for B pairs.

    Raises:
        ValueError: As `c2st`; or the two hold different numbers of pairs.

    References:
        Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653. Kingma &
        Ba 2015, Adam, arXiv:1412.6980.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(3, 80, 1))
        >>> c2st_jax(draws[:, :40], draws[:, 40:] + 10.0)
        array([1., 1., 1.])
    """
    single = np.ndim(reference) == np.ndim(samples) == 2
    pairs = [(reference, samples)] if single else _pairs(reference, samples)
    work = [fold for pair in pairs for fold in _folds(*checked_sets(*pair, folds), folds, seed)]
    width = 10 * work[0].x.shape[1]
    scores = _on_threads(work, width, seed) if _on_cpu() else _side_by_side(work, width, seed)
    means = np.asarray(scores, float).reshape(len(pairs), folds).mean(axis=1)
    return float(means[0]) if single else means


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _pairs(reference: Any, samples: Any) -> list[tuple[Any, Any]]:
    shapes = np.shape(reference), np.shape(samples)
    if (
        not len(shapes[0]) == len(shapes[1]) == 3
        or shapes[0][0] != shapes[1][0]
        or not shapes[0][0]
    ):
        raise ValueError(
            "reference and samples: expected (N, D) and (M, D), or (B, N, D) and (B, M, D), got "
            f"{shapes[0]} and {shapes[1]}"
        )
    return list(zip(reference, samples, strict=True))


def _folds(reference: np.ndarray, samples: np.ndarray, folds: int, seed: int) -> Iterator[_Fold]:
    """Training and test rows of each fold."""
    from sklearn.model_selection import KFold

    x = standardised_rows(reference, samples)
    y = np.repeat(np.array([0, 1], np.float32), [len(reference), len(samples)])
    for train, test in KFold(n_splits=folds, shuffle=True, random_state=seed).split(x):
        yield _Fold(*map(jnp.asarray, (x[train], y[train], x[test], y[test])))


def _on_threads(work: list[_Fold], width: int, seed: int) -> list[float]:
    def train(fold: _Fold) -> float:
        run = _Run(len(fold.x), fold.x.shape[1], width, seed)
        net, best, stale = run.net, np.inf, 0
        while stale <= PATIENCE and run.epochs < MAX_EPOCHS:
            net, loss = _epoch(net, fold.x, fold.y, *run.order())
            best, stale = _improved(float(loss), best, stale)
        return float(_accuracy(net.weights, fold.x_test, fold.y_test))

    # compiled before the threads share it: each would do so, had nobody done it
    for size in {len(fold.x) for fold in work}:
        fold = next(fold for fold in work if len(fold.x) == size)
        run = _Run(size, fold.x.shape[1], width, seed)
        jax.block_until_ready(_epoch(run.net, fold.x, fold.y, *run.order()))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(train, work))


def _side_by_side(work: list[_Fold], width: int, seed: int) -> list[float]:
    """One program for all folds of the same size; those that have stopped are computed along."""
    scores = np.zeros(len(work))
    for size in sorted({len(fold.x) for fold in work}):
        chosen = [i for i, fold in enumerate(work) if len(fold.x) == size]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(work[i] for i in chosen))
        run = _Run(size, stacked.x.shape[2], width, seed)
        scores[chosen] = _train_together(stacked, run)
    return list(scores)


def _train_together(folds: _Fold, run: _Run) -> Array:
    """Accuracies (F,) of folds that are stacked on a leading axis."""
    count = len(folds.x)
    net = jax.tree.map(lambda a: jnp.stack([a] * count), run.net)
    best, stale, kept = np.full(count, np.inf), np.zeros(count, int), net.weights
    while np.any(running := stale <= PATIENCE) and run.epochs < MAX_EPOCHS:
        net, loss = _epochs(net, folds.x, folds.y, *run.order())
        kept = _keep(jnp.asarray(running), net.weights, kept)
        best, count_now = _improved(np.asarray(loss), best, stale)
        stale = np.where(running, count_now, stale)
    return _accuracies(kept, folds.x_test, folds.y_test)


def _improved(loss: Any, best: Any, stale: Any) -> tuple[Any, Any]:
    """The best loss, and for how many epochs it has not fallen by the tolerance."""
    return np.minimum(loss, best), np.where(loss > best - TOLERANCE, stale + 1, 0)


class _Run:
    """Initial network and order of the batches of one training, from scikit-learn's numbers."""

    def __init__(self, rows: int, dim: int, width: int, seed: int) -> None:
        self._rng = np.random.RandomState(seed)
        sizes = (dim, width, width, 1)
        weights = [self._layer(a, b) for a, b in itertools.pairwise(sizes)]
        zeros = jax.tree.map(jnp.zeros_like, weights)
        self.net = _Net(weights, zeros, zeros, jnp.zeros((), jnp.int32))
        self.epochs, self._rows = 0, np.arange(rows)
        self._batch = min(BATCH, rows)
        self._steps = -(-rows // self._batch)
        self._weight = np.zeros(self._steps * self._batch, np.float32)
        self._weight[:rows] = 1.0

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and weights of the next epoch, (steps, batch); the last may be short."""
        self.epochs += 1
        places = np.arange(len(self._rows))
        self._rng.shuffle(places)
        self._rows = self._rows[places]
        rows = np.resize(self._rows, len(self._weight))
        shape = (self._steps, self._batch)
        return rows.reshape(shape), self._weight.reshape(shape)

    def _layer(self, fan_in: int, fan_out: int) -> tuple[Array, Array]:
        bound = np.sqrt(6.0 / (fan_in + fan_out))
        shapes = ((fan_in, fan_out), (fan_out,))
        draws = [self._rng.uniform(-bound, bound, s).astype(np.float32) for s in shapes]
        return jnp.asarray(draws[0]), jnp.asarray(draws[1])


@full_precision
def _train_epoch(net: _Net, x: Array, y: Array, rows: Array, weight: Array) -> tuple[_Net, Array]:
    """One pass over the batches; the mean loss of a row."""

    def step(net: _Net, batch: tuple[Array, Array]) -> tuple[_Net, Array]:
        r, w = batch
        loss, gradient = jax.value_and_grad(_loss)(net.weights, x[r], y[r], w)
        # not optax's Adam: scikit-learn adds epsilon before it corrects the bias, and weights of
        # nearly no gradient part by a hundredth within four epochs
        steps = net.steps + 1
        a, b = DECAYS
        first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, net.first, gradient)
        second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, net.second, gradient)
        rate = RATE * jnp.sqrt(1 - b**steps) / (1 - a**steps)
        weights = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) + EPSILON), net.weights, first, second
        )
        return _Net(weights, first, second, steps), loss * jnp.sum(w)

    net, losses = jax.lax.scan(step, net, (rows, weight))
    return net, jnp.sum(losses) / jnp.sum(weight)


def _loss(weights: Any, x: Array, y: Array, weight: Array) -> Array:
    """Binary cross-entropy of the rows of this weight, and the penalty on their number."""
    logits = _logits(weights, x)
    count = jnp.sum(weight)
    penalty = 0.5 * PENALTY * sum(jnp.sum(kernel**2) for kernel, _ in weights)
    return (jnp.sum(weight * (jax.nn.softplus(logits) - y * logits)) + penalty) / count


def _logits(weights: Any, x: Array) -> Array:
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    kernel, bias = weights[-1]
    return (x @ kernel + bias[None])[:, 0]


@full_precision
def _score(weights: Any, x: Array, y: Array) -> Array:
    return jnp.mean((_logits(weights, x) > 0) == (y > 0.5))


_epoch, _accuracy = jax.jit(_train_epoch), jax.jit(_score)
_epochs = jax.jit(jax.vmap(_train_epoch, in_axes=(0, 0, 0, None, None)))
_accuracies = jax.jit(jax.vmap(_score))


@jax.jit
def _keep(running: Array, new: Any, old: Any) -> Any:
    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.reshape(running, (-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)

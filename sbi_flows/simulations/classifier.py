"""A small binary classifier with calibrated probabilities.

The rows are divided into folds for cross-validation. Each network is trained on the rows outside
one fold, which is held out. Training starts at a logistic regression. The held-out fold has two
halves. The loss on one half decides when training stops. The network is then tested on the other
half.

Public names: `Network`, `Classifier`, `fit_classifier`, `mean_probability`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.special import logit

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key

MAX_ROWS = 50_000
"""Maximum number of rows for training and test; further rows are ignored."""

FOLDS, WIDTH, NEWTON_STEPS = 5, 32, 20
EPOCHS, EPOCH_STEPS, BATCH_SIZE, LEARNING_RATE = 20, 50, 512, 5e-3


class Network(NamedTuple):
    """Logistic regression on the inputs y, their squares, and the last hidden layer of a small MLP.

    Attributes:
        matrices: Weights of the hidden layers.
        biases: Biases of the hidden layers.
        coefficients: Coefficients of the regression.
        intercept: Intercept of the regression.
    """

    matrices: list[Array]
    biases: list[Array]
    coefficients: Array
    intercept: Array


class Classifier(NamedTuple):
    """Networks fitted by cross-validation, and their predictions for held-out rows.

    K is the number of folds; each fold holds out two halves of r rows.

    Attributes:
        networks: All 2 K networks, two for each fold, stacked on one leading axis.
        p: Predicted probability that the label of a held-out row is 1, shape (K, 2, r). A
            row is predicted by a network for which it was used neither in training nor to stop.
        constant: Fraction of ones in the training rows of each fold, shape (K, 1, 1).
        labels: Labels of the held-out rows, 0 or 1, shape (K, 2, r).
    """

    networks: Network
    p: np.ndarray
    constant: np.ndarray
    labels: np.ndarray


def fit_classifier(key: Key, y: np.ndarray, labels: np.ndarray) -> Classifier:
    """Fit the probability that a label is 1, as a function of y.

    Args:
        key: Random key.
        y: Inputs, scaled to unit standard deviation, shape (N, d).
        labels: Labels 0 or 1, shape (N,). Both labels must occur.
    """
    order_key, fit_key, batch_key = jax.random.split(key, 3)
    rows = _stratified_blocks(order_key, labels)
    train, held_out = _split_folds(y[rows], labels[rows].astype(y.dtype))
    shape = (FOLDS, EPOCHS, EPOCH_STEPS, BATCH_SIZE)
    batches = jax.random.randint(batch_key, shape, 0, train[1].shape[1])
    networks = _fit(jax.random.split(fit_key, FOLDS), train, held_out, batches)
    # predict each half with the network whose training was stopped by the other half
    p = _predict_halves(jax.tree.map(lambda leaf: leaf[:, ::-1], networks), held_out[0])
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), networks)
    constant = train[1].mean(axis=1, dtype=float)[:, None, None]
    return Classifier(flat, np.asarray(p, float), constant, held_out[1])


def _stratified_blocks(key: Key, labels: np.ndarray) -> np.ndarray:
    """Divide rows into blocks at random, with nearly the same fraction of zeros in each block.

    Returns:
        Row indices, shape (2 K, r): 2 K blocks of r rows.
    """
    count = min(len(labels), MAX_ROWS) // (2 * FOLDS)
    order = np.asarray(jax.random.permutation(key, len(labels)))[: count * 2 * FOLDS]
    order = order[np.argsort(labels[order], kind="stable")]
    return order.reshape(count, 2 * FOLDS).T


def _split_folds(y: np.ndarray, labels: np.ndarray) -> tuple[tuple, tuple]:
    """Split 2 K blocks into training rows and held-out rows for each of K folds.

    Each fold holds out two blocks, and trains on the n rows of all other blocks.

    Args:
        y: Inputs, shape (2 K, r, d).
        labels: Labels, shape (2 K, r).

    Returns:
        Inputs (K, n, d) and labels (K, n) for training, and held-out inputs (K, 2, r, d) and labels
        (K, 2, r).
    """
    held_blocks = np.arange(2 * FOLDS).reshape(FOLDS, 2)
    train_blocks = np.array([np.setdiff1d(held_blocks, pair) for pair in held_blocks])

    def split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a[train_blocks].reshape(FOLDS, -1, *a.shape[2:]), a[held_blocks]

    (train_y, held_y), (train_labels, held_labels) = split(y), split(labels)
    return (train_y, train_labels), (held_y, held_labels)


def _logits(network: Network, y: Array) -> Array:
    """Compute the log odds (N,) of label 1."""
    hidden = y
    for matrix, bias in zip(network.matrices, network.biases, strict=True):
        hidden = jnp.tanh(hidden @ matrix + bias[None])
    features = jnp.concatenate([y, y**2, hidden], axis=1)
    return features @ network.coefficients + network.intercept


def _loss(network: Network, y: Array, labels: Array) -> Array:
    """Compute the mean binary cross-entropy."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(_logits(network, y), labels))


def _constant_network(key: Key, dim: int, p: Array) -> Network:
    """Return a network that predicts probability p for all inputs."""
    widths = (dim, WIDTH, WIDTH)
    matrices = [
        jax.random.normal(k, (a, b), p.dtype) / a**0.5
        for k, a, b in zip(jax.random.split(key), widths, widths[1:], strict=False)
    ]
    biases = [jnp.zeros(WIDTH, p.dtype) for _ in matrices]
    return Network(matrices, biases, jnp.zeros(2 * dim + WIDTH, p.dtype), logit(p))


def _start_at_regression(network: Network, y: Array, labels: Array) -> Network:
    """Set coefficients and intercept by ridge logistic regression, fitted with Newton's method."""
    rows = jnp.concatenate([y, y**2, jnp.ones((len(y), 1), y.dtype)], axis=1)
    ridge = jnp.ones(rows.shape[1], y.dtype).at[-1].set(0.0)

    def newton(weights: Array, _: None) -> tuple[Array, None]:
        p = jax.nn.sigmoid(rows @ weights)
        gradient = rows.T @ (p - labels) + ridge * weights
        hessian = (rows * (p * (1.0 - p))[:, None]).T @ rows + jnp.diag(ridge + 1e-4)
        return weights - jnp.linalg.solve(hessian, gradient), None

    start = jnp.zeros(rows.shape[1], y.dtype).at[-1].set(network.intercept)
    weights = jax.lax.scan(newton, start, length=NEWTON_STEPS)[0]
    coefficients = network.coefficients.at[: rows.shape[1] - 1].set(weights[:-1])
    regression = network._replace(coefficients=coefficients, intercept=weights[-1])
    # Newton's method may diverge if zeros are rare, or if a plane separates zeros from ones
    is_better = _loss(regression, y, labels) < _loss(network, y, labels)
    return jax.tree.map(partial(jnp.where, is_better), regression, network)


@jax.jit
@full_precision
def _fit(
    keys: Key, train: tuple[Array, Array], held_out: tuple[Array, Array], batches: Array
) -> Network:
    """Fit networks (K, 2), one for each half of each fold; the half decides when to stop."""
    return jax.vmap(_fit_fold)(keys, train, held_out, batches)


def _fit_fold(
    key: Key, train: tuple[Array, Array], held_out: tuple[Array, Array], batches: Array
) -> Network:
    """Fit the two networks (2,) of one fold."""
    y, labels = train
    constant = _constant_network(key, y.shape[1], jnp.mean(labels))
    network = _start_at_regression(constant, y, labels)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * EPOCH_STEPS)
    optimiser = optax.adamw(schedule, weight_decay=1e-3)

    def step(state: tuple, rows: Array) -> tuple:
        network, moments = state
        gradient = jax.grad(_loss)(network, y[rows], labels[rows])
        updates, moments = optimiser.update(gradient, moments, network)
        return (optax.apply_updates(network, updates), moments), None

    def epoch(state: tuple, batches: Array) -> tuple:
        (network, moments), best = state
        best = _keep_best(best, network, held_out)
        return (jax.lax.scan(step, (network, moments), batches)[0], best), None

    losses = jnp.full(2, jnp.inf, y.dtype)
    best = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), constant), losses
    state = (network, optimiser.init(network)), _keep_best(best, constant, held_out)
    ((network, _), best), _ = jax.lax.scan(epoch, state, batches)
    return _keep_best(best, network, held_out)[0]


def _keep_best(
    best: tuple[Network, Array], network: Network, held_out: tuple[Array, Array]
) -> tuple[Network, Array]:
    """Keep, for each held-out half, the network with the smallest loss on this half.

    Returns:
        The best networks (2,) so far, and their losses (2,).
    """
    networks, best_losses = best
    losses = jax.vmap(partial(_loss, network))(*held_out)
    is_better = losses < best_losses

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(is_better.reshape(-1, *(1,) * new.ndim), new[None], old)

    return jax.tree.map(keep, network, networks), jnp.minimum(losses, best_losses)


@jax.jit
@full_precision
def _predict_halves(networks: Network, y: Array) -> Array:
    """Predict probabilities (K, 2, r) for inputs (K, 2, r, d) with networks (K, 2)."""
    return jax.nn.sigmoid(jax.vmap(jax.vmap(_logits))(networks, y))


@jax.jit
@full_precision
def mean_probability(networks: Network, y: Array) -> Array:
    """Return the mean of the probabilities that all networks predict, shape (N,)."""
    p = jax.lax.map(lambda network: jax.nn.sigmoid(_logits(network, y)), networks)
    return jnp.mean(p, axis=0)

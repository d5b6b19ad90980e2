"""A small classifier of what happened, with probabilities that are meant as such.

Public names: `Net`, `Fitted`, `fit_classifier`, `mean_probability`.

Networks are trained by cross-validation, each without a fold of the rows, from logistic regression
on. Each fold has two halves: a network that was stopped by one of them is judged by the other.
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

ROWS = 50_000
"""Rows that are used, at most."""

FOLDS, WIDTH, NEWTON = 5, 32, 20
ROUNDS, STEPS, BATCH, RATE = 20, 50, 512, 5e-3


class Net(NamedTuple):
    """Logistic regression on coordinates, their squares and what a small network makes of them."""

    matrices: list[Array]
    biases: list[Array]
    out: Array
    level: Array


class Fitted(NamedTuple):
    """What `fit_classifier` gives.

    Attributes:
        nets: The networks, two for each of K folds, stacked on one leading axis.
        p: Probabilities of held-out rows (K, 2, r), by networks that have not seen them.
        constant: The share of ones in the other folds, shape (K, 1, 1).
        v: What these rows are, 0 or 1, shape (K, 2, r).
    """

    nets: Net
    p: np.ndarray
    constant: np.ndarray
    v: np.ndarray


def fit_classifier(key: Key, y: np.ndarray, v: np.ndarray) -> Fitted:
    """Fit probabilities of v (N,), some zeros and some ones, given y (N, d) of unit scale."""
    order_key, fit_key, batch_key = jax.random.split(key, 3)
    chosen = _in_blocks(order_key, v)
    train, held = _folds(y[chosen], v[chosen].astype(y.dtype))
    shape = (FOLDS, ROUNDS, STEPS, BATCH)
    batches = jax.random.randint(batch_key, shape, 0, train[1].shape[1])
    nets = _fit(jax.random.split(fit_key, FOLDS), train, held, batches)
    # each half by the network that was stopped by the other one
    p = _halves(jax.tree.map(lambda leaf: leaf[:, ::-1], nets), held[0])
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), nets)
    constant = train[1].mean(axis=1, dtype=float)[:, None, None]
    return Fitted(flat, np.asarray(p, float), constant, held[1])


def _in_blocks(key: Key, v: np.ndarray) -> np.ndarray:
    """Numbers of rows (blocks, r) in random order, each block with its share of zeros.

    There are two blocks a fold.
    """
    count = min(len(v), ROWS) // (2 * FOLDS)
    order = np.asarray(jax.random.permutation(key, len(v)))[: count * 2 * FOLDS]
    order = order[np.argsort(v[order], kind="stable")]
    return order.reshape(count, 2 * FOLDS).T


def _folds(y: np.ndarray, v: np.ndarray) -> tuple[tuple, tuple]:
    """Of blocks (2 K, r, d) and (2 K, r): rows to train on (K, n, d), and to hold (K, 2, r, d)."""
    own = np.arange(2 * FOLDS).reshape(FOLDS, 2)
    others = np.array([np.setdiff1d(own, pair) for pair in own])

    def split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a[others].reshape(FOLDS, -1, *a.shape[2:]), a[own]

    (train_y, held_y), (train_v, held_v) = split(y), split(v)
    return (train_y, train_v), (held_y, held_v)


def _logits(net: Net, y: Array) -> Array:
    """Log odds (N,) of a one."""
    hidden = y
    for matrix, bias in zip(net.matrices, net.biases, strict=True):
        hidden = jnp.tanh(hidden @ matrix + bias[None])
    return jnp.concatenate([y, y**2, hidden], axis=1) @ net.out + net.level


def _loss(net: Net, y: Array, v: Array) -> Array:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(_logits(net, y), v))


def _constant(key: Key, dim: int, share: Array) -> Net:
    """A network that says the share everywhere."""
    widths = (dim, WIDTH, WIDTH)
    matrices = [
        jax.random.normal(k, (a, b), share.dtype) / a**0.5
        for k, a, b in zip(jax.random.split(key), widths, widths[1:], strict=False)
    ]
    biases = [jnp.zeros(WIDTH, share.dtype) for _ in matrices]
    return Net(matrices, biases, jnp.zeros(2 * dim + WIDTH, share.dtype), logit(share))


def _regressed(net: Net, y: Array, v: Array) -> Net:
    """The network with logistic regression for a start, by Newton's method and a ridge."""
    rows = jnp.concatenate([y, y**2, jnp.ones((len(y), 1), y.dtype)], axis=1)
    ridge = jnp.ones(rows.shape[1], y.dtype).at[-1].set(0.0)

    def newton(weights: Array, _: None) -> tuple[Array, None]:
        p = jax.nn.sigmoid(rows @ weights)
        slope = rows.T @ (p - v) + ridge * weights
        curve = (rows * (p * (1.0 - p))[:, None]).T @ rows + jnp.diag(ridge + 1e-4)
        return weights - jnp.linalg.solve(curve, slope), None

    start = jnp.zeros(rows.shape[1], y.dtype).at[-1].set(net.level)
    weights = jax.lax.scan(newton, start, length=NEWTON)[0]
    out = net.out.at[: rows.shape[1] - 1].set(weights[:-1])
    found = net._replace(out=out, level=weights[-1])
    # the method may go astray where zeros are rare, or parted from ones by a line
    better = _loss(found, y, v) < _loss(net, y, v)
    return jax.tree.map(partial(jnp.where, better), found, net)


@jax.jit
@full_precision
def _fit(keys: Key, train: tuple[Array, Array], held: tuple[Array, Array], batches: Array) -> Net:
    """Networks (K, 2) of each fold, stopped by one half of its held-out rows and by the other."""
    return jax.vmap(_fit_fold)(keys, train, held, batches)


def _fit_fold(
    key: Key, train: tuple[Array, Array], held: tuple[Array, Array], batches: Array
) -> Net:
    y, v = train
    constant = _constant(key, y.shape[1], jnp.mean(v))
    net = _regressed(constant, y, v)
    optimiser = optax.adamw(optax.cosine_decay_schedule(RATE, ROUNDS * STEPS), weight_decay=1e-3)

    def step(state: tuple, rows: Array) -> tuple:
        net, moments = state
        updates, moments = optimiser.update(jax.grad(_loss)(net, y[rows], v[rows]), moments, net)
        return (optax.apply_updates(net, updates), moments), None

    def several(state: tuple, batches: Array) -> tuple:
        (net, moments), best = state
        best = _better(best, net, held)
        return (jax.lax.scan(step, (net, moments), batches)[0], best), None

    least = jnp.full(2, jnp.inf, y.dtype)
    best = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), constant), least
    state = (net, optimiser.init(net)), _better(best, constant, held)
    ((net, _), best), _ = jax.lax.scan(several, state, batches)
    return _better(best, net, held)[0]


def _better(best: tuple[Net, Array], net: Net, held: tuple[Array, Array]) -> tuple[Net, Array]:
    """Networks (2) with the least loss of each half of the held-out rows, and these losses (2)."""
    nets, least = best
    found = jax.vmap(partial(_loss, net))(*held)
    less = found < least

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(less.reshape(-1, *(1,) * new.ndim), new[None], old)

    return jax.tree.map(keep, net, nets), jnp.minimum(found, least)


@jax.jit
@full_precision
def _halves(nets: Net, y: Array) -> Array:
    """Probabilities (K, 2, r) of rows (K, 2, r, d), each by the network in its place."""
    return jax.nn.sigmoid(jax.vmap(jax.vmap(_logits))(nets, y))


@jax.jit
@full_precision
def mean_probability(nets: Net, y: Array) -> Array:
    """The mean (N,) over all networks."""
    return jnp.mean(jax.lax.map(lambda net: jax.nn.sigmoid(_logits(net, y)), nets), axis=0)

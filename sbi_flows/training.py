"""Training: all members of an ensemble side by side, one compiled program an epoch.

Public names: `Training` (settings), `History` (what happened), `fit` (the loop).
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.checks import require_count, require_positive
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of, initial_weights
from sbi_flows.densities.start import fit_linear_start
from sbi_flows.errors import TrainingDiverged
from sbi_flows.networks.mlp import fast_key
from sbi_flows.typing import Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a fit.

    Attributes:
        batch_size: Rows a step.
        max_epochs: Passes over the training rows; also the length of the cosine schedule.
        patience: Epochs without a better validation loss after which a member has stopped; the
            fit ends when all have.
        validation_fraction: Fraction of the rows that each member holds out, in turn: the folds of
            several members do not overlap as long as there are enough rows.
        optimizer: Any optax optimiser, used as it is; by default AdamW with `learning_rate`, a
            warm-up over the first hundredth of the steps and a cosine decay.
        learning_rate: Peak learning rate of the default optimiser.
        weight_decay: Weight decay of the default optimiser.
        clip_norm: Largest norm of a gradient.
        ema_decay: Decay of the exponential moving average of the weights, which is what is
            validated and kept; None keeps the weights themselves.

    Raises:
        ValueError: A setting is out of range.
    """

    batch_size: int = 128
    max_epochs: int = 50
    patience: int = 12
    validation_fraction: float = 0.1
    optimizer: optax.GradientTransformation | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    clip_norm: float = 5.0
    ema_decay: float | None = 0.99

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        require_count(1, batch_size=self.batch_size, max_epochs=self.max_epochs)
        require_positive(patience=self.patience, clip_norm=self.clip_norm)
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay: expected zero or a positive number, got {self.weight_decay}"
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction: expected a number in (0, 1), got {self.validation_fraction}"
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected None or [0, 1), got {self.ema_decay}")
        if self.optimizer is not None and not hasattr(self.optimizer, "update"):
            raise ValueError(
                f"optimizer: expected one of optax, got {type(self.optimizer).__name__}"
            )

    def transform(self, steps: int) -> optax.GradientTransformation:
        """The optimiser for a fit of this many steps, gradient clipping included."""
        optimizer = self.optimizer
        if optimizer is None:
            warm_up = max(1, min(100, steps // 100))
            schedule = optax.warmup_cosine_decay_schedule(
                0.0, self.learning_rate, warm_up, max(steps, warm_up + 1), 0.01 * self.learning_rate
            )
            optimizer = optax.adamw(schedule, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)


@dataclasses.dataclass(frozen=True)
class History:
    """What happened in a fit; losses are negative log densities in nats, in theta's own units.

    Attributes:
        train_loss: Mean over each epoch's batches, shape (epochs, members).
        validation_loss: At the end of each epoch, shape (epochs, members).
        start_loss: Validation loss of the linear-Gaussian start, before epoch 1, shape (members,).
        best_epoch: Epoch (from 1; 0 is the start) whose weights each member kept.
        epochs: Number of epochs run.
        seconds: Wall time of the fit, compilation included.
        stop_reason: `max_epochs`, `patience` or `interrupted`.
    """

    train_loss: np.ndarray
    validation_loss: np.ndarray
    start_loss: np.ndarray
    best_epoch: np.ndarray
    epochs: int
    seconds: float
    stop_reason: str

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the weights that each member kept, shape (members,)."""
        return np.minimum(self.start_loss, self.validation_loss.min(axis=0, initial=np.inf))

    def __repr__(self) -> str:
        """Length, reason of the stop and the losses kept."""
        best = ", ".join(f"{v:.3f}" for v in self.best_loss)
        return (
            f"History({self.epochs} epochs in {self.seconds:.1f} s, stopped by "
            f"{self.stop_reason}; validation loss [{best}])"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the loss curves; see `sbi_flows.plots.loss_curves`."""
        from sbi_flows.plots import loss_curves

        return loss_curves(self, ax=ax)


class _State(NamedTuple):
    """What an epoch overwrites in place."""

    params: Any
    average: Any
    optimiser: Any


class _Best(NamedTuple):
    """What a fit that ends at any moment keeps: no epoch may overwrite it."""

    params: Any
    loss: Array
    age: Array


def fit(
    key: Key,
    blueprint: Blueprint,
    training: Training,
    y: Array,
    features: Array,
    *,
    members: int = 1,
    offset: float = 0.0,
    progress: bool = True,
) -> tuple[Weights, History]:
    """Train `members` models with different initial weights, data orders and validation rows.

    Args:
        key: Random key.
        blueprint: What to build.
        training: Settings.
        y: Parameters in standard coordinates, shape (N, d).
        features: Standardised observations, shape (N, C).
        members: Number of models M.
        offset: Added to reported losses: the mean log Jacobian from y to theta's units.
        progress: Show a progress bar.

    Returns:
        The best weights of each member, and the history.

    Raises:
        ValueError: Too few rows to hold any out.
        TrainingDiverged: A loss was not finite; its `state` holds the best `Weights` so far.
    """
    held_out = _held_out_rows(len(y), training)
    began = time.perf_counter()
    fold_key, weight_key, epoch_key = jax.random.split(key, 3)
    folds = _folds(fold_key, len(y), held_out, members)
    keys = jax.random.split(weight_key, members)
    params, rest, noise, log_det = _initialise(blueprint, keys, y, features, *folds)
    state, best, moved = _start(blueprint, training, params, rest, noise, log_det, features, *folds)
    units = offset - np.asarray(moved)
    start_loss = np.asarray(best.loss) + units
    _require_finite(start_loss, 0, best, rest)
    # weights and losses are replaced as one, so that an interrupt never finds them epochs apart
    done, reason = (best, ()), "max_epochs"
    bar = tqdm(range(training.max_epochs), desc="fit", unit="epoch", disable=not progress)
    try:
        for epoch in bar:
            epoch_keys = jax.random.split(jax.random.fold_in(epoch_key, epoch), members)
            state, best, *means = _epoch(
                blueprint, training, state, best, rest, epoch_keys, noise, features, *folds
            )
            train, validation = (np.asarray(mean) + units for mean in means)
            _require_finite(np.concatenate([train, validation]), epoch + 1, best, rest)
            done = best, (*done[1], (train, validation))
            bar.set_postfix(train=f"{train.mean():.3f}", validation=f"{validation.mean():.3f}")
            if int(np.min(best.age)) >= training.patience:
                reason = "patience"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        bar.close()
    best, losses = done
    history = _history(losses, start_loss, time.perf_counter() - began, reason)
    return Weights(best.params, rest), history


def _held_out_rows(n: int, training: Training) -> int:
    held_out = math.ceil(training.validation_fraction * n)
    if n < 10 or held_out >= n:
        raise ValueError(f"simulations: expected at least 10 valid rows to train on, got {n}")
    return held_out


def _folds(key: Key, n: int, held_out: int, members: int) -> tuple[Array, Array]:
    """Training rows (M, N - V) and validation rows (M, V); member m holds out the m-th fold."""
    order = jax.random.permutation(key, n)
    rolled = jnp.stack([jnp.roll(order, -m * held_out) for m in range(members)])
    return rolled[:, held_out:], rolled[:, :held_out]


@partial(jax.jit, static_argnums=0)
def _initialise(
    blueprint: Blueprint, keys: Key, y: Array, features: Array, train: Array, held_out: Array
) -> tuple[Any, Any, Array, Array]:
    """Weights of all members, and the parameters as each member's start whitens them."""

    def one(key: Key, train: Array, held_out: Array) -> tuple[Any, Any, Array, Array]:
        params, rest = initial_weights(blueprint, key)
        rest = {**rest, "start": fit_linear_start(y, features, train, held_out, bounded)}
        return params, rest, *nnx.merge(graph_of(blueprint), params, rest).whiten(y, features)

    bounded = blueprint.sizes.bounded
    return jax.vmap(one)(keys, train, held_out)


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    blueprint: Blueprint,
    training: Training,
    params: Any,
    rest: Any,
    noise: Array,
    log_det: Array,
    features: Array,
    train: Array,
    held_out: Array,
) -> tuple[_State, _Best, Array]:
    """Where the first epoch begins, and each member's mean log determinant of whitening."""

    def loss(params: Any, rest: Any, noise: Array, rows: Array) -> Array:
        return jnp.mean(_losses(blueprint, params, rest, None, noise[rows], features[rows]))

    optimiser = jax.vmap(training.transform(1).init)(params)
    losses = jax.vmap(loss)(params, rest, noise, held_out)
    moved = jax.vmap(lambda values, rows: jnp.mean(values[rows]))(log_det, held_out)
    best = _Best(params, losses, jnp.zeros(len(losses), int))
    return _State(params, params, optimiser), best, moved


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _epoch(
    blueprint: Blueprint,
    training: Training,
    state: _State,
    best: _Best,
    rest: Any,
    keys: Key,
    noise: Array,
    features: Array,
    train: Array,
    held_out: Array,
) -> tuple[_State, _Best, Array, Array]:
    """One pass over the training rows and one over the validation rows, for all members."""
    one = partial(_member_epoch, blueprint, training, features)
    return jax.vmap(one)(state, best, rest, keys, noise, train, held_out)


def _member_epoch(
    blueprint: Blueprint,
    training: Training,
    features: Array,
    state: _State,
    best: _Best,
    rest: Any,
    key: Key,
    noise: Array,
    train: Array,
    held_out: Array,
) -> tuple[_State, _Best, Array, Array]:
    batch = min(training.batch_size, len(train))
    steps = len(train) // batch
    transform = training.transform(steps * training.max_epochs)
    decay = 0.0 if training.ema_decay is None else training.ema_decay
    order_key, dropout_key = jax.random.split(key)
    rows = jax.random.permutation(order_key, train)[: steps * batch].reshape(steps, batch)

    def loss(params: Any, key: Key, rows: Array) -> Array:
        return jnp.mean(_losses(blueprint, params, rest, key, noise[rows], features[rows]))

    def step(state: _State, inputs: tuple) -> tuple[_State, Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, *inputs)
        updates, optimiser = transform.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, 1.0 - decay)
        return _State(params, average, optimiser), value

    state, values = jax.lax.scan(
        step, state, (jax.random.split(fast_key(dropout_key), steps), rows)
    )
    validation = jnp.mean(
        _losses(blueprint, state.average, rest, None, noise[held_out], features[held_out])
    )
    better = validation < best.loss
    new = _Best(state.average, validation, jnp.zeros_like(best.age))
    old = best._replace(age=best.age + 1)
    return state, jax.tree.map(partial(jnp.where, better), new, old), jnp.mean(values), validation


def _losses(
    blueprint: Blueprint, params: Any, rest: Any, key: Key | None, noise: Array, features: Array
) -> Array:
    return nnx.merge(graph_of(blueprint), params, rest).loss(key, noise, features)


def _require_finite(values: np.ndarray, epoch: int, best: _Best, rest: Any) -> None:
    if not np.all(np.isfinite(values)):
        raise TrainingDiverged(
            f"the loss was not finite in epoch {epoch}; the last finite weights are kept in "
            "`.state`. A smaller learning rate or clip_norm may help",
            epoch=epoch,
            state=Weights(best.params, rest),
        )


def _history(losses: tuple, start_loss: np.ndarray, seconds: float, reason: str) -> History:
    shape = (0, len(start_loss))
    train = np.stack([a for a, _ in losses]) if losses else np.zeros(shape)
    validation = np.stack([b for _, b in losses]) if losses else np.zeros(shape)
    stacked = np.concatenate([start_loss[None], validation])
    return History(
        train_loss=train,
        validation_loss=validation,
        start_loss=start_loss,
        best_epoch=np.argmin(stacked, axis=0),
        epochs=len(losses),
        seconds=seconds,
        stop_reason=reason,
    )

"""Arrays of a group of members in training.

Public names: `Best`, `State`, `LossOffsets`, `Group`, `Source`, `Plan`, `updated`.

Shapes are those of one member; in a group every array has a leading axis of its m members. V is the
number of validation rows, d the number of standard coordinates.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from sbi_flows.densities.conditional import Blueprint
from sbi_flows.training.data import TrainingData
from sbi_flows.training.settings import Training


class Best(NamedTuple):
    """The weights with the lowest validation loss so far.

    Attributes:
        params: The weights, as one vector.
        loss: Mean loss of the validation rows.
        age: Number of epochs since then.
        half_losses: Lowest mean loss so far of the validation rows at even and at odd places,
            shape (2,).
        cross_losses: Loss of each validation row, shape (V,), in the epoch that was best for the
            other half of the validation rows. With two rows or more, no row takes part in the
            choice of the epoch that it is judged by.
    """

    params: Array
    loss: Array
    age: Array
    half_losses: Array
    cross_losses: Array


class State(NamedTuple):
    """Weights, their moving average and the optimiser's state; steps reuse their memory."""

    params: Array
    average: Array
    optimiser: Any


class LossOffsets(NamedTuple):
    """Terms that turn losses into negative log densities in the units of theta.

    Attributes:
        train: Mean over the training rows, shape ().
        validation: Term of each validation row, shape (V,).
    """

    train: Array
    validation: Array


class Group(NamedTuple):
    """Everything that a group of members trains with, except its state.

    Attributes:
        best: The best weights so far.
        rest: Arrays of the model that are not trained.
        whitened: Parameters as the linear start whitens them, which is what the density models:
            those of the training rows, then those of the validation rows, shape (N, d).
        offsets: See `LossOffsets`.
        train_rows: Row numbers of the training rows.
        validation_rows: Row numbers of the validation rows, shape (V,).
        learning_rate: Peak learning rate.
    """

    best: Best
    rest: Any
    whitened: Array
    offsets: LossOffsets
    train_rows: Array
    validation_rows: Array
    learning_rate: Array


class Source(NamedTuple):
    """What all members start from: the rows, and the weights of an embedding given as a module."""

    data: TrainingData
    embedding_weights: Any


class Plan(NamedTuple):
    """The static part of a fit, on which its compiled programs depend."""

    blueprint: Blueprint
    training: Training
    mesh: Mesh | None


def updated(best: Best, params: Array, losses: Array, is_running: Array) -> Best:
    """Return the best weights after an epoch with these losses (V,) of the validation rows."""
    validation = jnp.mean(losses)
    new = (params, validation, jnp.zeros_like(best.age))
    old = (best.params, best.loss, best.age + 1)
    is_better = is_running & (validation < best.loss)
    params, loss, age = jax.tree.map(partial(jnp.where, is_better), new, old)
    # a single row is both halves
    odd = losses[min(1, len(losses) - 1) :: 2]
    half_losses = jnp.stack([jnp.mean(losses[0::2]), jnp.mean(odd)])
    is_improved = is_running & (half_losses < best.half_losses)
    is_even = jnp.arange(len(losses)) % 2 == 0
    other_improved = jnp.where(is_even, is_improved[1], is_improved[0])
    return Best(
        params,
        loss,
        age,
        jnp.where(is_improved, half_losses, best.half_losses),
        jnp.where(other_improved, losses, best.cross_losses),
    )

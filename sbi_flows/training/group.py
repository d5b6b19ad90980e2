"""Arrays of a group of members in training.

Public names: `Best`, `State`, `LossOffsets`, `Group`, `Source`, `Plan`, `updated`.

The shapes below are for one member. In a group of m members, every array has an additional leading
axis of length m. V is the number of validation rows, d the number of standard coordinates.
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
        loss: Mean loss of the validation rows with these weights.
        age: Number of epochs since these weights were reached.
        half_losses: Lowest mean loss so far of each half of the validation rows, shape (2,). The
            first half has the rows at even positions, the second half the rows at odd positions.
        cross_losses: Loss of each validation row, shape (V,), after the epoch with the lowest mean
            loss of the other half. If there are at least two validation rows, a row therefore does
            not influence the choice of the epoch from which its loss is taken.
    """

    params: Array
    loss: Array
    age: Array
    half_losses: Array
    cross_losses: Array


class State(NamedTuple):
    """Weights, moving average of the weights, and state of the optimiser.

    Each training step overwrites the old state with the new state.
    """

    params: Array
    average: Array
    optimiser: Any


class LossOffsets(NamedTuple):
    """Terms that convert losses to negative log densities in the units of theta.

    Each row has a term, which is added to the loss of the row.

    Attributes:
        train: Mean term of the training rows, shape ().
        validation: Term of each validation row, shape (V,).
    """

    train: Array
    validation: Array


class Group(NamedTuple):
    """Arrays of a group of members, except its state.

    Attributes:
        best: The best weights so far.
        rest: Arrays of the model that are not trained.
        whitened: Parameters, whitened by the linear start, shape (N, d): first the training rows,
            then the validation rows. The density models the whitened parameters. If the model hides
            entries at random, the training rows are in standard coordinates instead.
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
    """Training data, and the weights of an embedding that the user gave as a module.

    All members use the same data and start with the same embedding weights.
    """

    data: TrainingData
    embedding_weights: Any


class Plan(NamedTuple):
    """Static settings of a fit. JAX compiles new programs if they change."""

    blueprint: Blueprint
    training: Training
    mesh: Mesh | None


def updated(best: Best, params: Array, losses: Array, is_running: Array) -> Best:
    """Update the best weights after an epoch.

    Args:
        best: The best weights before the epoch.
        params: Weights after the epoch.
        losses: Losses of the validation rows with these weights, shape (V,).
        is_running: Whether the member is still trained; otherwise only `age` changes.
    """
    validation = jnp.mean(losses)
    new = (params, validation, jnp.zeros_like(best.age))
    old = (best.params, best.loss, best.age + 1)
    is_better = is_running & (validation < best.loss)
    params, loss, age = jax.tree.map(partial(jnp.where, is_better), new, old)
    # a single row belongs to both halves
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

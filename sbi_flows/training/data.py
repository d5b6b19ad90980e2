"""Training data and random keys of a fit.

Public names: `TrainingData`, `Rows`, `FitKeys`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.training.stream import Stream


class Rows(NamedTuple):
    """Inputs of the model for all rows.

    Attributes:
        training: Rows from which a training step takes its batch; see `TrainingData.features`.
        validation: Inputs for linear starts and validation, shape (N, I). The same array, unless
            the model hides entries at random.
    """

    training: Array
    validation: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("y", "features", "log_det", "hidden"),
    meta_fields=("member_rows", "stream"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Training data of a fit, as a pytree.

    Attributes:
        y: Parameters in standard coordinates, shape (N, d).
        features: Inputs of the model, shape (N, I): standardised observations, perhaps with a mask
            and summaries. Without the summaries if the model hides entries at random: a training
            step computes them after it has hidden entries.
        log_det: Log absolute determinant of the Jacobian of the map from y to theta at each row,
            shape (N,). It is only used to convert the reported losses to the units of theta.
        member_rows: Number of additional training rows for each of the M members, which no other
            member uses. They are the last `M * member_rows` rows: first the rows of the first
            member, then the rows of the second member, and so on. All members share the other rows.
        stream: Training rows on disk, or None. With a stream, `y`, `features` and `log_det` are a
            sample of the rows on disk. The linear starts are fitted to this sample. The
            validation rows are chosen from it, the same for all members.
        hidden: Inputs with entries hidden by the random pattern of the model, shape (N, I), for
            linear starts and validation. A training step hides other entries. None without a
            pattern.
    """

    y: Array
    features: Array
    log_det: Array
    member_rows: int = 0
    stream: Stream | None = None
    hidden: Array | None = None

    @classmethod
    def of_rows(cls, y: Array, features: Array, log_det: Array | None = None) -> TrainingData:
        """Create training data that all members share. By default `log_det` is zero."""
        if log_det is None:
            log_det = jnp.asarray(np.zeros(len(y), y.dtype))
        return cls(y, features, log_det)

    @property
    def arrays(self) -> dict[str, Array]:
        """Dict of the arrays `y`, `features`, `log_det` and, if there are any, `hidden`."""
        arrays = {"y": self.y, "features": self.features, "log_det": self.log_det}
        return arrays if self.hidden is None else {**arrays, "hidden": self.hidden}

    @property
    def rows(self) -> Rows:
        """Inputs for training, and inputs for validation."""
        return Rows(self.features, self.features if self.hidden is None else self.hidden)

    @property
    def in_memory(self) -> TrainingData:
        """The same training data without the stream, for compiled programs."""
        return TrainingData(self.y, self.features, self.log_det, hidden=self.hidden)

    def shared_rows(self, members: int) -> int:
        """Return the number of rows that all members share. They precede all other rows."""
        return len(self.y) - members * self.member_rows


class FitKeys(NamedTuple):
    """Random keys of a fit, all derived from the user's key.

    Two fits with the same user's key and the same number of rows hold out the same rows, also if
    they train different models.

    Attributes:
        user: The user's key. It identifies the fit in a checkpoint. `fit_typicality` also uses it
            to choose the rows that describe the training simulations.
        folds: Key for the choice of the validation rows of each member.
        weights: Key for the initial weights of each member.
        epochs: Base key of the epochs. The key of an epoch is made from it by
            `jax.random.fold_in` with the number of the epoch.
        emulator: Key for the noise and the draws of an emulator.
        sample: Key for the choice of the simulations on disk that are kept in memory.
        masks: Key for the entries that are hidden in validation.
    """

    user: Key
    folds: Key
    weights: Key
    epochs: Key
    emulator: Key
    sample: Key
    masks: Key

    @classmethod
    def of(cls, key: Key) -> FitKeys:
        """Derive all keys from the user's key."""
        return cls(key, *_derived_keys(key))


@jax.jit
def _derived_keys(key: Key) -> tuple[Key, ...]:
    start_key, epoch_key = jax.random.split(key)
    fold_key, weight_key = jax.random.split(start_key)
    # not the numbers 0 and 1: they would give the same keys as `split`
    others = (jax.random.fold_in(key, number) for number in (2, 3, 4))
    return fold_key, weight_key, epoch_key, *others

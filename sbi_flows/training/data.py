"""The rows and the random keys of a fit.

Public names: `TrainingData`, `FitKeys`.
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("y", "features", "log_det"),
    meta_fields=("member_rows", "stream"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows that a fit trains on, a pytree.

    Attributes:
        y: Parameters in standard coordinates, shape (N, d).
        features: Standardised observations, shape (N, C).
        log_det: Log absolute determinant of the Jacobian of each row from y to theta, shape (N,).
            It enters the reported losses only, which are thus in the units of theta.
        member_rows: Number of rows that each of the M members has for itself, to train on beside
            the rows that all members share. They are the last `M * member_rows` rows, member after
            member.
        stream: Rows on disk to train on. `y`, `features` and `log_det` are then a sample of them,
            which the linear starts are fitted to and the validation rows are taken from; all
            members then hold out the same rows.
    """

    y: Array
    features: Array
    log_det: Array
    member_rows: int = 0
    stream: Stream | None = None

    @classmethod
    def of_rows(cls, y: Array, features: Array, log_det: Array | None = None) -> TrainingData:
        """Return rows that all members share; the log determinants are zero by default."""
        if log_det is None:
            log_det = jnp.asarray(np.zeros(len(y), y.dtype))
        return cls(y, features, log_det)

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name."""
        return {"y": self.y, "features": self.features, "log_det": self.log_det}

    @property
    def in_memory(self) -> TrainingData:
        """The arrays alone, the same for equal shapes whatever the stream is."""
        return TrainingData(self.y, self.features, self.log_det)

    def shared_rows(self, members: int) -> int:
        """Return the number of rows shared by all members; each later row is one member's own."""
        return len(self.y) - members * self.member_rows


class FitKeys(NamedTuple):
    """Random keys of a fit, all made from the user's key.

    Two fits with the same user's key hold out the same rows, whatever they fit.

    Attributes:
        user: The user's key. It identifies the fit in a checkpoint, and seeds the choice of the
            rows that describe the training simulations (`fit_typicality`).
        folds: For the validation rows of each member.
        weights: For the initial weights of each member.
        epochs: Base key of the epochs, to be folded with the number of the epoch.
        emulator: For the noise and the draws of an emulator.
        sample: For the sample of simulations on disk that is kept in memory.
    """

    user: Key
    folds: Key
    weights: Key
    epochs: Key
    emulator: Key
    sample: Key

    @classmethod
    def of(cls, key: Key) -> FitKeys:
        """Derive all keys from the user's key."""
        return cls(key, *_derived_keys(key))


@jax.jit
def _derived_keys(key: Key) -> tuple[Key, ...]:
    start_key, epoch_key = jax.random.split(key)
    fold_key, weight_key = jax.random.split(start_key)
    # the numbers 0 and 1 would give the keys of `split`
    return fold_key, weight_key, epoch_key, jax.random.fold_in(key, 2), jax.random.fold_in(key, 3)

"""What happened in a fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """What happened in a fit; losses are negative log densities in nats, in theta's own units.

    A density that is trained by another loss, such as flow matching, has that loss in the place of
    `train_loss`, `validation_loss`, `start_loss` and `best_loss`, and no `likelihood`.

    Attributes:
        train_loss: Mean over each epoch's batches, shape (epochs, members); of a member that has
            stopped, the last one.
        validation_loss: At the end of each epoch, shape (epochs, members), likewise.
        start_loss: Validation loss of the linear-Gaussian start, before epoch 1, shape (members,).
        held_out: Numbers of the valid rows that each member was validated on, shape (members, V).
        held_out_loss: Loss of each of these rows, shape (members, V), at the epoch that was best
            for the other half of the member's rows: their mean is an honest figure, where
            `best_loss` is the lowest of many. (A single row is its own other half. A screening
            has seen all rows.) Always a negative log density: where the training had another loss,
            at the weights that were kept.
        best_epoch: Epoch (from 1; 0 is the start) whose weights each member kept.
        epochs: Number of epochs run.
        seconds: Wall time of the fit, compilation and the emulator included; of one that went on
            from a checkpoint, since then.
        stop_reason: `max_epochs`, `patience` or `interrupted`.
        emulator: The `StackHistory` of the emulator that the fit also trained on, whose losses are
            those of the observation as it is emulated; None without one.
        kept: Places in the flattened observation of the entries that passed the screening; None
            without one, or where none passed and all were kept.
        likelihood: Whether the losses are negative log densities.
        solver_steps: Steps of the ODE's solve for the density of each held-out row at the weights
            that were kept, shape (members, V), tried ones included; None where none is solved.
        solver_evaluations: Evaluations of the network in each of these solves, likewise; -1 where
            the solver does not tell.
    """

    train_loss: np.ndarray
    validation_loss: np.ndarray
    start_loss: np.ndarray
    held_out: np.ndarray
    held_out_loss: np.ndarray
    best_epoch: np.ndarray
    epochs: int
    seconds: float
    stop_reason: str
    emulator: Any = None
    kept: tuple[int, ...] | None = None
    likelihood: bool = True
    solver_steps: np.ndarray | None = None
    solver_evaluations: np.ndarray | None = None

    @property
    def held_out_log_prob(self) -> np.ndarray:
        """Log density of each held-out row, shape (members, V), nats."""
        return -self.held_out_loss

    @property
    def interrupted(self) -> bool:
        """True if an interrupt ended the fit."""
        return self.stop_reason == "interrupted"

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
        """Draw the loss curves; see `sbi_flows.plots.training.loss_curves`."""
        from sbi_flows.plots.training import loss_curves

        return loss_curves(self, ax=ax)

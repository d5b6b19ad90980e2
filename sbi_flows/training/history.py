"""History of a fit: losses, held-out rows and the reason why it ended.

Public names: `History`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """History of a fit; E is the number of epochs, M of members, V of validation rows.

    Losses are negative log densities of theta in nats. A density that is trained by another loss,
    such as flow matching, has that loss in `train_loss`, `validation_loss`, `start_loss` and
    `best_loss`, and `likelihood` is then False.

    Attributes:
        train_loss: Mean loss over the batches of each epoch, shape (E, M). A member that has
            stopped repeats its last value.
        validation_loss: Validation loss at the end of each epoch, shape (E, M), likewise.
        start_loss: Validation loss before epoch 1, of the linear-Gaussian start, shape (M,).
        held_out: Numbers of the valid rows that each member was validated on, shape (M, V).
        held_out_loss: Negative log density of each of these rows, shape (M, V), in the epoch that
            was best for the other half of the member's validation rows. Its mean is an unbiased
            estimate, where `best_loss` is the lowest of many values. (A single row is its own other
            half, and a screening has seen all rows.) If the training had another loss, it is
            computed with the final weights.
        best_epoch: Epoch (from 1; 0 is the start) whose weights each member kept, shape (M,).
        epochs: Number of epochs E.
        seconds: Wall time of the fit, with compilation and the emulator; for a fit that continued
            from a checkpoint, the time since then.
        stop_reason: `max_epochs`, `patience` or `interrupted`.
        emulator: `StackHistory` of the emulator, whose losses are those of the observation as it is
            emulated; None without an emulator.
        kept: Places in the flattened observation of the entries that passed the screening; None
            without a screening, or if no entry passed and all were used.
        likelihood: True if the losses are negative log densities.
        solver_steps: Number of steps, rejected ones included, of the ODE solve for the density of
            each validation row with the final weights, shape (M, V); None without an ODE.
        solver_evaluations: Number of evaluations of the network in each of these solves, likewise;
            -1 if the solver does not report it.
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
        """Log density of theta of each held-out row, shape (M, V), nats."""
        return -self.held_out_loss

    @property
    def interrupted(self) -> bool:
        """True if an interrupt (Ctrl-C) ended the fit."""
        return self.stop_reason == "interrupted"

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the weights that each member kept, shape (M,)."""
        return np.minimum(self.start_loss, self.validation_loss.min(axis=0, initial=np.inf))

    def __repr__(self) -> str:
        """Return the number of epochs, the stop reason and the best losses as text."""
        best = ", ".join(f"{v:.3f}" for v in self.best_loss)
        return (
            f"History({self.epochs} epochs in {self.seconds:.1f} s, stopped by "
            f"{self.stop_reason}; validation loss [{best}])"
        )

    def plot(self, ax: Any = None) -> Any:
        """Plot the loss curves; see `sbi_flows.plots.training.loss_curves`."""
        from sbi_flows.plots.training import loss_curves

        return loss_curves(self, ax=ax)

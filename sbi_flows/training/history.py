"""History of a fit: losses of all epochs, validation rows and the reason why the fit ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """History of a fit.

    The losses are negative log densities of theta in nats (theta in its original units). If the
    density is trained with another loss, such as flow matching, `train_loss`, `validation_loss`,
    `start_loss` and `best_loss` are values of this loss, and `likelihood` is False.

    Attributes:
        train_loss: Mean training loss over the batches of each epoch, shape (epochs, members). A
            member that has stopped repeats its last value.
        validation_loss: Mean validation loss at the end of each epoch, shape (epochs, members). A
            member that has stopped repeats its last value.
        start_loss: Validation loss of the linear-Gaussian start, before epoch 1, shape (members,).
        held_out: Row numbers of the V validation rows of each member, among the valid simulations,
            shape (members, V).
        held_out_loss: Negative log density of each validation row, shape (members, V). The
            validation rows of a member are divided into two halves; a row is evaluated at the epoch
            with the lowest loss of the other half. The mean is therefore not biased by the choice
            of the epoch, whereas `best_loss` is the minimum over epochs and too low. (If V is 1,
            the epoch is chosen by the row itself. A screening uses all rows, also these.) If the
            training had another loss, the final weights are used.
        best_epoch: Epoch of each member's final weights, counted from 1; 0 is the start.
        epochs: Number of epochs run.
        seconds: Wall time of the fit in seconds, including compilation and the emulator. For a fit
            that continued from a checkpoint, the time since it continued.
        stop_reason: `max_epochs`, `patience` or `interrupted`.
        emulator: The `StackHistory` of the emulator whose draws were added to the training data;
            its losses refer to the emulated observation. None without an emulator.
        kept: Indices of the entries of the flattened observation that passed the screening. None
            without a screening, or if no entry passed, in which case all entries are used.
        likelihood: Whether the losses are negative log densities.
        solver_steps: Number of ODE solver steps, including rejected steps, for the density of each
            validation row at the final weights, shape (members, V). None if no ODE is solved.
        solver_evaluations: Number of network evaluations in each of these solves, shape (members,
            V); -1 if the solver does not report it. None if no ODE is solved.
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
        """Log density of each validation row in nats, shape (members, V)."""
        return -self.held_out_loss

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt (Ctrl-C) ended the fit."""
        return self.stop_reason == "interrupted"

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of each member's final weights, shape (members,)."""
        return np.minimum(self.start_loss, self.validation_loss.min(axis=0, initial=np.inf))

    def __repr__(self) -> str:
        """Show the number of epochs, the reason why the fit ended, and the best losses."""
        best = ", ".join(f"{v:.3f}" for v in self.best_loss)
        return (
            f"History({self.epochs} epochs in {self.seconds:.1f} s, stopped by "
            f"{self.stop_reason}; validation loss [{best}])"
        )

    def plot(self, ax: Any = None) -> Any:
        """Plot the loss curves; see `sbi_flows.plots.training.loss_curves`."""
        from sbi_flows.plots.training import loss_curves

        return loss_curves(self, ax=ax)

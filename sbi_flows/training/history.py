"""History of a fit: losses, held-out rows and the reason why the fit ended.

Public names: `History`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """History of a fit with E epochs, M members and V validation rows of each member.

    Losses are negative log densities of theta in nats. Some densities are trained with another
    loss, for example that of flow matching. Then `train_loss`, `validation_loss`, `start_loss` and
    `best_loss` contain this loss, and `likelihood` is False.

    Attributes:
        train_loss: Mean loss over the batches of each epoch, shape (E, M). If a member has
            stopped, its last value is repeated.
        validation_loss: Validation loss at the end of each epoch, shape (E, M). If a member has
            stopped, its last value is repeated.
        start_loss: Validation loss of the linear-Gaussian start, before epoch 1, shape (M,).
        held_out: Row numbers of the validation rows of each member, counted among the valid rows,
            shape (M, V).
        held_out_loss: Negative log density of each validation row, shape (M, V). The validation
            rows of a member are divided into two halves. The loss of a row is taken from the epoch
            that has the lowest mean loss of the other half. The mean of `held_out_loss` is
            therefore an unbiased estimate of the loss, whereas `best_loss` is biased, because it is
            the lowest of many values. There are two exceptions: a single validation row also counts
            as the other half, and a screening uses all rows. If the training uses another loss, the
            negative log densities are computed with the final weights.
        best_epoch: Epoch with the best weights of each member, shape (M,); 0 is the start.
        epochs: Number of epochs E.
        seconds: Wall time of the fit, including compilation and the emulator. If the fit continued
            from a checkpoint, the time before the checkpoint is not included.
        stop_reason: `max_epochs`, `patience` or `interrupted`.
        emulator: `StackHistory` of the emulator; None without an emulator. Its losses are negative
            log densities of the emulated observation.
        kept: Indices of the entries of the flattened observation that passed the screening. None
            without a screening, or if no entry passed, because all entries are then used.
        likelihood: True if the losses are negative log densities.
        solver_steps: Number of solver steps, including rejected steps, to compute the density of
            each validation row with the final weights, shape (M, V); None if the density needs no
            ODE.
        solver_evaluations: Number of network evaluations to compute the same densities, shape
            (M, V); -1 if the solver does not report it, None if the density needs no ODE.
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
        """Log density of theta for each validation row, in nats, shape (M, V)."""
        return -self.held_out_loss

    @property
    def interrupted(self) -> bool:
        """True if an interrupt (Ctrl-C) ended the fit."""
        return self.stop_reason == "interrupted"

    @property
    def best_loss(self) -> np.ndarray:
        """Validation loss of the best weights of each member, shape (M,)."""
        return np.minimum(self.start_loss, self.validation_loss.min(axis=0, initial=np.inf))

    def __repr__(self) -> str:
        """Show the number of epochs, the reason why the fit ended and the best losses."""
        best = ", ".join(f"{v:.3f}" for v in self.best_loss)
        return (
            f"History({self.epochs} epochs in {self.seconds:.1f} s, stopped by "
            f"{self.stop_reason}; validation loss [{best}])"
        )

    def plot(self, ax: Any = None) -> Any:
        """Plot the loss curves; see `sbi_flows.plots.training.loss_curves`."""
        from sbi_flows.plots.training import loss_curves

        return loss_curves(self, ax=ax)

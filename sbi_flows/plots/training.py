"""Loss curves of a fit.

Public names: `loss_curves`, `LossHistory`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sbi_flows.plots.style import COLOURS, as_columns, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@runtime_checkable
class LossHistory(Protocol):
    """Losses of a fit by epoch and ensemble member; `History` is one implementation.

    Attributes:
        train_loss: Training loss, shape (epochs, members).
        validation_loss: Validation loss, shape (epochs, members).
        start_loss: Validation loss before the first epoch, shape (members,).
        best_epoch: Epoch whose weights were kept, 0 for the start, shape (members,).
        likelihood: True if the loss is a negative log density in nats.
    """

    @property
    def train_loss(self) -> Any:
        """Training loss, shape (epochs, members)."""
        ...

    @property
    def validation_loss(self) -> Any:
        """Validation loss, shape (epochs, members)."""
        ...

    @property
    def start_loss(self) -> Any:
        """Validation loss before the first epoch, shape (members,)."""
        ...

    @property
    def best_epoch(self) -> Any:
        """Epoch whose weights were kept, shape (members,)."""
        ...

    @property
    def likelihood(self) -> bool:
        """True if the loss is a negative log density in nats."""
        ...


def loss_curves(history: LossHistory, *, ax: Axes | None = None) -> Axes:
    """Plot training and validation loss by epoch, with one line per ensemble member.

    A dot marks the epoch whose weights were kept.

    Args:
        history: Losses of a fit: the `History` returned by `NPE.fit`.
        ax: Axes to draw on; new axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: There is no epoch, or training and validation losses differ in shape.
    """
    from matplotlib.ticker import MaxNLocator

    train = as_columns("train_loss", history.train_loss, finite=False)
    validation = as_columns("validation_loss", history.validation_loss, finite=False)
    if train.shape != validation.shape:
        raise ValueError(f"validation_loss: expected shape {train.shape}, got {validation.shape}")
    ax = axes_or_new(ax, (4.8, 3.4))
    epochs, members = np.arange(len(train) + 1), np.arange(train.shape[1])
    validation = np.concatenate([np.reshape(history.start_loss, (1, -1)), validation])
    legend = [["training", "validation", "kept"], ["", "", ""]]
    for m, best in zip(members, np.broadcast_to(history.best_epoch, members.shape), strict=True):
        train_label, validation_label, best_label = legend[min(m, 1)]
        ax.plot(epochs[1:], train[:, m], color=COLOURS[0], lw=1, label=train_label)
        ax.plot(epochs, validation[:, m], color=COLOURS[1], lw=1.4, label=validation_label)
        marker = {"color": COLOURS[1], "mec": "white", "ms": 7, "ls": "none", "zorder": 3}
        ax.plot(epochs[best], validation[best, m], "o", label=best_label, **marker)
    ax.set(xlabel="epoch", ylabel="negative log density (nats)" if history.likelihood else "loss")
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    # The large losses of the first epochs would compress the rest of the curve.
    settled = np.r_[train[len(train) // 5 :], validation[1 + len(train) // 5 :]]
    settled = settled[np.isfinite(settled)]
    if settled.size and np.ptp(settled) > 0:
        ax.set_ylim(settled.min() - 0.15 * np.ptp(settled), settled.max() + 0.3 * np.ptp(settled))
    ax.legend(frameon=False, fontsize="small")
    return ax

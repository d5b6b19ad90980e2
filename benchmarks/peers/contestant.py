"""What takes part in a comparison: one small interface, and the sizes that all are given.

Public names: `Contestant`, `Fit`, `Recipe`, `Watch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from sbi_flows.core.typing import Obs

Watch: TypeAlias = Callable[[], None]
"""Called after each epoch, when `sample` and `log_prob` use the weights of this epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One architecture and one way to train it, for every library as near as it allows.

    Attributes:
        coupling: Coupling layers; masked autoregressive ones otherwise.
        transforms: Number of spline layers.
        bins: Bins of each spline.
        hidden: Widths of the conditioner's hidden layers, all the same.
        bound: The splines act on (-bound, bound).
        batch: Rows a step.
        learning_rate: Constant rate of Adam.
        held_out: Fraction of the rows to validate on.
        clip_norm: Largest norm of a gradient; None for no bound.
    """

    coupling: bool = True
    transforms: int = 5
    bins: int = 8
    hidden: tuple[int, ...] = (64, 64)
    bound: float = 5.0
    batch: int = 200
    learning_rate: float = 5e-4
    held_out: float = 0.1
    clip_norm: float | None = 5.0


class Fit(NamedTuple):
    """What a fit took: epochs, and steps of the optimiser in all of them."""

    epochs: int
    steps: int


class Contestant(Protocol):
    """A library's posterior estimator; observations are a batch (B, *event) throughout."""

    def describe(self) -> dict[str, Any]:
        """What was used, after a fit: architecture, number of parameters, versions."""
        ...

    def fit(
        self,
        theta: np.ndarray,
        x: Obs,
        *,
        seed: int,
        epochs: int,
        patience: int,
        watch: Watch | None = None,
    ) -> Fit:
        """Train from new weights, and keep those with the best validation loss.

        Without `watch` this is the library's own fit, as its users call it.

        Args:
            theta: Parameters in their own units, shape (N, D).
            x: Observations, shape (N, *event).
            seed: Seed of weights, order and validation rows.
            epochs: Most epochs to train for.
            patience: Epochs without a better validation loss to stop after.
            watch: Called after each epoch.
        """
        ...

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """Draws inside the prior's support, shape (B, n, D)."""
        ...

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """Log density (B, n) of theta (B, n, D), in its own units, normalised on the support."""
        ...

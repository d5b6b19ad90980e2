"""Interface of a compared library, and the network and training sizes that all of them share.

Public names: `Contestant`, `Fit`, `Recipe`, `Watch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from sbi_flows.core.typing import Obs

Watch: TypeAlias = Callable[[], None]
"""Callback after each epoch. During the call, `sample` and `log_prob` use this epoch's weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Architecture and training settings that every library follows as closely as it can.

    Attributes:
        coupling: Whether the layers are coupling layers rather than masked autoregressive layers.
        transforms: Number of spline layers.
        bins: Number of bins of each spline.
        hidden: Widths of the conditioner's hidden layers, all equal.
        bound: Half width of the interval (-bound, bound) on which the splines act.
        batch: Batch size.
        learning_rate: Constant learning rate of Adam.
        held_out: Fraction of the simulations used for validation.
        clip_norm: Maximum norm of the gradient; None for no clipping.
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
    """Number of epochs and total number of optimiser steps of a fit."""

    epochs: int
    steps: int


class Contestant(Protocol):
    """Posterior estimator of a library. Observations x come in batches, shape (B, *event)."""

    def describe(self) -> dict[str, Any]:
        """Describe the fitted model: architecture, number of parameters and library versions."""
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
        """Train from new initial weights, and keep the weights with the best validation loss.

        Without `watch`, this method calls the fit function of the library as a user would.

        Args:
            theta: Parameters, shape (N, D).
            x: Observations, shape (N, *event).
            seed: Seed of the initial weights, the data order and the split for validation.
            epochs: Maximum number of epochs.
            patience: Number of epochs without a better validation loss after which training stops.
            watch: Callback after each epoch.
        """
        ...

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """Draw n times for each observation, within the prior's support; shape (B, n, D)."""
        ...

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """Compute the log density (B, n) at theta (B, n, D), normalised on the prior's support."""
        ...

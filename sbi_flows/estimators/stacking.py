"""Weights of fits of different kinds, by what each says of rows that it did not see.

Public names: `StackHistory`, `fit_each`, `stacking_weights`.

Source: Smyth & Wolpert 1998, "Stacked Density Estimation" (NIPS 10); Yao et al. 2018, "Using
Stacking to Average Bayesian Predictive Distributions" (arXiv:1704.02030), eq. 4.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.training import History

LEAST = 0.01
"""Fits of a smaller weight are left out of the mixture, and cost nothing there."""

Fitted = TypeVar("Fitted")


@dataclasses.dataclass(frozen=True, repr=False)
class StackHistory:
    """What happened in the fits that a mixture is made of.

    Attributes:
        histories: One a fit; None for one that diverged, or that an interrupt left no time for.
        shares: Weight of each fit, shape (K,); zero for those left out.
        held_out_loss: Mean of `History.held_out_loss` of each fit alone, shape (K,), nats; infinite
            where there is no history, or a row whose ODE was not solved.
        mixture_loss: The same of the mixture, on the rows that its weights were fitted to.
        interrupted: Whether an interrupt ended the fits.
    """

    histories: tuple[History | None, ...]
    shares: np.ndarray
    held_out_loss: np.ndarray
    mixture_loss: float
    interrupted: bool = False

    def __repr__(self) -> str:
        """Weights and losses."""
        pairs = zip(self.shares, self.held_out_loss, strict=True)
        said = ", ".join(f"{share:.2f} at {loss:.3f}" for share, loss in pairs)
        return (
            f"StackHistory(shares and held-out losses [{said}]; together {self.mixture_loss:.3f})"
        )


def fit_each(
    fits: Sequence[Callable[[], tuple[Fitted, History]]], name: str, *, stacklevel: int
) -> tuple[list[tuple[Fitted, float]], StackHistory]:
    """Make every fit, then their weights.

    Args:
        fits: Functions that fit, all holding out the same rows in the same order.
        name: What is fitted, for the warning about one that diverged.
        stacklevel: Of that warning, from here to the user's own call.

    Returns:
        What was fitted with its weight, without those of no weight, and what happened.

    Raises:
        TrainingDiverged: Every fit diverged.
        KeyboardInterrupt: Before any fit was done; later, the rest is left out.
    """
    done: dict[int, tuple[Fitted, History]] = {}
    interrupted = False
    for i, fit in enumerate(fits):
        try:
            done[i] = fit()
        except TrainingDiverged as error:
            if i == len(fits) - 1 and not done:
                raise
            warnings.warn(
                f"{name} {i} is left out: {error}", SbiFlowsWarning, stacklevel=stacklevel
            )
            continue
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
            break
        if done[i][1].stop_reason == "interrupted":
            interrupted = True
            break
    log_prob = -np.stack([h.held_out_loss.ravel() for _, h in done.values()], axis=1)
    # a row whose ODE was not solved, of which the fit has warned, counts as one of no density
    log_prob = np.where(np.isnan(log_prob), -np.inf, log_prob)
    weights = _without_small(stacking_weights(log_prob))
    shares, losses = np.zeros(len(fits)), np.full(len(fits), np.inf)
    places = list(done)
    shares[places], losses[places] = weights, -log_prob.mean(axis=0)
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp.reduce(log_prob + np.log(weights), axis=1)
    histories = tuple(done[i][1] if i in done else None for i in range(len(fits)))
    kept = [(done[i][0], float(shares[i])) for i in places if shares[i] > 0]
    return kept, StackHistory(histories, shares, losses, -float(mixed.mean()), interrupted)


def stacking_weights(log_density: Any, *, tolerance: float = 1e-6) -> np.ndarray:
    """Weights of a mixture that maximise the mean log density of rows: a convex problem, by EM.

    Args:
        log_density: Log density of each of R rows under each of K models, shape (R, K), nats.
        tolerance: The mean log density is at most this far from the best.

    Returns:
        Weights that are not negative and add up to 1, shape (K,).

    Example:
        >>> import numpy as np
        >>> stacking_weights(np.log([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])).round(2)
        array([0.71, 0.29])
    """
    log_density = np.asarray(log_density, np.float64)
    best = log_density.max(axis=1, keepdims=True)
    density = np.exp(log_density - np.where(np.isfinite(best), best, 0.0))
    weights = np.full(log_density.shape[1], 1.0 / log_density.shape[1])
    for _ in range(100_000):
        gradient = np.mean(density / np.maximum(density @ weights, 1e-300)[:, None], axis=0)
        # by concavity the optimum is at most this much better
        if np.log(max(gradient.max(), 1.0)) < tolerance:
            break
        weights = weights * gradient
    return weights / weights.sum()


def _without_small(weights: np.ndarray) -> np.ndarray:
    kept = np.where(weights >= min(LEAST, weights.max()), weights, 0.0)
    return kept / kept.sum()

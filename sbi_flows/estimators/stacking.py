"""Mixture weights of several fits, from the log densities of rows that were held out.

Public names: `StackHistory`, `fit_each`, `stacking_weights`.

Source: Smyth & Wolpert 1998, "Stacked Density Estimation" (NIPS 10); Yao et al. 2018, "Using
Stacking to Average Bayesian Predictive Distributions" (arXiv:1704.02030), eq. 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.core.warn import warn_user
from sbi_flows.estimators.base import FitHistory

MIN_WEIGHT = 0.01
"""Minimum mixture weight. Fits of smaller weight are left out, because they only cost time."""

Fitted = TypeVar("Fitted")


def _no_rows() -> np.ndarray:
    return np.zeros((0, 0))


@dataclasses.dataclass(frozen=True, repr=False)
class StackHistory:
    """History of the K fits whose results form a mixture.

    Attributes:
        histories: History of each fit; None for a fit that diverged, or that did not begin before
            an interrupt.
        shares: Mixture weight of each fit, shape (K,); zero for fits that are left out.
        held_out_loss: Mean negative log density of the held-out rows under each fit alone, shape
            (K,), in nats. It is infinite if a fit has no history, or if the ODE solve of a row
            failed.
        mixture_loss: Mean negative log density of the held-out rows under the mixture, in nats.
            The mixture weights were fitted to the same rows.
        interrupted: Whether an interrupt (Ctrl-C) ended the fits.
        held_out: Indices, among the valid rows, of each member's validation rows, shape (M, V).
            They are the same in every fit.
        held_out_log_prob: Log density of each validation row under the mixture, shape (M, V), in
            nats.
    """

    histories: tuple[FitHistory | None, ...]
    shares: np.ndarray
    held_out_loss: np.ndarray
    mixture_loss: float
    interrupted: bool = False
    held_out: np.ndarray = dataclasses.field(default_factory=_no_rows)
    held_out_log_prob: np.ndarray = dataclasses.field(default_factory=_no_rows)

    def __repr__(self) -> str:
        """Return a string with the weights and losses."""
        pairs = zip(self.shares, self.held_out_loss, strict=True)
        text = ", ".join(f"{share:.2f} at {loss:.3f}" for share, loss in pairs)
        return f"StackHistory(shares and held-out losses [{text}]; mixture {self.mixture_loss:.3f})"


def fit_each(
    fits: Sequence[Callable[[], tuple[Fitted, FitHistory]]], name: str
) -> tuple[list[tuple[Fitted, float]], StackHistory]:
    """Run several fits and compute mixture weights from log densities of held-out rows.

    Args:
        fits: Functions that each run a fit, and return the result and its history. All fits must
            hold out the same rows.
        name: Name of the kind of fit, for the warning about a fit that diverged.

    Returns:
        The results that have positive weight, each with its weight, and the history.

    Raises:
        ValueError: The fits held out different rows.
        TrainingDiverged: Every fit diverged.
        KeyboardInterrupt: An interrupt came before the first fit ended. After a later interrupt,
            the remaining fits are left out.
    """
    done, interrupted = _run(fits, name)
    histories = {i: history for i, (_, history) in done.items()}
    held_out = _common_rows(name, list(histories.values()))
    log_prob = np.stack([h.held_out_log_prob.ravel() for h in histories.values()], axis=1)
    # the fit has warned of rows whose ODE was not solved; they count as rows of zero density
    log_prob = np.where(np.isnan(log_prob), -np.inf, log_prob)
    weights = _without_small(stacking_weights(log_prob))
    shares, losses = np.zeros(len(fits)), np.full(len(fits), np.inf)
    places = list(done)
    shares[places], losses[places] = weights, -log_prob.mean(axis=0)
    with np.errstate(divide="ignore"):
        mixture = np.logaddexp.reduce(log_prob + np.log(weights), axis=1)
    history = StackHistory(
        histories=tuple(histories.get(i) for i in range(len(fits))),
        shares=shares,
        held_out_loss=losses,
        mixture_loss=-float(mixture.mean()),
        interrupted=interrupted,
        held_out=held_out,
        held_out_log_prob=mixture.reshape(held_out.shape),
    )
    return [(done[i][0], float(shares[i])) for i in places if shares[i] > 0], history


def _run(
    fits: Sequence[Callable[[], tuple[Fitted, FitHistory]]], name: str
) -> tuple[dict[int, tuple[Fitted, FitHistory]], bool]:
    """Return a dict from fit index to result, and whether an interrupt ended the fits."""
    done: dict[int, tuple[Fitted, FitHistory]] = {}
    for i, fit in enumerate(fits):
        try:
            done[i] = fit()
        except TrainingDiverged as error:
            if i == len(fits) - 1 and not done:
                raise
            warn_user(f"{name} {i} is left out: {error}", SbiFlowsWarning)
            continue
        except KeyboardInterrupt:
            if not done:
                raise
            return done, True
        if done[i][1].interrupted:
            return done, True
    return done, False


def _common_rows(name: str, histories: list[FitHistory]) -> np.ndarray:
    """Return the held-out rows that all fits share; raise ValueError if the fits differ."""
    first = histories[0].held_out
    for history in histories[1:]:
        if not np.array_equal(history.held_out, first):
            raise ValueError(
                f"{name}: expected fits that hold out the same rows for the same key, got "
                f"{first.shape} rows such as {first.ravel()[:3]} and {history.held_out.shape} such "
                f"as {history.held_out.ravel()[:3]}"
            )
    return first


def stacking_weights(log_density: Any, *, tolerance: float = 1e-6) -> np.ndarray:
    """Return the mixture weights that maximise the mean log density of rows.

    The problem is convex and is solved by expectation maximisation.

    Args:
        log_density: Log density of each of R rows under each of K models, shape (R, K), nats.
        tolerance: Maximum difference of the mean log density from its optimum.

    Returns:
        Non-negative weights that add up to 1, shape (K,).

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
    large = np.where(weights >= min(MIN_WEIGHT, weights.max()), weights, 0.0)
    return large / large.sum()

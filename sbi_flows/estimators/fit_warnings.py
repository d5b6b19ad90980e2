"""Warnings about fits that cannot give a good posterior. Each cause gives one warning per fit.

Public names: `outermost_fit`, `warn_before_fit`, `warn_after_fit`, `few_rows`, `ended_early`,
`Fall`, `fall_of`, `Gain`, `nothing_learned`, `is_constant_output`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.warn import warn_user
from sbi_flows.densities.embedded import BATCH_ROWS, spaces_of
from sbi_flows.estimators.base import FitHistory
from sbi_flows.estimators.stacking import StackHistory
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.constants import warn_constant
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.training import History

MIN_ROWS, MIN_ROWS_PER_PARAMETER = 100, 10
"""Minimum number of valid rows of a fit without a warning: in total, and for each parameter."""

MIN_GAIN = 0.02
"""Minimum gain in log density over the prior, in nats, of a fit that learned something from x."""

FEW_HELD_OUT = 100
"""With fewer held-out rows, the gain must also exceed its standard error."""

MIN_FALL, MIN_RELATIVE_FALL = 0.05, 0.05
"""Fall of the validation loss at the end of a fit that causes a warning.

`MIN_FALL` is in nats. `MIN_RELATIVE_FALL` is a fraction of the loss, for losses that are not
negative log densities.
"""

MAX_RELATIVE_SPREAD = 1e-6
"""Maximum spread, relative to their size, of outputs of an embedding that do not depend on x."""

_GAIN_ROWS = 1024
"""Maximum number of held-out rows from which the gain over the prior is computed."""

_is_inside_fit: ContextVar[bool] = ContextVar("_is_inside_fit", default=False)


@contextlib.contextmanager
def outermost_fit() -> Iterator[bool]:
    """Mark the body as a fit; yield True for the outermost fit, False for a fit inside a stack."""
    is_inside = _is_inside_fit.get()
    token = _is_inside_fit.set(True)
    try:
        yield not is_inside
    finally:
        _is_inside_fit.reset(token)


def warn_before_fit(prior: Prior, simulations: Simulations) -> bool:
    """Warn of few valid rows, and of observations that are the same in all rows.

    Returns:
        Whether x varies, so that a fit can learn from it.
    """
    sentence = few_rows(simulations.num_valid, prior.dim)
    if sentence is not None:
        warn_user(sentence, SbiFlowsWarning)
    return not warn_constant(simulations.theta, simulations.x, simulations.valid)


def warn_after_fit(
    simulations: Simulations, posterior: Posterior, history: FitHistory, *, varies: bool
) -> None:
    """Warn if a fit learned nothing, has an embedding that ignores x, or ended too early.

    Args:
        simulations: Simulations of the fit, in the user's units.
        posterior: The fitted posterior.
        history: History of the fit.
        varies: False if `warn_before_fit` has already warned that x is constant.
    """
    if history.interrupted:
        return
    sentences = [ended_early(history)]
    if varies:
        sentences.append(
            _constant_embeddings(simulations, posterior)
            or nothing_learned(_gain(simulations, posterior.prior, history))
        )
    for sentence in filter(None, sentences):
        warn_user(sentence, SbiFlowsWarning)


def few_rows(num_valid: int, dim: int) -> str | None:
    """Return the warning about few valid rows for `dim` parameters; None if there are enough."""
    least = max(MIN_ROWS, MIN_ROWS_PER_PARAMETER * dim)
    if num_valid >= least:
        return None
    return (
        f"simulations: expected at least {least:,} valid rows (the larger of {MIN_ROWS} and "
        f"{MIN_ROWS_PER_PARAMETER} for each parameter), got {num_valid:,}; the posterior will be "
        "inaccurate. Simulate more"
    )


class Gain(NamedTuple):
    """Mean gain in log density over the prior on held-out rows, in nats.

    Attributes:
        mean: Mean over the rows.
        error: Standard error of the mean.
        rows: Number of held-out rows.
    """

    mean: float
    error: float
    rows: int


def nothing_learned(gain: Gain) -> str | None:
    """Return the warning about a fit that learned nothing; None if it learned something.

    With few held-out rows, a gain below its standard error may be chance.
    """
    least = max(MIN_GAIN, gain.error) if gain.rows < FEW_HELD_OUT else MIN_GAIN
    if not gain.mean < least:
        return None
    return (
        "the fit learned nothing from x: the posterior is not better than the prior (gain "
        f"{gain.mean:+.2f} +- {gain.error:.2f} nats on held-out rows). Check that x depends on "
        "theta; if it does, use more simulations, summary statistics or an embedding"
    )


def ended_early(history: FitHistory) -> str | None:
    """Return the warning about a fit whose validation loss still fell at `max_epochs`, or None."""
    if isinstance(history, StackHistory):
        kept = zip(history.histories, history.shares, strict=True)
        sentences = (ended_early(h) for h, share in kept if h is not None and share > 0)
        return next(filter(None, sentences), None)
    if not isinstance(history, History) or history.stop_reason != "max_epochs":
        return None
    fall = fall_of(history.start_loss, history.validation_loss)
    least = MIN_FALL
    if not history.likelihood:
        least = MIN_RELATIVE_FALL * float(np.mean(np.abs(history.best_loss)))
    if not fall.size > least:
        return None
    unit = " nats" * history.likelihood
    return (
        f"the validation loss still fell when the fit ended after {history.epochs} epochs (by "
        f"{fall.size:.2g}{unit} in the last {fall.epochs}); train longer, for example with "
        f"sf.Training(max_epochs={2 * history.epochs})"
    )


class Fall(NamedTuple):
    """Fall of the lowest validation loss in the last `epochs` epochs, averaged over members."""

    size: float
    epochs: int


def fall_of(start_loss: np.ndarray, validation_loss: np.ndarray) -> Fall:
    """Return the fall of the validation loss in the last tenth of the epochs, two at least.

    Args:
        start_loss: Losses before the first epoch, shape (M,).
        validation_loss: Losses after each of E epochs, shape (E, M).
    """
    epochs = max(2, -(-len(validation_loss) // 10))
    losses = np.concatenate([start_loss[None], validation_loss])
    if len(losses) <= epochs:
        return Fall(0.0, epochs)
    fall = np.min(losses[:-epochs], axis=0) - np.min(losses, axis=0)
    return Fall(float(np.mean(fall)), epochs)


def is_constant_output(outputs: np.ndarray) -> bool:
    """Return whether outputs (B, F) of an embedding are equal for all B observations."""
    outputs = np.asarray(outputs, float)
    if len(outputs) < 2 or not np.all(np.isfinite(outputs)):
        return False
    size = np.max(np.abs(outputs), axis=0)
    return bool(np.all(np.ptp(outputs, axis=0) <= MAX_RELATIVE_SPREAD * size))


def _constant_embeddings(simulations: Simulations, posterior: Posterior) -> str | None:
    """Return the warning about embeddings that do not depend on x; None if there are none.

    It concerns modules of the user only. The embeddings of this library start at zero, and stay
    there if the linear start from their fixed summaries is best.
    """
    parts = [
        (blueprint, weights)
        for blueprint, weights in zip(posterior.blueprints, posterior.weights, strict=True)
        if not isinstance(blueprint.embedding, EmbeddingSettings | None)
    ]
    if not parts:
        return None
    rows = np.flatnonzero(simulations.valid)[:BATCH_ROWS]
    features = np.asarray(posterior.features(simulations[rows].x))
    names = [
        _name_of(blueprint.embedding)
        for blueprint, weights in parts
        if is_constant_output(spaces_of(blueprint, weights, features)[1])
    ]
    if not names:
        return None
    return (
        f"embedding: expected an output that depends on x, got the same for {len(rows):,} "
        f"different observations from {', '.join(dict.fromkeys(names))}; check its layers, "
        "its initial weights and the learning rate"
    )


def _name_of(embedding: Any) -> str:
    is_function = not isinstance(embedding, nnx.Module) and hasattr(embedding, "__name__")
    return embedding.__name__ if is_function else type(embedding).__name__


def _gain(simulations: Simulations, prior: Prior, history: FitHistory) -> Gain:
    """Return the mean gain over the prior on held-out rows, and its standard error, in nats."""
    log_prob = np.asarray(history.held_out_log_prob, float).ravel()
    rows, members = np.unique(np.asarray(history.held_out).ravel(), return_inverse=True)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _GAIN_ROWS)).astype(int)
    theta = simulations.relative_to(prior).theta
    places = np.flatnonzero(simulations.valid)[rows[chosen]]
    padded = np.asarray(theta)[np.resize(places, _GAIN_ROWS)]
    # densities of numpyro promote ranks, whatever the user's settings are
    with jax.numpy_rank_promotion("allow"):
        prior_log_prob = np.asarray(_log_prob(prior, padded), float)[: len(chosen)]
    # rows that several members held out count once
    sums = np.bincount(members, np.where(np.isfinite(log_prob), log_prob, np.nan))
    gains = (sums / np.bincount(members))[chosen] - prior_log_prob
    gains = gains[np.isfinite(gains)]
    if len(gains) < 2:
        return Gain(np.nan, np.nan, len(gains))
    error = float(np.std(gains, ddof=1) / np.sqrt(len(gains)))
    return Gain(float(np.mean(gains)), error, len(gains))


@jax.jit
def _log_prob(prior: Prior, theta: Array) -> Array:
    return prior.unchecked_log_prob(theta)

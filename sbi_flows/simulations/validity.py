"""The probability that a simulation is valid, and the effect of failures on a posterior.

A posterior is trained on valid simulations, whose joint density is proportional to
prior(theta) p(x, valid | theta). At an observation x_o the trained posterior is therefore

    q(theta | x_o) = prior(theta) p(x_o, valid | theta) / normalisation.

There are two kinds of failure.

*Outcome*: the failure is a possible outcome in nature and would have been observed (the population
dies out, no star forms). Then "valid" is a part of the observation, p(x_o, valid | theta) is the
likelihood, and q is the posterior. No correction is needed.

*Accident*: the computation fails, but nature does not. The wanted posterior p(theta | x_o) is the
posterior of a simulator without failures. It is proportional to prior(theta) p(x_o | theta).
Therefore

    q(theta | x_o) = p(theta | x_o) P(valid | theta, x_o) / normalisation.

- If the failure depends only on the outcome (a number overflows), P(valid | theta, x_o) is the
  same at all theta. Then q is the wanted posterior, and a correction would make it wrong.
- If the failure depends only on the parameters (a solver is unstable for some parameters), the
  probability is P(valid | theta), which can be learned. Draws of q with weights
  1 / P(valid | theta) are then draws of the wanted posterior. `Validity.corrected` returns them.
- If the failure depends on parameters and outcome, the weights cannot be learned, because the
  outcomes of failed simulations are not known.

Rubin 1976 (Biometrika 63, 581) explains when missing outcomes can be ignored.

Public names: `fit_validity`, `Validity`, `Corrected`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import WeightsUneven
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.arrays import as_parameters
from sbi_flows.simulations.classifier import Network, fit_classifier, mean_probability
from sbi_flows.simulations.simulations import Simulations

MIN_SIMULATIONS = 20
"""Minimum number of failed simulations, and minimum number of valid simulations."""

MIN_EFFECTIVE_FRACTION = 0.1
"""Minimum effective sample size of weighted draws, as a fraction of their number."""

MAX_COORDINATE = 5.0
"""Limit to which the scaled standard coordinates are clipped, in standard deviations. Beyond this
limit the learned probability is constant."""


class Corrected(NamedTuple):
    """Draws of a corrected posterior.

    Attributes:
        theta: Draws, shape (n, D). A draw may occur several times.
        weights: Normalised weights of the N original draws, shape (N,).
        effective: Effective sample size of the weighted draws.
    """

    theta: Array
    weights: Array
    effective: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Validity:
    """The probability of a valid simulation, P(valid | theta), learned from simulations.

    Attributes:
        prior: The prior of the parameters.
        num_simulations: Number of simulations in the fit.
        num_failed: Number of failed simulations in the fit.
        held_out_loss: Mean log loss of held-out simulations, in nats.
        constant_loss: Mean log loss of the same simulations for a constant probability, in nats.
        gain: Difference constant_loss - held_out_loss, and standard error of this difference, in
            nats.
        calibration_p: P-value of Spiegelhalter's test of calibration on held-out simulations.
    """

    prior: Prior
    num_simulations: int
    num_failed: int
    held_out_loss: float
    constant_loss: float
    gain: tuple[float, float]
    calibration_p: float
    _networks: Network
    _centre: Array
    _scale: Array

    def __repr__(self) -> str:
        """Show `held_out_loss`, `constant_loss` and the result of the calibration test."""
        gain, error = self.gain
        lines = [
            f"P(valid | theta) of {self.num_simulations:,} simulations, of which "
            f"{self.num_failed:,} failed",
            f"held-out log loss {self.held_out_loss:.4f} nats, with a constant probability "
            f"{self.constant_loss:.4f}: a gain of {gain:.4f} +- {error:.4f}",
            f"calibration of the probabilities: p {self.calibration_p:.2g}",
        ]
        if gain < 2.0 * error:
            lines.append("no sign that failures depend on the parameters")
        return "\n".join(lines)

    def probability(self, theta: Any) -> Array:
        """Compute the probability that a simulation at theta is valid.

        Args:
            theta: Parameters, shape (*, D).

        Returns:
            Probabilities, shape (*).

        Raises:
            ValueError: theta does not have D columns, or is outside the prior's support.
        """
        theta = _require_support("theta", self.prior, theta)
        y = _to_standard(self.prior, theta.reshape(-1, self.prior.dim))
        p = mean_probability(self._networks, _rescale(y, self._centre, self._scale))
        return p.reshape(theta.shape[:-1])

    def corrected(self, key: Key, draws: Any, n: int | None = None) -> Corrected:
        """Resample draws of a posterior, so that they follow the posterior without failures.

        Use this method only if failures are accidents of the computation that depend only on the
        parameters, and not on the outcome: see the documentation of this module.

        Args:
            key: Random key.
            draws: Draws of a posterior at one observation, shape (N, D).
            n: Number of draws to return; by default the effective sample size.

        Returns:
            Draws resampled with weights 1 / P(valid | theta).

        Raises:
            ValueError: The draws do not have D columns or are outside the prior's support, or n is
                not positive.
            WeightsUneven: The effective sample size is below a tenth of the number of draws. This
                happens if nearly all simulations fail in a part of the region of the posterior. If
                all simulations fail in a part, there are no draws to weight in this part.

        References:
            Kitagawa 1996, Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space
            Models, section 2 (systematic resampling). Kong, Liu & Wong 1994, Sequential Imputations
            and Bayesian Missing Data Problems (the effective number of draws).
        """
        require_count(1, n=1 if n is None else n)
        theta = as_parameters(draws)
        p = np.asarray(self.probability(theta), np.float64)
        # weights relative to the largest weight cannot overflow
        weights = p.min() / np.where(p > 0, p, 1.0)
        effective = float(weights.sum() ** 2 / np.sum(weights**2)) if p.min() > 0 else 0.0
        if effective < MIN_EFFECTIVE_FRACTION * len(weights):
            raise WeightsUneven(
                f"draws: {len(weights)} of them are worth {effective:.0f} with weights "
                "1 / P(valid | theta); the posterior is where nearly all simulations fail"
            )
        weights = weights / weights.sum()
        n = max(1, int(effective)) if n is None else n
        offset_key, order_key = jax.random.split(key)
        steps = (float(jax.random.uniform(offset_key)) + np.arange(n)) / n
        rows = np.minimum(np.searchsorted(np.cumsum(weights), steps), len(weights) - 1)
        rows = jax.random.permutation(order_key, jnp.asarray(rows))
        return Corrected(theta[rows], jnp.asarray(weights), effective)


def fit_validity(key: Key, prior: PriorLike, simulations: Simulations) -> Validity:
    """Learn the probability that a simulation is valid as a function of its parameters.

    A small classifier is fitted in the prior's standard coordinates by cross-validation with five
    folds. Its networks start from logistic regression and are stopped at the smallest loss on
    held-out simulations. If the parameters do not predict failures, the probability is constant.

    Args:
        key: Random key.
        prior: A prior, or anything that `as_prior` accepts.
        simulations: Simulations with parameters from the prior, including failed simulations. At
            most 50,000 are used. The observations are not used.

    Returns:
        The probability of a valid simulation, and its quality on held-out simulations.

    Raises:
        ValueError: theta does not have D columns or is outside the prior's support, or there are
            fewer than 20 failed or fewer than 20 valid simulations.

    References:
        Spiegelhalter 1986, Probabilistic Prediction in Patient Management and Clinical Trials
        (the test of calibration).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, sbi_flows as sf
        >>> def failing(key, theta):
        ...     return jnp.where(theta > 1.0, jnp.nan, theta + jax.random.normal(key))
        >>> prior = dist.Normal(0, 1)
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     sims = sf.simulate(jax.random.key(0), prior, failing, 2_000)
        >>> validity = fit_validity(jax.random.key(1), prior, sims)
        >>> validity.probability([[-1.0], [3.0]]).round(1)
        Array([1., 0.], dtype=float32)
    """
    prior = as_prior(prior)
    theta = _require_support("simulations", prior, simulations.theta)
    valid = np.asarray(simulations.valid)
    failed = int(np.sum(~valid))
    if min(failed, len(valid) - failed) < MIN_SIMULATIONS:
        raise ValueError(
            f"simulations: expected at least {MIN_SIMULATIONS} that failed and {MIN_SIMULATIONS} "
            f"that did not, got {failed} and {len(valid) - failed}"
        )
    y = _to_standard(prior, theta)
    centre, spread = jnp.mean(y, axis=0), jnp.std(y, axis=0)
    scale = jnp.where(spread > 0, spread, 1.0)
    classifier = fit_classifier(key, np.asarray(_rescale(y, centre, scale)), valid)
    p, labels = classifier.p, classifier.labels
    losses = _log_loss(p, labels)
    constant = _log_loss(np.broadcast_to(classifier.constant, p.shape), labels)
    gains = constant - losses
    return Validity(
        prior=prior,
        num_simulations=len(valid),
        num_failed=failed,
        held_out_loss=float(losses.mean()),
        constant_loss=float(constant.mean()),
        gain=(float(gains.mean()), float(gains.std() / gains.size**0.5)),
        calibration_p=_spiegelhalter_p_value(p, labels),
        _networks=classifier.networks,
        _centre=centre,
        _scale=scale,
    )


def _require_support(name: str, prior: Prior, theta: Any) -> Array:
    """Return theta (*, D) relative to the prior's offset. Raise ValueError if any is outside."""
    outside = int(np.sum(~np.asarray(prior.contains(theta))))
    if outside:
        raise ValueError(
            f"{name}: expected parameters in the prior's support, got {outside} outside"
        )
    return prior.subtract_offset(theta)


@jax.jit
@full_precision
def _to_standard(prior: Prior, theta: Array) -> Array:
    return prior.unchecked_to_standard(theta)


def _rescale(y: Array, centre: Array, scale: Array) -> Array:
    """Centre and scale coordinates (N, d), and clip them to `MAX_COORDINATE`."""
    return jnp.clip((y - centre[None]) / scale[None], -MAX_COORDINATE, MAX_COORDINATE)


def _log_loss(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the log loss of each label, in nats."""
    p = np.clip(p, 1e-7, 1.0 - 1e-7)
    return -np.where(labels > 0, np.log(p), np.log1p(-p))


def _spiegelhalter_p_value(p: np.ndarray, labels: np.ndarray) -> float:
    """Compute the two-sided p-value of Spiegelhalter's test of the probabilities p of label 1."""
    from scipy.special import ndtr

    variance = np.sum((1.0 - 2.0 * p) ** 2 * p * (1.0 - p))
    z = np.sum((labels - p) * (1.0 - 2.0 * p)) / np.sqrt(max(variance, 1e-12))
    return float(2.0 * ndtr(-abs(z)))

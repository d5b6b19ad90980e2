"""The probability that a simulation is valid, and the effect of failures on a posterior.

A posterior is trained on valid simulations, whose joint density is proportional to
prior(theta) p(x, valid | theta). At an observation x_o it is therefore

    q(theta | x_o) = prior(theta) p(x_o, valid | theta) / normalisation.

Two kinds of failure have to be told apart.

*Outcome*: nature can fail in the same way, and the failure would have been observed (the population
dies out, no star forms). Then "valid" is a part of the observation, p(x_o, valid | theta) is its
likelihood, and q is the posterior. There is nothing to correct.

*Accident*: the computation fails, and the data do not depend on that. The posterior is that of a
simulator without failures, prior(theta) p(x_o | theta), and

    q(theta | x_o) = p(theta | x_o) P(valid | theta, x_o) / normalisation.

- If the failure depends on the outcome alone (a number overflows), P(valid | theta, x_o) is the
  same at all theta. Then q is the posterior, and a correction would make it wrong.
- If it depends on the parameters alone (a solver is unstable for some of them), the probability is
  P(valid | theta), and can be learned. Draws of q with weights 1 / P(valid | theta) are draws of
  the posterior. `Validity.corrected` returns them.
- If it depends on both, no weights are known: the lost outcomes would be needed.

Missing outcomes are ignorable or not in the sense of Rubin 1976 (Biometrika 63, 581).

Public names: `fit_validity`, `Validity`, `Corrected`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_real_array, require_count
from sbi_flows.core.errors import WeightsUneven
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.classifier import Network, fit_classifier, mean_probability
from sbi_flows.simulations.simulations import Simulations, as_parameters

MIN_SIMULATIONS = 20
"""Minimum number of failed simulations, and of valid ones."""

MIN_EFFECTIVE_FRACTION = 0.1
"""Minimum effective sample size of weighted draws, as a fraction of their number."""

MAX_COORDINATE = 5.0
"""Scaled standard coordinate, in standard deviations, beyond which the probability is constant."""


class Corrected(NamedTuple):
    """Draws of a corrected posterior.

    Attributes:
        theta: Draws, shape (n, D); some may occur several times.
        weights: Weights of the original draws, shape (N,); their sum is 1.
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
        num_simulations: Number of simulations that it was fitted to.
        num_failed: Number of failed simulations among them.
        held_out_loss: Mean log loss of held-out simulations, in nats.
        constant_loss: Their mean log loss with a constant probability.
        gain: Difference constant_loss - held_out_loss, and its standard error.
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
        """Show losses with and without the parameters, and the test of calibration."""
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
            Shape (*).

        Raises:
            ValueError: theta does not have D columns, or is outside the prior's support.
        """
        theta = _require_support("theta", self.prior, theta)
        y = _to_standard(self.prior, theta.reshape(-1, self.prior.dim))
        p = mean_probability(self._networks, _rescale(y, self._centre, self._scale))
        return p.reshape(theta.shape[:-1])

    def corrected(self, key: Key, draws: Any, n: int | None = None) -> Corrected:
        """Resample draws of a posterior to those of the posterior without failures.

        Use it only if a failure is an accident of the computation that depends on the parameters
        alone, not on the outcome: see the documentation of this module.

        Args:
            key: Random key.
            draws: Draws of a posterior at one observation, shape (N, D).
            n: Number of draws to return; by default the effective sample size.

        Returns:
            Draws resampled with weights 1 / P(valid | theta).

        Raises:
            ValueError: The draws do not fit the prior, or n is not positive.
            WeightsUneven: The effective sample size is below a tenth of the number of draws: nearly
                all simulations fail in the region of the posterior. In regions where all
                simulations fail there are no draws, and weights cannot replace them.

        References:
            Kitagawa 1996, Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space
            Models, section 2 (systematic resampling). Kong, Liu & Wong 1994, Sequential Imputations
            and Bayesian Missing Data Problems (the effective number of draws).
        """
        require_count(1, n=1 if n is None else n)
        theta = as_parameters(draws)
        p = np.asarray(self.probability(theta), np.float64)
        # relative to the largest weight, so that none overflows
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
        simulations: Simulations with parameters from the prior, failed ones included; at most
            50,000 of them are used. Their observations are not used.

    Returns:
        The probability of a valid simulation, and its quality on held-out simulations.

    Raises:
        ValueError: theta does not fit the prior, or there are fewer than 20 failed or fewer than 20
            valid simulations.

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
    """Return theta (*, D) as an array; raise ValueError unless all are in the prior's support."""
    theta = jnp.asarray(as_real_array(name, theta))
    outside = int(np.sum(~np.asarray(prior.contains(theta))))
    if outside:
        raise ValueError(
            f"{name}: expected parameters in the prior's support, got {outside} outside"
        )
    return theta


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
    """Compute the two-sided p-value of Spiegelhalter's test that labels have probabilities p."""
    from scipy.special import ndtr

    variance = np.sum((1.0 - 2.0 * p) ** 2 * p * (1.0 - p))
    z = np.sum((labels - p) * (1.0 - 2.0 * p)) / np.sqrt(max(variance, 1e-12))
    return float(2.0 * ndtr(-abs(z)))

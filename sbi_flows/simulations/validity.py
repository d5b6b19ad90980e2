"""Where simulations fail: the probability that one is valid, and what it does to a posterior.

Public names: `fit_validity`, `Validity`, `Corrected`.

A posterior is trained on valid simulations alone, whose joint density is in proportion to
prior(theta) p(x, valid | theta). At an observation x_o it is therefore

    q(theta | x_o) = prior(theta) p(x_o, valid | theta) / normalisation.

Whether that is the posterior that is wanted depends on what a failure is, and on what it hangs on.

*An outcome*: nature could have failed in the same way, and that would have been seen (the
population dies out, no star forms). Then valid is part of what was observed, its likelihood is
p(x_o, valid | theta), and q is the posterior. Nothing is to be corrected.

*An accident* of the computation, which the data know nothing of: wanted is the posterior of a
simulator without it, prior(theta) p(x_o | theta), and

    q(theta | x_o) = p(theta | x_o) P(valid | theta, x_o) / normalisation.

- Where the failure depends on the outcome alone (numbers that overflow), P(valid | theta, x_o) is
  the same at all theta: q is the posterior as it is, and a correction would spoil it.
- Where it depends on the parameters alone (a solver that is unstable at some), that probability is
  P(valid | theta), which can be learned: draws of q with weights 1 / P(valid | theta) are draws of
  the posterior. `Validity.corrected` makes them.
- Where it depends on both, the outcomes that were lost would have to be known; no weights help.

Missing outcomes are "ignorable" or not in the sense of Rubin 1976 (Biometrika 63, 581).
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
from sbi_flows.simulations.classifier import Net, fit_classifier, mean_probability
from sbi_flows.simulations.simulations import Simulations, parameters

LEAST = 20
"""Failed simulations, and valid ones, from which anything can be learned."""

LEAST_EFFECTIVE = 0.1
"""Share of the draws that have to be left of them, in effect, by their weights."""

REACH = 5.0
"""Standard coordinates, in standard deviations, beyond which a probability changes no more."""


class Corrected(NamedTuple):
    """Draws of a corrected posterior.

    Attributes:
        theta: Draws, shape (n, D), some of them more than once.
        weights: Of the draws that they are taken from, shape (N,); they add up to 1.
        effective: Number of independent draws that the weighted ones are worth.
    """

    theta: Array
    weights: Array
    effective: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Validity:
    """P(valid | theta), learned from simulations.

    Attributes:
        prior: The prior of the parameters.
        num_simulations: Simulations that it was fitted to.
        num_failed: Those that failed.
        held_out_loss: Log loss of simulations that were held out, nats each.
        constant_loss: Log loss of the same with a constant probability.
        gain: By how much the first is less than the second, and the standard error of that.
        calibration_p: P-value of Spiegelhalter's test that held-out simulations are valid as often
            as their probabilities say.
    """

    prior: Prior
    num_simulations: int
    num_failed: int
    held_out_loss: float
    constant_loss: float
    gain: tuple[float, float]
    calibration_p: float
    _nets: Net
    _centre: Array
    _scale: Array

    def __repr__(self) -> str:
        """How much the parameters say of failures, and whether the probabilities are right."""
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
        """The probability that a simulation at theta is valid.

        Args:
            theta: Parameters, shape (*, D).

        Returns:
            Shape (*).

        Raises:
            ValueError: theta has another width, or is outside the prior's support.
        """
        theta = _inside("theta", self.prior, theta)
        y = _standard(self.prior, theta.reshape(-1, self.prior.dim))
        p = mean_probability(self._nets, _scaled(y, self._centre, self._scale))
        return p.reshape(theta.shape[:-1])

    def corrected(self, key: Key, draws: Any, n: int | None = None) -> Corrected:
        """Turn draws of a posterior into those of one that failures have not changed.

        This is right where a failure is an accident of the computation that depends on the
        parameters, and neither on the outcome nor part of what was observed: see this module.

        Args:
            key: Random key.
            draws: Draws of a posterior at one observation, shape (N, D).
            n: Number of draws to return; as many as the weighted draws are worth by default.

        Returns:
            Draws, taken anew in proportion to 1 / P(valid | theta).

        Raises:
            ValueError: The draws do not fit the prior, or n is not positive.
            WeightsUneven: The weighted draws are worth less than a tenth of their number: the
                posterior is where nearly all simulations fail, and cannot be told from those left.
                Where all of them fail there are no draws at all, and no weight can tell.

        References:
            Kitagawa 1996, Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space
            Models, section 2 (systematic resampling). Kong, Liu & Wong 1994, Sequential Imputations
            and Bayesian Missing Data Problems (the effective number of draws).
        """
        require_count(1, n=1 if n is None else n)
        theta = parameters(draws)
        p = np.asarray(self.probability(theta), np.float64)
        # in units of the largest, so that none overflows
        weights = p.min() / np.where(p > 0, p, 1.0)
        effective = float(weights.sum() ** 2 / np.sum(weights**2)) if p.min() > 0 else 0.0
        if effective < LEAST_EFFECTIVE * len(weights):
            raise WeightsUneven(
                f"draws: {len(weights)} of them are worth {effective:.0f} with weights "
                "1 / P(valid | theta); the posterior is where nearly all simulations fail"
            )
        weights = weights / weights.sum()
        n = max(1, int(effective)) if n is None else n
        own, order = jax.random.split(key)
        steps = (float(jax.random.uniform(own)) + np.arange(n)) / n
        chosen = np.minimum(np.searchsorted(np.cumsum(weights), steps), len(weights) - 1)
        chosen = jax.random.permutation(order, jnp.asarray(chosen))
        return Corrected(theta[chosen], jnp.asarray(weights), effective)


def fit_validity(key: Key, prior: PriorLike, simulations: Simulations) -> Validity:
    """Learn from simulations where in the prior they fail.

    A small classifier of valid against theta, in the prior's standard coordinates: five networks,
    each trained without a fifth of the simulations, from logistic regression on, and stopped where
    it tells those best; at a constant probability where parameters say nothing of failures.

    Args:
        key: Random key.
        prior: What `as_prior` takes.
        simulations: Simulations with parameters from the prior, failed ones included; at most
            50,000 of them are used. Observations are not looked at.

    Returns:
        The probability of a valid simulation, and how well it tells those that were held out.

    Raises:
        ValueError: theta does not fit the prior, or fewer than 20 simulations failed, or were
            valid.

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
    theta, valid = _inside("simulations", prior, simulations.theta), np.asarray(simulations.valid)
    failed = int(np.sum(~valid))
    if min(failed, len(valid) - failed) < LEAST:
        raise ValueError(
            f"simulations: expected at least {LEAST} that failed and {LEAST} that did not, got "
            f"{failed} and {len(valid) - failed}"
        )
    y = _standard(prior, theta)
    centre, spread = jnp.mean(y, axis=0), jnp.std(y, axis=0)
    scale = jnp.where(spread > 0, spread, 1.0)
    found = fit_classifier(key, np.asarray(_scaled(y, centre, scale)), valid)
    losses = _log_loss(found.p, found.v)
    constant = _log_loss(np.broadcast_to(found.constant, found.p.shape), found.v)
    gains = constant - losses
    return Validity(
        prior=prior,
        num_simulations=len(valid),
        num_failed=failed,
        held_out_loss=float(losses.mean()),
        constant_loss=float(constant.mean()),
        gain=(float(gains.mean()), float(gains.std() / gains.size**0.5)),
        calibration_p=_spiegelhalter(found.p, found.v),
        _nets=found.nets,
        _centre=centre,
        _scale=scale,
    )


def _inside(name: str, prior: Prior, theta: Any) -> Array:
    """Parameters (*, D), all of them in the prior's support."""
    theta = jnp.asarray(as_real_array(name, theta))
    outside = int(np.sum(~np.asarray(prior.contains(theta))))
    if outside:
        raise ValueError(
            f"{name}: expected parameters in the prior's support, got {outside} outside"
        )
    return theta


@jax.jit
@full_precision
def _standard(prior: Prior, theta: Array) -> Array:
    return prior.unchecked_to_standard(theta)


def _scaled(y: Array, centre: Array, scale: Array) -> Array:
    return jnp.clip((y - centre[None]) / scale[None], -REACH, REACH)


def _log_loss(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-7, 1.0 - 1e-7)
    return -np.where(v > 0, np.log(p), np.log1p(-p))


def _spiegelhalter(p: np.ndarray, v: np.ndarray) -> float:
    """Two-sided p-value of probabilities p for what happened, v."""
    from scipy.special import ndtr

    wide = np.sum((1.0 - 2.0 * p) ** 2 * p * (1.0 - p))
    z = np.sum((v - p) * (1.0 - 2.0 * p)) / np.sqrt(max(wide, 1e-12))
    return float(2.0 * ndtr(-abs(z)))

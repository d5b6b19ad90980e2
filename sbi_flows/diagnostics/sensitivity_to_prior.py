"""Sensitivity of a posterior to its prior and to the weight of the data.

Posterior draws are re-weighted: by the ratio of two priors, or by a power of the prior or of the
likelihood. The likelihood is the posterior density divided by the prior density, up to a constant.
Nothing is fitted again.

Public names: `prior_sensitivity`, `PriorSensitivity`, `Reweighted`.

References:
    Kallioinen, Paananen, Buerkner & Vehtari 2023, Detecting and Diagnosing Prior and Likelihood
    Sensitivity with Power-Scaling, arXiv:2107.14054.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SbiFlowsError, WeightsUneven
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics.prior_report import PriorSensitivity, Reweighted
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior, single_shape
from sbi_flows.posteriors.reweighting import Reweighting, cjs_distance, reweighted
from sbi_flows.prior.prior import Prior, PriorLike, as_prior

MIN_DRAWS = 500
NUM_PRIOR_DRAWS = 10_000

POWERS = (0.8, 1.25)
"""Powers whose effect is reported; 1.25 is 1 / 0.8."""

SLOPE_POWER = 1.01
"""The sensitivity is computed from this power and its inverse."""

MIN_LOG_RANGE = 1e-4
"""Weights count as equal if their logarithms vary by no more than this."""


def prior_sensitivity(
    key: Key,
    posterior: PosteriorLike,
    x: Obs,
    *,
    prior: PriorLike | None = None,
    draws: int = 4_000,
) -> PriorSensitivity:
    """Estimate the posterior under another prior, or under powers of prior and likelihood.

    Without `prior`, the prior and the likelihood are each raised to powers near 1. A parameter
    whose posterior changes with the power of the prior is influenced by the prior. If the posterior
    of a parameter changes with both powers, prior and data may be in conflict. If it changes with
    neither power, the parameter is not learned from x. If the prior is a product, the prior of each
    named parameter is also raised alone.

    The likelihood is estimated by posterior density divided by prior density.

    Args:
        key: Random key.
        posterior: The posterior. Without `prior` its densities are evaluated, which for continuous
            flows needs one ODE solve per draw.
        x: One observation.
        prior: Another prior of the same parameters, in any form that `as_prior` accepts. The
            estimate excludes regions where the prior of the fit is zero.
        draws: Number of draws, at least 500.

    Returns:
        Shifts and widths. Printing them shows a table; the method `plot` makes a figure.

    Raises:
        ValueError: x is a batch or does not fit, the prior has other parameters, or there are too
            few draws.
        WeightsUneven: No draw is in the support of the other prior.
        SbiFlowsError: The posterior gave NaN, or draws outside the prior's support.

    References:
        Detecting and Diagnosing Prior and Likelihood Sensitivity with Power-Scaling,
        arXiv:2107.14054, equations 2 and 3 and section 2.4.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([1])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (1,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> result = sf.prior_sensitivity(
        ...     jax.random.key(2), posterior, jax.numpy.array([0.3]),
        ...     prior=dist.Normal(1, 1).expand([1]),
        ... )
        >>> bool(result["new prior"].shift[0] > 0.2), result["new prior"].reliable
        (True, True)
    """
    require_count(MIN_DRAWS, draws=draws)
    posterior = as_posterior(posterior, single_shape(x))
    old = posterior.prior
    draw_key, prior_key = jax.random.split(key)
    if prior is not None:
        new = _alternative(prior, old)
        theta = posterior.sample(draw_key, x, draws)
        return _under_new_prior(prior_key, old, new, theta, _log_prior(old, theta))
    theta, log_posterior = posterior.sample_and_log_prob(draw_key, x, draws)
    log_prior = _log_prior(old, theta)
    log_posterior = _as_finite(log_posterior, "log densities that are not finite")
    sites = _site_log_probs(old, theta)
    components = {"prior": log_prior, "likelihood": log_posterior - log_prior}
    components |= {f"prior of {name}": log for name, log in sites.items() if len(sites) > 1}
    return _under_powers(old, np.asarray(theta, np.float64), components)


def _alternative(prior: PriorLike, old: Prior) -> Prior:
    """Convert the new prior to a `Prior`.

    Raises:
        ValueError: The new prior has other parameters than the old one.
    """
    new = as_prior(prior)
    if dict(new.event_shapes) != dict(old.event_shapes) or new.names != old.names:
        raise ValueError(f"prior: expected the parameters of {old}, in that order, got {new}")
    return new


def _log_prior(prior: Prior, theta: Array | np.ndarray) -> np.ndarray:
    """Return the log prior density of draws (n, D), shape (n,).

    Raises:
        ValueError: The draws have a batch axis, because x is a batch of observations.
        SbiFlowsError: A draw is outside the prior's support.
    """
    if theta.ndim != 2:
        raise ValueError("x: expected one observation, got a batch")
    return _as_finite(prior.log_prob(theta), "draws outside the support of its prior")


def _site_log_probs(prior: Prior, theta: Array | np.ndarray) -> dict[str, np.ndarray]:
    """Return the log prior density of each named parameter, shape (n,) each."""
    log_probs = prior.site_log_probs(theta).items()
    return {name: np.asarray(value, np.float64) for name, value in log_probs}


def _as_finite(values: Array | np.ndarray, problem: str) -> np.ndarray:
    """Return values as a float64 array; raise SbiFlowsError unless all values are finite."""
    values = np.asarray(values, np.float64)
    if not np.all(np.isfinite(values)):
        raise SbiFlowsError(f"the posterior gave {problem}")
    return values


def _under_new_prior(
    key: Key, old: Prior, new: Prior, theta: Array | np.ndarray, log_prior: np.ndarray
) -> PriorSensitivity:
    """Re-weight draws to another prior.

    If several named parameters have a new prior, the draws are also re-weighted to the new prior
    of each of these parameters alone.
    """
    draws, log_new = np.asarray(theta, np.float64), np.asarray(new.log_prob(theta), np.float64)
    if not np.any(np.isfinite(log_new)):
        raise WeightsUneven("prior: expected one that allows draws of the posterior, got none")
    log_ratios = {"new prior": log_new - log_prior}
    before, after = _site_log_probs(old, theta), _site_log_probs(new, theta)
    sites = {name: log - before[name] for name, log in after.items() if name in before}
    changed = {name: log_ratio for name, log_ratio in sites.items() if not _is_flat(log_ratio)}
    if len(changed) > 1:  # a single changed site repeats the first row
        log_ratios |= {f"new prior of {name}": ratio for name, ratio in changed.items()}
    rows = tuple(_reweighted_row(name, draws, ratio) for name, ratio in log_ratios.items())
    notes = _notes(old, rows)
    is_inside = np.asarray(old.contains(new.sample(key, NUM_PRIOR_DRAWS)))
    outside_share = 1.0 - float(np.mean(is_inside))
    if outside_share > 0.001:
        notes += (
            f"new prior: {outside_share:.1%} of it is outside the support of the posterior's own "
            "prior, where there are no draws to re-weight",
        )
    return PriorSensitivity(old.labels, rows, {}, notes, len(draws))


def _under_powers(
    prior: Prior, draws: np.ndarray, components: Mapping[str, np.ndarray]
) -> PriorSensitivity:
    """Re-weight draws (n, D) to powers of each component, whose log densities are (n,)."""
    rows = tuple(
        _reweighted_row(f"{name} ** {power:g}", draws, (power - 1.0) * log)
        for name, log in components.items()
        for power in POWERS
    )
    sensitivity = {name: _slope(draws, log) for name, log in components.items()}
    return PriorSensitivity(prior.labels, rows, sensitivity, _notes(prior, rows), len(draws))


def _slope(draws: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """Return the change of each marginal per doubling of a component's power, shape (D,).

    The change is the cumulative Jensen-Shannon distance, averaged over `SLOPE_POWER` and its
    inverse, divided by the binary logarithm of `SLOPE_POWER`.
    """
    if _is_flat(log_density):
        return np.zeros(draws.shape[1])
    powers = (1.0 / SLOPE_POWER, SLOPE_POWER)
    down, up = (cjs_distance(draws, reweighted((p - 1.0) * log_density).weights) for p in powers)
    return (down + up) / (2.0 * math.log2(SLOPE_POWER))


def _reweighted_row(name: str, draws: np.ndarray, log_ratio: np.ndarray) -> Reweighted:
    """Compute shift and width of weighted draws (n, D), in posterior standard deviations."""
    n, dim = draws.shape
    shift, width = np.zeros(dim), np.ones(dim)
    # Equal weights are not smoothed: rounding errors would look like a tail.
    is_flat = _is_flat(log_ratio)
    weighting = (
        Reweighting(np.full(n, 1.0 / n), float(n), 0.0) if is_flat else reweighted(log_ratio)
    )
    if not weighting.reliable:
        shift, width = np.full((2, dim), np.nan)
    elif not is_flat:
        z = (draws - draws.mean(axis=0)) / draws.std(axis=0)
        shift = weighting.weights @ z
        width = np.sqrt(weighting.weights @ (z - shift) ** 2)
    return Reweighted(
        name=name,
        shift=shift,
        width=width,
        effective=weighting.effective,
        pareto_k=weighting.pareto_k,
        reliable=bool(weighting.reliable),
        flat=is_flat,
    )


def _is_flat(log_ratio: np.ndarray) -> bool:
    """Return whether all weights are equal up to rounding."""
    return bool(np.all(np.isfinite(log_ratio)) and np.ptp(log_ratio) <= MIN_LOG_RANGE)


def _notes(prior: Prior, rows: tuple[Reweighted, ...]) -> tuple[str, ...]:
    """Return sentences about components without effect and about unreliable weights."""
    notes = []
    flat = [row.name.split(" **")[0] for row in rows if row.flat]
    if flat:
        names = ", ".join(dict.fromkeys(flat))
        notes.append(
            f"{names}: uniform where the draws are, so that no power changes it; "
            "`prior=` compares with another prior"
            if "**" in rows[0].name
            else f"{names}: the same as the posterior's own where the draws are"
        )
    unreliable = [row for row in rows if not row.reliable]
    notes += [
        f"{row.name}: the weights are too uneven to say, effective sample size "
        f"{row.effective:.0f}, Pareto k {row.pareto_k:.2f}; fit again with that prior, or take "
        "more draws"
        if "likelihood" not in row.name
        else f"{row.name}: the weights are too uneven to say; more draws may help"
        for row in unreliable
    ]
    if prior.mass < 1.0:
        notes.append(f"the prior is cut to {prior.mass:.2g} of its mass, and so are all others")
    return tuple(notes)

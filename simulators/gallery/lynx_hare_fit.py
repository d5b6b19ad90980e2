"""Least-squares fit of the lynx-and-hare model, used as summary statistics of the counts.

A neural network infers the phases and amplitudes of two coupled time series with difficulty. A
least-squares fit of the differential equations infers them easily. The fit may be inaccurate: the
posterior is conditioned on the fit and on the counts, and the neural network learns the errors of
the fit.

Public names: `with_fit`, `least_squares_fit`.

References:
    Marquardt 1963, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, SIAM J. Appl.
    Math. 11 (the damping).
    Fearnhead and Prangle 2012, arXiv:1004.1112 (estimates as summary statistics).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.precision import full_precision
from simulators.gallery.lynx_hare_model import YEARS, vector_field

STEPS_PER_YEAR = 6
ITERATIONS = 8
CENTRE = (-0.1, -3.1, -0.1, -3.1, math.log(10.0), math.log(10.0))
SPREAD = (0.6, 0.9, 0.6, 0.9, 1.0, 1.0)
"""Approximate prior mean and standard deviation of log alpha, beta, gamma, delta and z0.

These numbers define a Gaussian penalty in the least-squares fit.
"""

_MAX_LOG_COUNT = 30.0
"""Maximum absolute value of log counts; larger values are clipped, as some populations diverge."""

_VARIANCE_PRIOR = 0.04
"""Squared residual of an added artificial count, which keeps the noise variances positive."""


def with_fit(log_counts: Array) -> dict[str, Array]:
    """Return the log counts (21, 2) together with the least-squares fit to them (14,).

    Example:
        >>> from simulators import lynx_hare
        >>> {name: value.shape for name, value in with_fit(lynx_hare().observation(1)).items()}
        {'log_counts': (21, 2), 'fit': (14,)}
    """
    return {"log_counts": log_counts, "fit": least_squares_fit(log_counts)}


@full_precision
def least_squares_fit(log_counts: Array) -> Array:
    """Fit the six dynamical parameters to log counts by the Levenberg-Marquardt method.

    The initial guess comes from the time derivatives of the two series. The numbers of iterations
    and of Runge-Kutta steps are fixed, so that `jax.vmap` can fit many series at once. The noise
    standard deviation of each species is estimated as well.

    Args:
        log_counts: Logs of the hare and lynx counts in thousands, shape (21, 2).

    Returns:
        Array of shape (14,): the logs of alpha, beta, gamma, delta, z0[0], z0[1]; the log standard
        deviations of the residuals of hare and lynx; the log standard errors of the first six
        entries. All entries are NaN if a count is NaN.

    Example:
        >>> from simulators import lynx_hare
        >>> fit = least_squares_fit(lynx_hare().observation(1))
        >>> [round(float(value), 2) for value in jnp.exp(fit[:4])]
        [0.55, 0.03, 0.79, 0.02]
    """
    log_counts = jnp.asarray(log_counts)
    data = jnp.clip(log_counts, -_MAX_LOG_COUNT, _MAX_LOG_COUNT)
    q = _from_slopes(data)
    point = _linearise(q, data)

    def iteration(carry: tuple[_Point, Array], _: None) -> tuple[tuple[_Point, Array], None]:
        point, damping = carry
        curved = point.hessian + damping * jnp.diag(jnp.diagonal(point.hessian))
        step = jax.scipy.linalg.solve(curved, point.gradient, assume_a="pos")
        new = _linearise(point.q - jnp.clip(step, -1.0, 1.0), data)
        better = new.loss < point.loss  # False if the new loss is not finite
        point = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, point)
        return (point, jnp.where(better, 0.3 * damping, jnp.minimum(4 * damping, 1e4))), None

    (point, _), _ = jax.lax.scan(iteration, (point, jnp.asarray(0.1)), length=ITERATIONS)
    variance = jnp.diagonal(jnp.linalg.inv(point.hessian))
    errors = 0.5 * jnp.log(jnp.maximum(variance, 1e-8))
    fit = jnp.concatenate([point.q, 0.5 * jnp.log(point.sigma2), errors])
    # If no point of the fit has a finite loss, return zeros.
    fit = jnp.where(jnp.isfinite(fit), fit, 0.0)
    return jnp.where(jnp.all(jnp.isfinite(log_counts)), fit, jnp.nan)


class _Point(NamedTuple):
    """Point of the fit: parameters q (6,), residual variances (2,), loss and its derivatives."""

    q: Array
    sigma2: Array
    loss: Array
    gradient: Array
    hessian: Array


def _linearise(q: Array, data: Array) -> _Point:
    """Compute the loss at parameters q (6,) with its gradient and Gauss-Newton Hessian.

    The loss is the negative log of the product of the likelihood and a Gaussian prior. The
    likelihood is maximised over the noise variances.
    """
    centre, spread = jnp.asarray(CENTRE), jnp.asarray(SPREAD)
    solution, tangent_map = jax.linearize(_solve, q)
    jacobian = jax.vmap(tangent_map, out_axes=-1)(jnp.eye(6))
    residual = solution - data
    sigma2 = (jnp.sum(residual**2, axis=0) + _VARIANCE_PRIOR) / (YEARS + 1)
    deviation = (q - centre) / spread
    loss = 0.5 * YEARS * jnp.sum(jnp.log(sigma2)) + 0.5 * jnp.sum(deviation**2)
    loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
    scaled = jacobian / sigma2[None, :, None]
    gradient = jnp.einsum("tka,tk->a", scaled, residual) + deviation / spread
    hessian = jnp.einsum("tka,tkb->ab", scaled, jacobian) + jnp.diag(1 / spread**2)
    return _Point(q, sigma2, loss, gradient, hessian)


def _solve(q: Array) -> Array:
    """Solve for the log populations (21, 2) by the classical Runge-Kutta method."""
    h = 1.0 / STEPS_PER_YEAR
    alpha, beta, gamma, delta = jnp.exp(q[:4])
    theta = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}

    def step(y: Array, _: None) -> tuple[Array, None]:
        a = vector_field(0.0, y, theta)
        b = vector_field(0.0, y + h / 2 * a, theta)
        c = vector_field(0.0, y + h / 2 * b, theta)
        d = vector_field(0.0, y + h * c, theta)
        return y + h / 6 * (a + 2 * b + 2 * c + d), None

    def year(y: Array, _: None) -> tuple[Array, Array]:
        y, _ = jax.lax.scan(step, y, length=STEPS_PER_YEAR)
        return y, y

    _, later = jax.lax.scan(year, q[4:], length=YEARS - 1)
    return jnp.concatenate([q[None, 4:], later])


def _from_slopes(data: Array) -> Array:
    """Estimate the parameters: regress the slope of each log count on the other species' count."""
    level = jnp.exp(jnp.clip(data, -5.0, 6.0))
    middle, slope = (level[1:] + level[:-1]) / 2, jnp.diff(jnp.clip(data, -8.0, 8.0), axis=0)
    hare = _regress(middle[:, 1], slope[:, 0])
    lynx = _regress(middle[:, 0], -slope[:, 1])
    z0 = (jnp.clip(data[0], 0.0, 5.0) + math.log(10.0)) / 2
    return jnp.concatenate([hare, lynx, z0])


def _regress(level: Array, slope: Array) -> Array:
    """Fit slope = rate - interaction * level by ridge regression.

    `slope` is the time derivative of one species' log count, with reversed sign for the lynx.
    `level` is the count of the other species. Return the logs of rate and interaction.
    """
    design = jnp.stack([jnp.ones_like(level), -level], axis=-1)
    weights, centre = jnp.array([1.2, 120.0]), jnp.array([1.0, 0.05])
    gram = design.T @ design + jnp.diag(weights)
    estimate = jnp.linalg.solve(gram, design.T @ slope + weights * centre)
    return jnp.log(jnp.maximum(estimate, jnp.array([0.1, 0.004])))

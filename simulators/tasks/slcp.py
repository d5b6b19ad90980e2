"""SLCP (simple likelihood, complex posterior): infer a Gaussian in the plane from four points.

The posterior has four symmetric modes.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters.sampling import rejection
from simulators.adapters.task import Task

BOUND = 3.0
"""Upper bound of the prior, which is uniform on (-3, 3) in each dimension."""
JITTER = 1e-6
"""Number that is added to both variances of the covariance matrix."""
POINTS = 4
"""Number of independent points (x, y) in one observation."""
DEGREES = 2.5
"""Degrees of freedom of the inverse-Wishart proposal for the covariance."""
MIN_VARIANCE_RATIO = 300.0
"""Ratio of sample variance to jitter below which the jitter affects the posterior."""
METROPOLIS_STEPS = 1000
"""Number of Metropolis steps per draw if the jitter affects the posterior."""

CITATION = (
    "Papamakarios et al. 2019, Sequential Neural Likelihood, arXiv:1805.07226; as in Lueckmann et "
    "al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.3"
)


class Covariance(NamedTuple):
    """Entries and determinant of a 2x2 covariance matrix.

    The determinant is computed separately to avoid cancellation.
    """

    xx: Array
    xy: Array
    yy: Array
    det: Array


@cache
def slcp() -> Task:
    """Make the SLCP task: infer mean and covariance of a Gaussian from four points in the plane.

    The prior is U(-3, 3)^5. The mean is (theta_1, theta_2), the standard deviations are s_1 =
    theta_3^2 and s_2 = theta_4^2, and the correlation is tanh theta_5. The number 1e-6 (jitter) is
    added to both variances. The observation is (x_1, y_1, ..., x_4, y_4). The likelihood does not
    depend on the signs of theta_3 and theta_4.

    Returns:
        The task: theta of shape (5,), x of shape (8,).

    References:
        Papamakarios et al. 2019, arXiv:1805.07226, appendix; Lueckmann et al. 2021,
        arXiv:2101.04653, task T.3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> slcp().simulator(jax.random.key(0), jnp.ones(5)).shape
        (8,)
    """
    return Task(
        name="slcp",
        prior=dist.Uniform(-BOUND, BOUND).expand([5]).to_event(1),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def log_likelihood(theta: Array, x: Array) -> Array:
    """Compute the log likelihood of one observation x (8,) at theta (*, 5), shape (*).

    Example:
        >>> import jax.numpy as jnp
        >>> print(jnp.round(log_likelihood(jnp.array([0.0, 0.0, 1.0, 1.0, 0.0]), jnp.zeros(8)), 3))
        -7.352
    """
    cov = _covariance(theta)
    points = jnp.broadcast_to(x, (*theta.shape[:-1], 2 * POINTS))
    dx, dy = points[..., 0::2] - theta[..., :1], points[..., 1::2] - theta[..., 1:2]
    squares = cov.yy * jnp.sum(dx**2, -1) + cov.xx * jnp.sum(dy**2, -1)
    squares -= 2 * cov.xy * jnp.sum(dx * dy, -1)
    return -0.5 * squares / cov.det - POINTS * (0.5 * jnp.log(cov.det) + math.log(2 * math.pi))


def _simulator(key: Key, theta: Array) -> Array:
    cov = _covariance(theta)
    z = jax.random.normal(key, (POINTS, 2))
    first = jnp.sqrt(cov.xx) * z[:, 0]
    second = cov.xy / jnp.sqrt(cov.xx) * z[:, 0] + jnp.sqrt(cov.det / cov.xx) * z[:, 1]
    return jnp.reshape(theta[None, :2] + jnp.stack([first, second], axis=-1), (2 * POINTS,))


def _covariance(theta: Array) -> Covariance:
    """Compute the covariance of one point at theta (*, 5), including the jitter."""
    a, b = theta[..., 2] ** 4, theta[..., 3] ** 4
    ab = theta[..., 2] ** 2 * theta[..., 3] ** 2
    # 1 - tanh^2 = 1 / cosh^2, which avoids cancellation
    det = (ab / jnp.cosh(theta[..., 4])) ** 2 + JITTER * (a + b) + JITTER**2
    return Covariance(a + JITTER, ab * jnp.tanh(theta[..., 4]), b + JITTER, det)


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    """Draw from the posterior by rejection, and correct for the jitter by Metropolis steps.

    The proposal ignores the jitter. The prior is uniform in (theta_3, theta_4, theta_5). With the
    mean integrated out, the posterior density of the covariance T is then an inverse-Wishart
    density with 2.5 degrees of freedom, times (1 - rho^2)^(1/4), where rho is the correlation. The
    inverse-Wishart is the proposal, and the factor is the acceptance probability. Given T, the mean
    is N(xbar, T / 4). Draws outside the prior's box are rejected. If the points scatter so little
    that the jitter matters, a Metropolis chain starts from each draw.
    """
    x = jnp.asarray(x, jnp.result_type(float))
    start_key, refine_key, sign_key = jax.random.split(key, 3)
    theta = rejection(start_key, lambda k: _propose(k, x, max(n, 1000)), n)
    scatter = jnp.var(jnp.reshape(x, (POINTS, 2)), axis=0)
    steps = jnp.where(jnp.min(scatter) < MIN_VARIANCE_RATIO * JITTER, METROPOLIS_STEPS, 0)
    theta = _refine(refine_key, theta, x, steps)
    # the draws are |theta_3| and |theta_4|; the likelihood does not depend on their signs
    signs = jax.random.rademacher(sign_key, (n, 2), theta.dtype)
    return theta.at[:, 2:4].set(jnp.abs(theta[:, 2:4]) * signs)


@full_precision
def _propose(key: Key, x: Array, m: int) -> tuple[Array, Array]:
    """Propose draws with positive theta_3 and theta_4; return draws (m, 5) and acceptances (m,)."""
    covariance_key, mean_key, uniform_key = jax.random.split(key, 3)
    points = jnp.reshape(x, (POINTS, 2))
    centre = jnp.mean(points, axis=0)
    factor, det = _inverse_wishart(covariance_key, points - centre[None], m)
    shift = jnp.einsum("nij,nj->ni", factor, jax.random.normal(mean_key, (m, 2)))
    variances = jnp.sum(factor**2, axis=-1)
    product = jnp.prod(variances, axis=-1)
    rho = jnp.sum(factor[:, 0] * factor[:, 1], axis=-1) / jnp.sqrt(product)
    accept = (det / product) ** 0.25  # (1 - rho^2)^(1/4)
    theta = jnp.concatenate(
        [centre[None] + shift / 2, variances**0.25, jnp.arctanh(rho)[:, None]], axis=-1
    )
    return theta, _in_box(theta) & (jax.random.uniform(uniform_key, (m,)) < accept)


def _inverse_wishart(key: Key, centred: Array, n: int) -> tuple[Array, Array]:
    """Draw n covariances F F' from the inverse-Wishart distribution given centred points.

    A standard Wishart matrix is W = B B' (Bartlett's decomposition). Then F = L B'^-1, where L L'
    is the scatter matrix of the points.

    Returns:
        F, shape (n, 2, 2), and the determinants of F F', shape (n,).
    """
    a, b = centred[:, 0], centred[:, 1]
    length = jnp.linalg.norm(a)
    along = jnp.dot(a, b) / length
    across = jnp.linalg.norm(b - along / length * a)
    first_key, second_key, normal_key = jax.random.split(key, 3)
    first = jnp.sqrt(jax.random.chisquare(first_key, DEGREES, (n,)))
    second = jnp.sqrt(jax.random.chisquare(second_key, DEGREES - 1, (n,)))
    skew = jax.random.normal(normal_key, (n,)) / (first * second)
    rows = [[length / first, -length * skew], [along / first, across / second - along * skew]]
    factor = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    return factor, (length * across / (first * second)) ** 2


def _refine(key: Key, theta: Array, x: Array, steps: Array) -> Array:
    """Run a random-walk Metropolis chain from each draw (n, 5), with random step sizes."""
    n, dim = theta.shape
    spread = jnp.std(theta, axis=0)

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        theta, logp = state
        scale_key, move_key, uniform_key = jax.random.split(jax.random.fold_in(key, i), 3)
        scale = 2.0 * 0.01 ** jax.random.uniform(scale_key, (n, 1))
        moved = theta + scale * spread[None] * jax.random.normal(move_key, (n, dim))
        moved_logp = jnp.where(_in_box(moved), log_likelihood(moved, x), -jnp.inf)
        accept = jnp.log(jax.random.uniform(uniform_key, (n,))) < moved_logp - logp
        return jnp.where(accept[:, None], moved, theta), jnp.where(accept, moved_logp, logp)

    return lax.fori_loop(0, steps, step, (theta, log_likelihood(theta, x)))[0]


def _in_box(theta: Array) -> Array:
    return jnp.all(jnp.abs(theta) <= BOUND, axis=-1)

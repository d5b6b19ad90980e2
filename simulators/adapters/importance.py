"""Importance resampling for reference posteriors with few parameters and one mode.

Public names: `ImportanceReference`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from numpyro.infer.util import constrain_fn, potential_energy

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters import mcmc

PROPOSALS_PER_DRAW = 8
MIN_PROPOSALS = 4096
MIN_EFFICIENCY = 0.1
"""Minimum ratio of the effective sample size to the number of proposals."""
DEGREES = 5.0
"""Degrees of freedom of the components of the proposal, multivariate t distributions."""
COMPONENTS = 64
"""Number of narrow components of the proposal."""
INFLATION = 1.3
"""Ratio of the squared scale of the broad component to the posterior covariance."""
NARROWING = 0.4
"""Ratio of the squared scale of the narrow components to the posterior covariance."""
BATCH_SIZE = 1024
REFINEMENTS = 2
"""Number of times that draws of the proposal are resampled to make the next proposal."""
START_SIZE = 1024
"""Number of draws in each round of population Monte Carlo."""
START_ROUNDS = 24


@dataclasses.dataclass(frozen=True)
class ImportanceReference:
    """Reference sampler that resamples draws of a proposal near the posterior.

    The proposal is a mixture of multivariate t distributions in unconstrained coordinates. Its
    places and scales come from population Monte Carlo (see `mcmc.starts`). The sampler
    needs no gradients, is faster than NUTS, and works under `jit` and `vmap`. The posterior should
    have about ten parameters at most, and one mode.

    Attributes:
        model: Numpyro model, a function of the observation, as for `mcmc.nuts`.
        sites: Names of the latent sites, in the order of the parameters.

    References:
        Cappe et al. 2004, Population Monte Carlo, J. Comput. Graph. Stat. 13; Douc and Cappe 2005,
        Comparison of resampling schemes for particle filtering, arXiv:cs/0507025, section 2.4
        (systematic resampling).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(mean, 0.1), obs=x)
        >>> sample = ImportanceReference(model, ("mean",))
        >>> draws = sample(jax.random.key(0), jnp.float32(1.0), 1000)
        >>> print(f"{draws.mean():.2f}")
        0.99
    """

    model: Callable[[Any], None]
    sites: tuple[str, ...]

    def __call__(self, key: Key, x: Any, n: int) -> Array:
        """Draw from the posterior given x, shape (n, D).

        All draws are NaN if the effective sample size is less than 10% of the number of proposals.
        """
        return self.diagnosed(key, x, n)[0]

    def diagnosed(self, key: Key, x: Any, n: int) -> tuple[Array, Array]:
        """Draw as `__call__` does, and return the ratio of effective sample size to proposals."""
        with jax.numpy_rank_promotion("allow"):  # numpyro promotes ranks
            return _resample(key, self.model, self.sites, x, n)


@partial(jax.jit, static_argnames=("model", "sites", "n"))
@full_precision
def _resample(
    key: Key, model: Callable[[Any], None], sites: tuple[str, ...], x: Any, n: int
) -> tuple[Array, Array]:
    start_key, draw_key, choice_key, order_key = jax.random.split(key, 4)
    first, covariance = mcmc.starts(start_key, model, x, n=START_SIZE, rounds=START_ROUNDS)
    unravel = ravel_pytree({m: v[0] for m, v in first.items()})[1]
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(first)

    def log_joint(u: Array) -> Array:
        return -potential_energy(model, (x,), {}, unravel(u))

    def propose(key: Key, rows: Array, covariance: Array, count: int) -> tuple[Array, Array]:
        u, log_proposal = _propose(key, rows, covariance, count)
        log_weight = lax.map(log_joint, u, batch_size=BATCH_SIZE) - log_proposal
        return u, jax.nn.softmax(jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))

    def refine(state: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], None]:
        propose_key, choice_key = jax.random.split(key)
        u, weight = propose(propose_key, *state, MIN_PROPOSALS)
        rows = u[jax.random.choice(choice_key, len(u), (len(state[0]),), p=weight)]
        return (rows, jnp.atleast_2d(jnp.cov(rows.T)) + 1e-6 * jnp.eye(rows.shape[1])), None

    refine_key, draw_key = jax.random.split(draw_key)
    keys = jax.random.split(refine_key, REFINEMENTS)
    (rows, covariance), _ = lax.scan(refine, (rows, covariance), keys)
    u, weight = propose(draw_key, rows, covariance, max(MIN_PROPOSALS, PROPOSALS_PER_DRAW * n))
    efficiency = 1.0 / jnp.sum(weight**2) / len(u)
    # systematic resampling: one uniform number in each of n intervals of equal probability
    level = (jnp.arange(n) + jax.random.uniform(choice_key, (n,))) / n
    cumulative = jnp.cumsum(weight)
    chosen = jnp.searchsorted(cumulative, level * cumulative[-1], side="right")
    chosen = jax.random.permutation(order_key, jnp.minimum(chosen, len(u) - 1))

    def constrain(row: Array) -> Array:
        values = constrain_fn(model, (x,), {}, unravel(row))
        return jnp.concatenate([jnp.ravel(values[m]) for m in sites])

    draws = jax.vmap(constrain)(u[chosen])
    return jnp.where(efficiency >= MIN_EFFICIENCY, draws, jnp.nan), efficiency


def _propose(key: Key, rows: Array, covariance: Array, count: int) -> tuple[Array, Array]:
    """Draw from the proposal and return its log density at the draws, up to a constant.

    The proposal is a mixture of t distributions in equal parts: a broad one at the mean of the
    rows, and narrow ones at the first rows, which follow a skewed or curved posterior.

    Args:
        key: Random key.
        rows: Approximate draws of the posterior, in random order, shape (rows, D).
        covariance: Covariance of the posterior, shape (D, D).
        count: Number of proposals.

    Returns:
        Proposals, shape (count, D), and log densities, shape (count,).
    """
    part_key, noise_key, radius_key = jax.random.split(key, 3)
    dim, mean = rows.shape[1], jnp.mean(rows, axis=0)
    factor = jnp.linalg.cholesky(covariance)
    narrow = solve_triangular(factor, (rows[:COMPONENTS] - mean[None]).T, lower=True).T
    centres = jnp.concatenate([jnp.zeros((1, dim)), narrow])
    squared_scale = jnp.full(COMPONENTS + 1, NARROWING).at[0].set(INFLATION)
    log_part = jnp.full(COMPONENTS + 1, -jnp.log(2.0 * COMPONENTS)).at[0].set(-jnp.log(2.0))
    part = jax.random.categorical(part_key, log_part, shape=(count,))
    radius = jnp.sqrt(DEGREES / jax.random.chisquare(radius_key, DEGREES, (count,)))
    noise = radius[:, None] * jax.random.normal(noise_key, (count, dim))
    white = centres[part] + jnp.sqrt(squared_scale[part])[:, None] * noise

    def log_density(row: Array) -> Array:
        squares = jnp.sum((row[None] - centres) ** 2, axis=-1) / squared_scale
        log_t = -0.5 * (DEGREES + dim) * jnp.log1p(squares / DEGREES)
        return logsumexp(log_part + log_t - 0.5 * dim * jnp.log(squared_scale))

    return mean[None] + white @ factor.T, lax.map(log_density, white, batch_size=BATCH_SIZE)

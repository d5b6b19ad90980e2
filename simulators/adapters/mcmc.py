"""NUTS for reference posteriors, with chains that start near the posterior.

Public names: `nuts`, `latent_nuts`, `NutsReference`, `starts`, `latent_sites`,
`tempered_power`, `powered_weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, init_to_median
from numpyro.infer.util import potential_energy

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters.task import ReferenceFailed

CHAINS = 4
MAX_RHAT = 1.02
MAX_DIVERGED = 0.01
"""Maximum fraction of divergent NUTS steps in a reference run."""
EXTRA_FIELDS = ("diverging", "num_steps")


def nuts(
    key: Key,
    model: Callable[[Array], None],
    x: Array,
    *,
    chains: int = CHAINS,
    warmup: int = 150,
    draws: int = 1000,
) -> MCMC:
    """Run NUTS on a numpyro model, all chains in one vectorised program.

    Each chain starts at a draw of a Gaussian approximation to the posterior (see `starts`), whose
    covariance is the inverse mass matrix.

    Args:
        key: Random key.
        model: Numpyro model, a function of the observation x, differentiable in forward mode. If
            it is a module-level function, a second run needs no compilation.
        x: The observation.
        chains: Number of chains.
        warmup: Number of warm-up steps of each chain, which adapt its step size.
        draws: Number of draws of each chain.

    Returns:
        The finished run, for `arviz.from_numpyro` or `.get_samples(group_by_chain=True)`. Its extra
        fields are `diverging` and `num_steps`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> run = nuts(jax.random.key(0), model, jnp.float32(1.0), warmup=50, draws=100)
        >>> run.get_samples()["mean"].shape
        (400,)
    """
    with jax.numpy_rank_promotion("allow"):  # numpyro promotes ranks
        return _nuts(key, model, x, chains, warmup, draws)


@full_precision
def _nuts(
    key: Key, model: Callable[[Array], None], x: Array, chains: int, warmup: int, draws: int
) -> MCMC:
    start_key, run_key = jax.random.split(key)
    first, covariance = starts(start_key, model, x)
    kernel = NUTS(
        model,
        dense_mass=True,
        inverse_mass_matrix={tuple(sorted(first)): covariance},
        adapt_mass_matrix=False,  # a short warm-up would give a worse estimate
        # Adaptation first tries ten times this step. At 10 posterior standard deviations energies
        # overflow, and a chain that gets there does not return.
        step_size=0.1,
        forward_mode_differentiation=True,
        max_tree_depth=(6, 10),
    )
    init = {name: value[:chains] for name, value in first.items()}
    run = _vectorised(kernel, chains, warmup, draws)
    run.run(run_key, x, init_params=init, extra_fields=EXTRA_FIELDS)
    return run


def latent_nuts(
    key: Key,
    model: Callable[[Array], None],
    x: Array,
    *,
    dense: tuple[str, ...],
    chains: int = CHAINS,
    warmup: int = 600,
    draws: int = 1000,
) -> MCMC:
    """Run NUTS on a numpyro model with hundreds of latent variables.

    Each chain starts at the median, site by site, of 15 draws from the prior. The warm-up adapts
    the mass matrix, which is dense for the sites in `dense` and diagonal for all others. The latent
    variables should be nearly independent and of unit scale in the prior (a non-centred model).

    Args:
        key: Random key.
        model: Numpyro model, a function of the observation x, differentiable in reverse mode.
        x: The observation.
        dense: Names of the sites with a dense mass matrix: the parameters.
        chains: Number of chains.
        warmup: Number of warm-up steps of each chain.
        draws: Number of draws of each chain.

    Returns:
        The finished run, as of `nuts`.

    References:
        Papaspiliopoulos, Roberts and Skold 2007, A general framework for the parametrization of
        hierarchical models, Stat. Sci. 22 (non-centred models).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     noise = numpyro.sample("noise", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        ...     numpyro.sample("x", dist.Normal(mean + noise, 1.0).to_event(1), obs=x)
        >>> run = latent_nuts(
        ...     jax.random.key(0), model, jnp.ones(3), dense=("mean",), warmup=50, draws=100
        ... )
        >>> run.get_samples()["noise"].shape
        (400, 3)
    """
    with jax.numpy_rank_promotion("allow"):  # numpyro promotes ranks
        return _latent_nuts(key, model, x, dense, chains, warmup, draws)


@full_precision
def _latent_nuts(
    key: Key,
    model: Callable[[Array], None],
    x: Array,
    dense: tuple[str, ...],
    chains: int,
    warmup: int,
    draws: int,
) -> MCMC:
    kernel = NUTS(
        model,
        dense_mass=[dense],
        target_accept_prob=0.9,
        init_strategy=init_to_median(num_samples=15),
    )
    run = _vectorised(kernel, chains, warmup, draws)
    run.run(key, x, extra_fields=EXTRA_FIELDS)
    return run


def _vectorised(kernel: NUTS, chains: int, warmup: int, draws: int) -> MCMC:
    return MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )


@dataclasses.dataclass(frozen=True)
class NutsReference:
    """Reference sampler that runs NUTS.

    Attributes:
        model: Numpyro model, as for `nuts`.
        sites: Names of the latent sites, in the order of the parameters.
        prepare: Function that converts a task's observation to the model's argument.
        sampler: Function `(key, model, x, draws=...)` that runs NUTS: `nuts`, or
            `functools.partial(latent_nuts, dense=...)`.
    """

    model: Callable[[Array], None]
    sites: tuple[str, ...]
    prepare: Callable[[Array], Array] = jnp.asarray
    sampler: Callable[..., MCMC] = nuts

    def __call__(self, key: Key, x: Array, n: int) -> Array:
        """Draw from the posterior given x, evenly from all chains, shape (n, D).

        Raises:
            ReferenceFailed: Split R-hat exceeds 1.02, or more than 1% of the steps diverged.
        """
        return self.diagnosed(key, x, n)[0]

    def diagnosed(self, key: Key, x: Array, n: int) -> tuple[Array, dict[str, float]]:
        """Draw as `__call__` does, and return diagnostics of the chains as well.

        Returns:
            The draws, shape (n, D), and a dict with `rhat` (the largest split R-hat), `ess` (the
            smallest effective sample size) and `diverged` (the fraction of divergent steps).

        Raises:
            ReferenceFailed: As for `__call__`.
        """
        run = self.sampler(key, self.model, self.prepare(x), draws=max(1000, -(-n // CHAINS)))
        diagnostics = _diagnostics(run)
        _require_converged(diagnostics)
        chains = run.get_samples(group_by_chain=True)
        parts = [jnp.reshape(chains[m], (*chains[m].shape[:2], -1)) for m in self.sites]
        rows = jnp.concatenate(parts, axis=-1)
        rows = jnp.reshape(rows, (-1, rows.shape[-1]))
        return rows[jnp.linspace(0, len(rows) - 1, n).astype(int)], diagnostics


def _diagnostics(run: MCMC) -> dict[str, float]:
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    draws = [np.asarray(v, float) for v in run.get_samples(group_by_chain=True).values()]
    return {
        "rhat": max(float(np.max(split_gelman_rubin(v))) for v in draws),
        "ess": min(float(np.min(effective_sample_size(v))) for v in draws),
        "diverged": float(np.mean(run.get_extra_fields()["diverging"])),
    }


def _require_converged(diagnostics: dict[str, float]) -> None:
    rhat, diverged = diagnostics["rhat"], diagnostics["diverged"]
    if not rhat <= MAX_RHAT or diverged > MAX_DIVERGED:
        raise ReferenceFailed(
            f"NUTS: expected R-hat <= {MAX_RHAT} and at most {MAX_DIVERGED:.0%} divergences, got "
            f"R-hat {rhat:.3f} and {diverged:.1%}"
        )


@partial(jax.jit, static_argnames=("model", "n", "rounds"))
@full_precision
def starts(
    key: Key, model: Callable[[Array], None], x: Array, n: int = 2048, rounds: int = 24
) -> tuple[dict[str, Array], Array]:
    """Draw from a Gaussian approximation to the posterior, in unconstrained coordinates.

    Chains that start at draws of the prior can stay in spurious modes, in which a large noise
    parameter explains any data. Therefore rounds of importance sampling move a Gaussian from the
    prior to the posterior. In each round, the weights are tempered so that the effective sample
    size is at least n / 10.

    Args:
        key: Random key.
        model: A numpyro model, a function of the observation.
        x: The observation.
        n: Number of draws in each round.
        rounds: Number of rounds.

    Returns:
        Draws of each latent site, shape (n, *event), and the covariance matrix of the Gaussian. Its
        rows and columns follow the alphabetical order of the sites' names.

    References:
        Cappe et al. 2004, Population Monte Carlo, J. Comput. Graph. Stat. 13.
    """
    trace_key, prior_key, key = jax.random.split(key, 3)
    sites = latent_sites(trace_key, model, x)
    keys = jax.random.split(prior_key, len(sites))
    prior_draws = {
        m: dist.biject_to(d.support)._inverse(d.sample(k, (n,)))
        for (m, d), k in zip(sites.items(), keys, strict=True)
    }
    unravel = ravel_pytree({m: v[0] for m, v in prior_draws.items()})[1]
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(prior_draws)

    def log_joint(u: Array) -> Array:
        return -potential_energy(model, (x,), {}, unravel(u))

    def one_round(moments: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], Array]:
        draw_key, choice_key = jax.random.split(key)
        proposal = dist.MultivariateNormal(moments[0], 1.5 * moments[1])
        u = proposal.sample(draw_key, (n,))
        log_weight = jax.vmap(log_joint)(u) - proposal.log_prob(u)
        weight = _tempered(jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))
        mean = weight @ u
        centred = u - mean[None]
        covariance = (weight[:, None] * centred).T @ centred + 1e-6 * jnp.eye(len(mean))
        chosen = jax.random.choice(choice_key, n, (n,), p=weight)
        return (mean, covariance), u[chosen]

    moments = (jnp.mean(rows, axis=0), jnp.atleast_2d(jnp.cov(rows.T)))
    (_, covariance), draws = jax.lax.scan(one_round, moments, jax.random.split(key, rounds))
    return jax.vmap(unravel)(draws[-1]), covariance


def latent_sites(
    key: Key, model: Callable[[Array], None], x: Array
) -> dict[str, dist.Distribution]:
    """Return the distributions of the latent sites, which must be independent of each other."""
    trace: dict[str, Any] = handlers.trace(handlers.seed(model, key)).get_trace(x)
    return {
        name: site["fn"]
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def _tempered(log_weight: Array) -> Array:
    """Temper weights by `tempered_power` with an effective size of a tenth, and normalise them."""
    return powered_weights(log_weight, tempered_power(log_weight, 0.1))


def tempered_power(log_weight: Array, min_effective: float, halvings: int = 20) -> Array:
    """Find the largest power <= 1 of weights at which their effective sample size is large enough.

    Args:
        log_weight: Log weights, shape (N,).
        min_effective: Minimum effective sample size, as a fraction of N.
        halvings: Number of bisections; the power is exact to 2^-halvings.

    Returns:
        The power; zero if all powers tried are too large.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        size = 1.0 / jnp.sum(powered_weights(log_weight, middle) ** 2)
        is_enough = size >= min_effective * len(log_weight)
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    low, high = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros(()), jnp.ones(())))
    return jnp.where(high == 1.0, 1.0, low)


def powered_weights(log_weight: Array, power: Array) -> Array:
    """Raise weights to a power and normalise them, shape (N,)."""
    return jax.nn.softmax(jnp.where(jnp.isfinite(log_weight), power * log_weight, -jnp.inf))

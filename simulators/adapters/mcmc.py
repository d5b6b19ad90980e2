"""NUTS for the reference posteriors: chains that start near the posterior and must agree.

Public names: `nuts`, `NutsReference`, `starts`.
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
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import potential_energy

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters.task import ReferenceFailed

CHAINS = 4
MAX_RHAT = 1.02


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

    Args:
        key: Random key.
        model: A numpyro model of the observation x, differentiable in forward mode; a module-level
            function, so that a second run finds it compiled.
        x: The observation.
        chains: Number of chains, each from another draw of a rough posterior; its covariance is
            the first mass matrix.
        warmup: Steps of each chain that adapt its step size.
        draws: Draws of each chain.

    Returns:
        The finished run: `arviz.from_numpyro` and `.get_samples(group_by_chain=True)` read it. Its
        extra fields hold `diverging` and `num_steps`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> run = nuts(jax.random.key(0), model, jnp.float32(1.0), warmup=50, draws=100)
        >>> run.get_samples()["mean"].shape
        (400,)
    """
    with jax.numpy_rank_promotion("allow"):  # numpyro does so
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
        adapt_mass_matrix=False,  # a short warm-up would only blur it
        # adaptation first tries ten times as much: at 10 posterior sds energies overflow, and a
        # chain that is caught there does not come back
        step_size=0.1,
        forward_mode_differentiation=True,
        max_tree_depth=(6, 10),
    )
    run = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    run.run(
        run_key,
        x,
        init_params={name: value[:chains] for name, value in first.items()},
        extra_fields=("diverging", "num_steps"),
    )
    return run


@dataclasses.dataclass(frozen=True)
class NutsReference:
    """A reference sampler `(key, x, n) -> (n, D)` that runs NUTS.

    Attributes:
        model: As for `nuts`.
        sites: Names of the sites, in the order of the columns.
        prepare: What the model observes, from a task's observation.
    """

    model: Callable[[Array], None]
    sites: tuple[str, ...]
    prepare: Callable[[Array], Array] = jnp.asarray

    def __call__(self, key: Key, x: Array, n: int) -> Array:
        """Draw n rows (n, D) from the posterior, from all chains alike.

        Raises:
            ReferenceFailed: The chains disagree (split R-hat above 1.02) or over 1% diverged.
        """
        return self.diagnosed(key, x, n)[0]

    def diagnosed(self, key: Key, x: Array, n: int) -> tuple[Array, dict[str, float]]:
        """The rows, and beside them the worst R-hat, the least ESS and the share that diverged."""
        run = nuts(key, self.model, self.prepare(x), draws=max(1000, -(-n // CHAINS)))
        found = _diagnostics(run)
        _require_converged(found)
        chains = run.get_samples(group_by_chain=True)
        parts = [jnp.reshape(chains[m], (*chains[m].shape[:2], -1)) for m in self.sites]
        rows = jnp.concatenate(parts, axis=-1)
        rows = jnp.reshape(rows, (-1, rows.shape[-1]))
        return rows[jnp.linspace(0, len(rows) - 1, n).astype(int)], found


def _diagnostics(run: MCMC) -> dict[str, float]:
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    draws = [np.asarray(v, float) for v in run.get_samples(group_by_chain=True).values()]
    return {
        "rhat": max(float(np.max(split_gelman_rubin(v))) for v in draws),
        "ess": min(float(np.min(effective_sample_size(v))) for v in draws),
        "diverged": float(np.mean(run.get_extra_fields()["diverging"])),
    }


def _require_converged(found: dict[str, float]) -> None:
    if not found["rhat"] <= MAX_RHAT or found["diverged"] > 0.01:
        raise ReferenceFailed(
            f"NUTS: expected R-hat <= {MAX_RHAT} and at most 1% divergences, got R-hat "
            f"{found['rhat']:.3f} and {found['diverged']:.1%}"
        )


@partial(jax.jit, static_argnames=("model", "n", "rounds"))
@full_precision
def starts(
    key: Key, model: Callable[[Array], None], x: Array, n: int = 2048, rounds: int = 24
) -> tuple[dict[str, Array], Array]:
    """Unconstrained draws (n, *event) of each site close to the posterior, and their covariance.

    Chains that start at draws of the prior may be caught in spurious modes (a large noise explains
    any data). A Gaussian is moved from the prior to the posterior instead, by importance sampling
    in rounds; in each, the weights are tempered until the effective sample size is a tenth of n.

    Source: Cappe et al. 2004, "Population Monte Carlo", J. Comput. Graph. Stat. 13.
    """
    trace_key, prior_key, key = jax.random.split(key, 3)
    sites = _latent_sites(trace_key, model, x)
    keys = jax.random.split(prior_key, len(sites))
    first = {
        m: dist.biject_to(d.support)._inverse(d.sample(k, (n,)))
        for (m, d), k in zip(sites.items(), keys, strict=True)
    }
    unravel = ravel_pytree({m: v[0] for m, v in first.items()})[1]
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(first)

    def log_joint(u: Array) -> Array:
        return -potential_energy(model, (x,), {}, unravel(u))

    def one_round(moments: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], Array]:
        draw_key, choice_key = jax.random.split(key)
        proposal = dist.MultivariateNormal(moments[0], 1.5 * moments[1])
        u = proposal.sample(draw_key, (n,))
        log_weight = jax.vmap(log_joint)(u) - proposal.log_prob(u)
        weight = _tempered(jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))
        mean = weight @ u
        away = u - mean[None]
        covariance = (weight[:, None] * away).T @ away + 1e-6 * jnp.eye(len(mean))
        chosen = jax.random.choice(choice_key, n, (n,), p=weight)
        return (mean, covariance), u[chosen]

    moments = (jnp.mean(rows, axis=0), jnp.atleast_2d(jnp.cov(rows.T)))
    (_, covariance), draws = jax.lax.scan(one_round, moments, jax.random.split(key, rounds))
    return jax.vmap(unravel)(draws[-1]), covariance


def _latent_sites(
    key: Key, model: Callable[[Array], None], x: Array
) -> dict[str, dist.Distribution]:
    """Distributions of the latent sites, which must not depend on each other."""
    trace: dict[str, Any] = handlers.trace(handlers.seed(model, key)).get_trace(x)
    return {
        name: site["fn"]
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def _tempered(log_weight: Array) -> Array:
    """Normalised weights, flattened as little as leaves a tenth of them effective."""

    def weights(power: Array) -> Array:
        return jax.nn.softmax(jnp.where(jnp.isfinite(log_weight), power * log_weight, -jnp.inf))

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = 1.0 / jnp.sum(weights(middle) ** 2) >= 0.1 * len(log_weight)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = jax.lax.fori_loop(0, 20, halve, (jnp.zeros(()), jnp.ones(())))
    return weights(jnp.where(high == 1.0, 1.0, low))

"""The Lotka-Volterra model of `lynx_hare`: its prior, its ODE, and the numpyro model for NUTS.

Public names: `prior`, `vector_field`, `solve`, `numpyro_model`, `nuts`, `sample_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import potential_energy

from sbi_flows.typing import Key
from simulators.task import ReferenceFailed

YEARS = 21
TOLERANCE = 3e-6
"""Relative and absolute, on log populations: errors stay below a hundredth over the prior."""
MAX_STEPS = 512
MAX_LOG = 40.0
CHAINS = 4
MAX_RHAT = 1.02


def prior() -> dict[str, dist.Distribution]:
    """The prior, by name; `sigma` and `z0` hold the hare's entry, then the lynx's.

    Example:
        >>> list(prior())
        ['alpha', 'beta', 'gamma', 'delta', 'sigma', 'z0']
    """
    rate = dist.TruncatedNormal(1.0, 0.5, low=0.0)
    interaction = dist.TruncatedNormal(0.05, 0.05, low=0.0)
    return {
        "alpha": rate,
        "beta": interaction,
        "gamma": rate,
        "delta": interaction,
        "sigma": dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1),
        "z0": dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1),
    }


def solve(
    theta: Mapping[str, Array],
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Array:
    """Log populations of hare and lynx at the end of 0, 1, ..., 20 years.

    In log populations the equations are alpha - beta exp(v) and -gamma + delta exp(u): populations
    may fall to exp(-300) without underflow, and their eigenvalues are imaginary, so that an
    explicit solver (Tsit5) needs no tiny steps for stability.

    Args:
        theta: `alpha`, `beta`, `gamma`, `delta` (one number each) and `z0` (2,); others are
            ignored.
        tolerance: Relative and absolute tolerance of the adaptive steps.
        max_steps: Bound on the number of steps, rejected ones included.

    Returns:
        Shape (21, 2), log thousands; all NaN if the steps did not suffice. Differentiable in
        forward mode (`jax.jvp`, `jax.jacfwd`).

    Example:
        >>> import jax.numpy as jnp
        >>> theta = dict(alpha=0.55, beta=0.028, gamma=0.8, delta=0.024, z0=jnp.array([34.0, 6.0]))
        >>> solve(theta).shape
        (21, 2)
    """
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=YEARS - 1.0,
        dt0=0.05,
        y0=jnp.log(theta["z0"]),
        args={name: theta[name] for name in ("alpha", "beta", "gamma", "delta")},
        saveat=diffrax.SaveAt(ts=jnp.arange(float(YEARS))),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
        throw=False,
    )
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, jnp.asarray(solution.ys), jnp.nan)


def vector_field(t: Any, y: Array, theta: Mapping[str, Array]) -> Array:
    """Rates of change of the log populations.

    A trial step may overshoot to a log population in the thousands: an infinite rate would make
    the error estimate NaN and stall the step-size control, a huge one is rejected as it should be.
    """
    hare, lynx = jnp.exp(jnp.minimum(y, MAX_LOG))
    return jnp.stack(
        [theta["alpha"] - theta["beta"] * lynx, theta["delta"] * hare - theta["gamma"]]
    )


def numpyro_model(log_counts: Array | None = None) -> None:
    """The same model for numpyro's samplers; sites are the prior's, and `log_counts` (21, 2).

    Use forward-mode differentiation, as `nuts` does.

    Example:
        >>> import jax
        >>> from numpyro.infer import Predictive
        >>> predictive = Predictive(numpyro_model, num_samples=3)
        >>> predictive(jax.random.key(0))["log_counts"].shape
        (3, 21, 2)
    """
    theta = {name: numpyro.sample(name, site) for name, site in prior().items()}
    noise = dist.Normal(solve(theta), theta["sigma"][None, :]).to_event(2)
    numpyro.sample("log_counts", noise, obs=log_counts)


def nuts(
    key: Key, log_counts: Array, *, chains: int = CHAINS, warmup: int = 150, draws: int = 1000
) -> MCMC:
    """Run NUTS on the model, all chains in one vectorised program.

    Args:
        key: Random key.
        log_counts: Observed log counts, shape (21, 2).
        chains: Number of chains, each from another draw of a rough posterior; its covariance is
            the first mass matrix.
        warmup: Steps of each chain that adapt its step size.
        draws: Draws of each chain.

    Returns:
        The finished run: `arviz.from_numpyro` and `.get_samples(group_by_chain=True)` read it. Its
        extra fields hold `diverging` and `num_steps`.

    Raises:
        ValueError: The counts have another shape or are not finite.
    """
    log_counts = _checked(log_counts)
    start_key, run_key = jax.random.split(key)
    starts, covariance = _starts(start_key, log_counts)
    kernel = NUTS(
        numpyro_model,
        dense_mass=True,  # rates and interactions are correlated up to .95
        inverse_mass_matrix={tuple(sorted(starts)): covariance},
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
        log_counts,
        init_params={name: value[:chains] for name, value in starts.items()},
        extra_fields=("diverging", "num_steps"),
    )
    return run


def sample_reference(key: Key, x: Array, n: int) -> Array:
    """Draw from the posterior by NUTS: n rows (n, 8) in the prior's order, from all chains alike.

    Raises:
        ReferenceFailed: The chains disagree (split R-hat above 1.02) or over 1% diverged.
    """
    run = nuts(key, x, draws=max(1000, -(-n // CHAINS)))
    _require_converged(run)
    chains = run.get_samples(group_by_chain=True)
    parts = [jnp.reshape(chains[m], (*chains["alpha"].shape, -1)) for m in prior()]
    rows = jnp.concatenate(parts, axis=-1)
    rows = jnp.reshape(rows, (-1, rows.shape[-1]))
    return rows[jnp.linspace(0, len(rows) - 1, n).astype(int)]


def _require_converged(run: MCMC) -> None:
    from numpyro.diagnostics import split_gelman_rubin

    draws = run.get_samples(group_by_chain=True)
    rhat = max(float(jnp.max(split_gelman_rubin(v))) for v in draws.values())
    diverged = float(jnp.mean(run.get_extra_fields()["diverging"]))
    if not rhat <= MAX_RHAT or diverged > 0.01:
        raise ReferenceFailed(
            f"NUTS: expected R-hat <= {MAX_RHAT} and at most 1% divergences, got R-hat "
            f"{rhat:.3f} and {diverged:.1%}"
        )


@partial(jax.jit, static_argnames=("n", "rounds"))
def _starts(
    key: Key, log_counts: Array, n: int = 2048, rounds: int = 24
) -> tuple[dict[str, Array], Array]:
    """Unconstrained draws (n, *event) close to the posterior, and their covariance (8, 8).

    Chains that start at draws of the prior are caught in spurious modes (a large sigma explains any
    data). A Gaussian is moved from the prior to the posterior instead, by importance sampling in
    rounds; in each, the weights are tempered until the effective sample size is a tenth of n.

    Source: Cappe et al. 2004, "Population Monte Carlo", J. Comput. Graph. Stat. 13.
    """
    prior_key, key = jax.random.split(key)
    sites = prior()
    keys = jax.random.split(prior_key, len(sites))
    first = {
        m: dist.biject_to(d.support)._inverse(d.sample(k, (n,)))
        for (m, d), k in zip(sites.items(), keys, strict=True)
    }
    unravel = ravel_pytree({m: v[0] for m, v in first.items()})[1]
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(first)

    def log_joint(u: Array) -> Array:
        return -potential_energy(numpyro_model, (log_counts,), {}, unravel(u))

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

    moments = (jnp.mean(rows, axis=0), jnp.cov(rows.T))
    (_, covariance), draws = jax.lax.scan(one_round, moments, jax.random.split(key, rounds))
    return jax.vmap(unravel)(draws[-1]), covariance


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


def _checked(log_counts: Any) -> Array:
    log_counts = jnp.asarray(log_counts, jnp.result_type(float))
    if log_counts.shape != (YEARS, 2):
        raise ValueError(f"log_counts: expected shape ({YEARS}, 2), got {log_counts.shape}")
    if not bool(jnp.all(jnp.isfinite(log_counts))):
        raise ValueError("log_counts: expected finite values, got NaN or infinity")
    return log_counts

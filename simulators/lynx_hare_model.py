"""The Lotka-Volterra model of `lynx_hare`: its prior, its ODE, and the numpyro model for NUTS.

Public names: `prior`, `solve`, `numpyro_model`, `nuts`, `sample_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import MCMC, NUTS

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
        diffrax.ODETerm(_field),
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


def _field(t: Any, y: Array, theta: Mapping[str, Array]) -> Array:
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
    key: Key, log_counts: Array, *, chains: int = CHAINS, warmup: int = 400, draws: int = 1000
) -> MCMC:
    """Run NUTS on the model, all chains in one vectorised program.

    Args:
        key: Random key.
        log_counts: Observed log counts, shape (21, 2).
        chains: Number of chains, each from a different draw of the prior that fits the data.
        warmup: Steps of adaptation of each chain.
        draws: Draws of each chain.

    Returns:
        The finished run: `arviz.from_numpyro` and `.get_samples(group_by_chain=True)` read it. Its
        extra fields hold `diverging` and `num_steps`.

    Raises:
        ValueError: The counts have another shape or are not finite.
    """
    log_counts = _checked(log_counts)
    start_key, run_key = jax.random.split(key)
    kernel = NUTS(
        numpyro_model,
        dense_mass=True,  # rates and interactions are correlated up to .95: a sixth of the steps
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
        init_params=_starts(start_key, log_counts, chains),
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


def _starts(key: Key, log_counts: Array, chains: int, n: int = 4096) -> dict[str, Any]:
    """The prior draws that fit best, unconstrained: away from them lie spurious modes."""
    sites = prior()
    keys = jax.random.split(key, len(sites))
    theta = {m: d.sample(k, (n,)) for (m, d), k in zip(sites.items(), keys, strict=True)}
    best = jax.lax.top_k(_fit(theta, log_counts), chains)[1]
    return {m: dist.biject_to(d.support)._inverse(theta[m][best]) for m, d in sites.items()}


@jax.jit
def _fit(theta: dict[str, Array], log_counts: Array) -> Array:
    """Log likelihood of n parameter sets, shape (n,); -inf where the solve failed."""

    def one(theta: dict[str, Array]) -> Array:
        noise = dist.Normal(solve(theta), theta["sigma"][None, :])
        return jnp.sum(noise.log_prob(log_counts))

    log_likelihood = jax.vmap(one)(theta)
    return jnp.where(jnp.isnan(log_likelihood), -jnp.inf, log_likelihood)


def _checked(log_counts: Any) -> Array:
    log_counts = jnp.asarray(log_counts, jnp.result_type(float))
    if log_counts.shape != (YEARS, 2):
        raise ValueError(f"log_counts: expected shape ({YEARS}, 2), got {log_counts.shape}")
    if not bool(jnp.all(jnp.isfinite(log_counts))):
        raise ValueError("log_counts: expected finite values, got NaN or infinity")
    return log_counts

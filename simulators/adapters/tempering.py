"""Sequential Monte Carlo for reference posteriors that are curved or have several modes.

Public names: `TemperedReference`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer.util import potential_energy

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters.mcmc import MAX_RHAT, latent_sites, powered_weights, tempered_power
from simulators.adapters.task import ReferenceFailed

POPULATIONS, SIZE = 4, 1024
"""Number of independent populations, and of draws in each of them."""
MOVES, LAST_MOVES = 8, 120
"""Number of Metropolis steps at each temperature, and at the end."""
MIN_EFFECTIVE = 0.5
"""Minimum effective sample size after a change of the power, as a fraction of the population."""
HALVINGS = 30
"""Number of bisections that find the next power."""
PROPOSAL_SCALES = (1.0, 0.5, 0.1)
"""Lengths of the differences between two draws in a proposal, relative to 2.38 / sqrt(2 D)."""
JITTER = 1e-3
"""Standard deviation of the noise of a proposal, in unconstrained coordinates."""
BATCH_SIZE = 256
"""Number of draws whose densities are evaluated at once."""


@dataclasses.dataclass(frozen=True)
class TemperedReference:
    """Reference sampler: sequential Monte Carlo from the prior to the posterior.

    The likelihood is raised to a power that grows from 0 to 1. After each step the draws are
    resampled, and moved by Metropolis steps. A proposal adds the difference of two other draws
    (differential evolution), so that its length and direction suit the posterior. Several
    independent populations show whether the result can be trusted. The sampler needs about a
    million evaluations of the density, and no gradients.

    Attributes:
        model: Numpyro model, a function of the observation, as for `mcmc.nuts`.
        sites: Names of the latent sites, in the order of the parameters.

    References:
        Del Moral, Doucet and Jasra 2006, Sequential Monte Carlo samplers, J. R. Stat. Soc. B 68;
        ter Braak 2006, A Markov chain Monte Carlo version of the genetic algorithm differential
        evolution, Stat. Comput. 16.
    """

    model: Callable[[Any], None]
    sites: tuple[str, ...]

    def __call__(self, key: Key, x: Any, n: int) -> Array:
        """Draw from the posterior given x, evenly from all populations, shape (n, D).

        Draws repeat if n exceeds 4,096.

        Raises:
            ReferenceFailed: R-hat of the populations exceeds 1.02.
        """
        with jax.numpy_rank_promotion("allow"):  # numpyro promotes ranks
            populations = _populations(key, self.model, self.sites, x)
        rhat = float(np.max(split_gelman_rubin(np.asarray(populations, float))))
        if not rhat <= MAX_RHAT:
            raise ReferenceFailed(
                f"expected R-hat <= {MAX_RHAT} between populations, got {rhat:.3f}"
            )
        each = -(-n // POPULATIONS)
        chosen = populations[:, jnp.linspace(0, populations.shape[1] - 1, each).astype(int)]
        return jnp.swapaxes(chosen, 0, 1).reshape(-1, populations.shape[-1])[:n]


class _State(NamedTuple):
    """Draws (N, D) in unconstrained coordinates, and log prior and log likelihood (N,)."""

    u: Array
    log_prior: Array
    log_likelihood: Array


@partial(jax.jit, static_argnames=("model", "sites"))
@full_precision
def _populations(key: Key, model: Callable[[Any], None], sites: tuple[str, ...], x: Any) -> Array:
    """Return draws of each parameter from each population, shape (populations, draws, D)."""
    trace_key, key = jax.random.split(key)
    sites_of = latent_sites(trace_key, model, x)
    unravel = ravel_pytree({m: d.sample(trace_key) for m, d in sites_of.items()})[1]

    def log_prior(u: Array) -> Array:
        total = jnp.zeros(())
        for name, value in unravel(u).items():
            transform = dist.biject_to(sites_of[name].support)
            y = transform(value)
            total += jnp.sum(sites_of[name].log_prob(y))
            total += jnp.sum(transform.log_abs_det_jacobian(value, y))
        return total

    def evaluate(u: Array) -> _State:
        prior = lax.map(log_prior, u, batch_size=BATCH_SIZE)
        energy = partial(potential_energy, model, (x,), {})
        joint = lax.map(lambda row: -energy(unravel(row)), u, batch_size=BATCH_SIZE)
        likelihood = jnp.where(jnp.isnan(joint), -jnp.inf, joint - prior)
        return _State(u, prior, likelihood)

    def first(key: Key) -> _State:
        keys = jax.random.split(key, len(sites_of))
        draws = {
            m: dist.biject_to(d.support).inv(d.sample(k, (SIZE,)))
            for (m, d), k in zip(sites_of.items(), keys, strict=True)
        }
        return evaluate(jax.vmap(lambda tree: ravel_pytree(tree)[0])(draws))

    def population(key: Key) -> Array:
        first_key, key = jax.random.split(key)
        state = _anneal(key, evaluate, first(first_key))
        values = jax.vmap(unravel)(state.u)
        parts = [dist.biject_to(sites_of[m].support)(values[m]) for m in sites]
        return jnp.concatenate([part.reshape(SIZE, -1) for part in parts], axis=-1)

    return lax.map(population, jax.random.split(key, POPULATIONS))


def _anneal(key: Key, evaluate: Callable[[Array], _State], state: _State) -> _State:
    """Move draws of the prior to the posterior."""

    def one_temperature(carry: tuple[Key, Array, _State]) -> tuple[Key, Array, _State]:
        key, power, state = carry
        key, choice_key, move_key = jax.random.split(key, 3)
        rest = (1.0 - power) * state.log_likelihood
        # the smallest step is positive, so that the loop ends
        step = jnp.maximum(tempered_power(rest, MIN_EFFECTIVE, HALVINGS), 0.5**HALVINGS)
        power, weight = power + step * (1.0 - power), powered_weights(rest, step)
        level = (jnp.arange(SIZE) + jax.random.uniform(choice_key)) / SIZE
        index = jnp.minimum(jnp.searchsorted(jnp.cumsum(weight), level), SIZE - 1)
        state = jax.tree.map(lambda a: a[index], state)
        return key, power, _moved(move_key, evaluate, state, power, MOVES)

    start = (key, jnp.zeros((), state.u.dtype), state)
    key, power, state = lax.while_loop(lambda carry: carry[1] < 1.0, one_temperature, start)
    return _moved(key, evaluate, state, power, LAST_MOVES)


def _moved(
    key: Key, evaluate: Callable[[Array], _State], state: _State, power: Array, count: int
) -> _State:
    """Move all draws by Metropolis steps that leave the tempered posterior unchanged."""
    size, dim = state.u.shape
    half = size // 2

    def move(state: _State, key: Key) -> tuple[_State, None]:
        # one half moves along differences within the other half, which stays where it is
        for part in (0, 1):
            key, pair_key, length_key, noise_key, accept_key = jax.random.split(key, 5)
            moving = jax.tree.map(lambda a, p=part: a[p * half : (p + 1) * half], state)
            others = state.u[(1 - part) * half : (2 - part) * half]
            pair = jax.random.randint(pair_key, (2, half), 0, half)
            length = jax.random.choice(length_key, jnp.asarray(PROPOSAL_SCALES), (half, 1))
            difference = others[pair[0]] - others[pair[1]]
            noise = JITTER * jax.random.normal(noise_key, (half, dim))
            proposed = evaluate(moving.u + length * 2.38 / (2 * dim) ** 0.5 * difference + noise)
            gain = proposed.log_prior - moving.log_prior
            gain += power * (proposed.log_likelihood - moving.log_likelihood)
            accepted = jnp.log(jax.random.uniform(accept_key, (half,))) < gain
            kept = jax.tree.map(
                lambda a, b, ok=accepted: jnp.where(ok.reshape(half, *[1] * (a.ndim - 1)), a, b),
                proposed,
                moving,
            )
            rest = jax.tree.map(lambda a, p=part: a[(1 - p) * half : (2 - p) * half], state)
            order = (kept, rest) if part == 0 else (rest, kept)
            state = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *order)
        return state, None

    return lax.scan(move, state, jax.random.split(key, count))[0]

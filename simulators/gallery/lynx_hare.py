"""Lynx and hare: Lotka-Volterra model of the pelt counts of the Hudson's Bay Company, 1900-1920."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters import mcmc
from simulators.adapters.task import Task
from simulators.gallery.lynx_hare_model import YEARS, as_log_counts, numpyro_model, prior, solve

FIRST_YEAR = 1900

PELTS = np.array(
    [
        (30.0, 4.0),
        (47.2, 6.1),
        (70.2, 9.8),
        (77.4, 35.2),
        (36.3, 59.4),
        (20.6, 41.7),
        (18.1, 19.0),
        (21.4, 13.0),
        (22.0, 8.3),
        (25.4, 9.1),
        (27.1, 7.4),
        (40.3, 8.0),
        (57.0, 12.3),
        (76.6, 19.5),
        (52.3, 45.7),
        (19.5, 51.1),
        (11.2, 29.7),
        (7.6, 15.8),
        (14.6, 9.7),
        (16.2, 10.1),
        (24.7, 8.6),
    ]
)
"""Numbers of hare and lynx pelts in thousands, one row per year from 1900 to 1920."""

CITATION = (
    "Hewitt 1921, The Conservation of the Wild Life of Canada (data); Carpenter 2018, "
    "Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan (model and prior)"
)


@cache
def lynx_hare() -> Task:
    """Make the lynx and hare task: a Lotka-Volterra model with log-normal noise, and real data.

    The populations of hare, u, and lynx, v, in thousands, follow

        du/dt = (alpha - beta v) u,    dv/dt = (-gamma + delta u) v,    (u, v)(0) = z0.

    The hare count of a year is LogNormal(log u(t), sigma[0]), and the lynx count is
    LogNormal(log v(t), sigma[1]). Priors: alpha, gamma ~ N(1, .5) and beta, delta ~ N(.05, .05),
    all truncated to positive values; sigma ~ LogNormal(-1, 1); z0 ~ LogNormal(log 10, 1). The
    second arguments of N and LogNormal are standard deviations, for LogNormal those of the
    logarithm. In numbered notation alpha, beta, gamma, delta are theta_1, ..., theta_4.

    The observation is the LOG of the counts, shape (21, 2). Under the prior, log counts range from
    about -370 to 70, so most counts would underflow in float32. If the solver reaches its step
    limit, the simulation is NaN, which marks it as invalid.

    Returns:
        The task: theta named `alpha` (hare growth, 1/year), `beta` (predation, per thousand lynx
        and year), `gamma` (lynx decline, 1/year), `delta` (lynx growth, per thousand hares and
        year), `sigma` (2,) and `z0` (2,), hare first; x of shape (21, 2), the log of the counts in
        thousands. The reference sampler is NUTS with the same likelihood. NUTS takes about a
        minute.

    References:
        Hewitt 1921 (data); Carpenter 2018, Stan case studies 5 (model and prior).

    Example:
        >>> lynx_hare().observation(1).shape
        (21, 2)
        >>> lynx_hare().labels[:5]
        ('alpha', 'beta', 'gamma', 'delta', 'sigma[0]')
    """
    return Task(
        name="lynx_hare",
        prior=prior(),
        simulator=_simulator,
        citation=CITATION,
        stored_as="lynx_hare",
        sample_reference=mcmc.NutsReference(numpyro_model, tuple(prior()), prepare=as_log_counts),
        num_observations=1,
        observed=np.log(PELTS, dtype=np.float32, casting="same_kind")[None],
    )


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    noise = jax.random.normal(key, (YEARS, 2))
    return solve(theta) + jnp.asarray(theta["sigma"])[None, :] * noise

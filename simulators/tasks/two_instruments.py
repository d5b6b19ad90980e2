"""Two instruments: infer amplitude, slope and redshift from a spectrum and a measured redshift.

Either instrument may be missing.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters import missing
from simulators.adapters.task import Task

CHANNELS = 100
"""Number of channels of the spectrum."""
LINE_WIDTH = 0.1
"""Standard deviation of the spectral line; the channels lie on [-1, 1]."""
LINE_SHIFT = 0.03
"""Shift of the line for one unit of redshift."""
NOISE = {"spectrum": 1.0, "redshift": 0.3}
"""Standard deviation of the noise of each instrument."""
LINE_HEIGHT = 3.0

CITATION = (
    "Bishop 2006, Pattern Recognition and Machine Learning, section 2.3.3 (linear Gaussian models)"
)


@cache
def two_instruments() -> Task:
    """Make the two instruments task: amplitude, slope and redshift, a linear Gaussian model.

    The spectrometer measures, in channel u of 100 on [-1, 1],

        spectrum(u) = amplitude + slope u - 0.03 redshift g'(u) + noise,    g(u) = 3 exp(-50 u^2).

    The term with g' is, to first order, the effect of shifting a spectral line:
    g(u - 0.03 redshift) - g(u). The second instrument measures the redshift itself. The standard
    deviation of the noise is 1 for the spectrum and 0.3 for the redshift. The priors are N(0, 1).
    All entries of a missing instrument are NaN. The posterior is Gaussian; it is the prior if both
    are missing.

    Returns:
        The task: theta named `amplitude`, `slope`, `redshift`; x a dict of `spectrum` (100,) and
        `redshift` ().

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 2.3.3.

    Example:
        >>> x = two_instruments().observation(1)
        >>> x["spectrum"].shape, x["redshift"].shape
        ((100,), ())
    """
    return Task(
        name="two_instruments",
        prior={name: dist.Normal(0.0, 1.0) for name in ("amplitude", "slope", "redshift")},
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def observation(i: int, instruments: Collection[str] = tuple(NOISE)) -> dict[str, Array]:
    """Return observation i with NaN for the instruments that are not in `instruments`.

    Raises:
        ValueError: i is out of range, or an instrument is unknown.

    Example:
        >>> print(observation(1, instruments=("spectrum",))["redshift"])
        nan
    """
    unknown = set(instruments) - set(NOISE)
    if isinstance(instruments, str) or unknown:
        raise ValueError(f"instruments: expected names out of {tuple(NOISE)}, got {instruments!r}")
    x = two_instruments().observation(i)
    return {m: x[m] if m in instruments else jnp.full_like(x[m], jnp.nan) for m in NOISE}


@cache
def design_matrix() -> np.ndarray:
    """Return the derivatives of the means of all 101 measurements, shape (101, 3), float32.

    Columns are amplitude, slope and redshift. The last row is the measured redshift.

    Example:
        >>> print(design_matrix()[-1])
        [0. 0. 1.]
    """
    u = np.linspace(-1.0, 1.0, CHANNELS)
    line = LINE_HEIGHT * np.exp(-0.5 * (u / LINE_WIDTH) ** 2)
    columns = np.stack([np.ones(CHANNELS), u, LINE_SHIFT * u / LINE_WIDTH**2 * line], axis=1)
    return np.concatenate([columns, [[0.0, 0.0, 1.0]]]).astype(np.float32)


def _noise_scale() -> Array:
    return jnp.full(CHANNELS + 1, NOISE["spectrum"]).at[-1].set(NOISE["redshift"])


@full_precision
def _simulator(key: Key, theta: dict[str, Array]) -> dict[str, Array]:
    strengths = jnp.stack([theta["amplitude"], theta["slope"], theta["redshift"]])
    noise = _noise_scale() * jax.random.normal(key, (CHANNELS + 1,))
    measured = jnp.asarray(design_matrix()) @ strengths + noise
    return {"spectrum": measured[:-1], "redshift": measured[-1]}


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: dict[str, Array], n: int) -> Array:
    measured = jnp.append(x["spectrum"], x["redshift"])
    design = jnp.asarray(design_matrix())
    return missing.gaussian_posterior(key, design, _noise_scale(), measured, n)

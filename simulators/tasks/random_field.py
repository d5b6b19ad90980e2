"""Random field: infer the power spectrum of a Gaussian random field from a noisy image of it."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.grid import sample_grid
from simulators.adapters.task import Task

SIZE = 64
"""Number of pixels along each side of the image."""
LOW = (-1.0, -4.0)
HIGH = (3.0, -1.0)
"""Bounds of the uniform priors of log amplitude and index."""
NOISE = 1.0
"""Standard deviation of the white noise of a pixel."""
PIVOT = 8
"""The amplitude is the power at the wave number `size` / `PIVOT`."""

CITATION = (
    "Peacock 1999, Cosmological Physics, chapter 16 (Gaussian random fields and their power "
    "spectra); likelihood of independent Fourier modes as in Bond, Jaffe and Knox 1998, "
    "astro-ph/9708203"
)


@cache
def random_field(size: int = SIZE) -> Task:
    """Make the random field task: a periodic Gaussian field with a power-law spectrum, plus noise.

    Mode k of the orthonormal discrete Fourier transform has variance P(k) + 1, where

        P(k) = exp(log_amplitude) (|k| / (size / 8))^index    for k != 0,    P(0) = 0,

    k is in cycles per image, and the term 1 is the variance of the white noise. The priors are
    log_amplitude ~ U(-1, 3) and index ~ U(-4, -1). The modes are independent, so the likelihood is
    known exactly. No pixel may be missing.

    Args:
        size: Number of pixels along each side of the image; even, and at least 16.

    Returns:
        The task: theta named `log_amplitude`, `index`; x of shape (size, size). The reference is an
        adaptive grid.

    Raises:
        ValueError: `size` is odd or too small.

    References:
        Bond, Jaffe and Knox 1998, astro-ph/9708203.

    Example:
        >>> random_field(size=16).observation(1).shape
        (16, 16)
    """
    if size < 16 or size % 2:
        raise ValueError(f"size: expected an even number >= 16, got {size}")
    bounds = zip(("log_amplitude", "index"), LOW, HIGH, strict=True)
    return Task(
        name="random_field" if size == SIZE else f"random_field_{size}",
        prior={name: dist.Uniform(low, high) for name, low, high in bounds},
        simulator=partial(_simulator, size),
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def log_likelihood(theta: Array, x: Array) -> Array:
    """Compute the log likelihood of an image x (size, size) at theta (2,), up to a constant.

    The constant depends on neither theta nor x.

    Example:
        >>> x = jnp.zeros((16, 16))
        >>> bool(log_likelihood(jnp.array([0.0, -2.0]), x) < 0)
        True
    """
    return _log_likelihood(theta, mode_powers(x), x.shape[0])


def mode_powers(x: Array) -> Array:
    """Sum the squared moduli of the Fourier modes with equal |k|, shape (number of |k|,).

    These sums are sufficient statistics.

    Example:
        >>> mode_powers(jnp.zeros((16, 16))).shape
        (42,)
    """
    _, _, index = _wave_numbers(x.shape[0])
    power = jnp.abs(jnp.fft.fft2(x, norm="ortho")) ** 2
    return jnp.zeros(index.max() + 1, power.dtype).at[jnp.asarray(index)].add(power)


@cache
def _wave_numbers(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct |k|^2, the number of modes with each, and the index of each mode."""
    k = np.rint(np.fft.fftfreq(size) * size).astype(int)
    squares, index, counts = np.unique(
        k[:, None] ** 2 + k**2, return_inverse=True, return_counts=True
    )
    return squares, counts, index.reshape(size, size)


def _variances(theta: Array, size: int) -> Array:
    """Compute the variance of a mode for each |k|, shape (number of |k|,)."""
    squares = _wave_numbers(size)[0]
    log_k = 0.5 * np.log(np.maximum(squares, 1)) - np.log(size / PIVOT)
    log_power = theta[0] + theta[1] * jnp.asarray(log_k, theta.dtype)
    return jnp.where(jnp.asarray(squares > 0), jnp.exp(log_power), 0.0) + NOISE**2


def _log_likelihood(theta: Array, powers: Array, size: int) -> Array:
    # a mode and its conjugate share their numbers: two real degrees of freedom for two modes
    variances = _variances(theta, size)
    counts = jnp.asarray(_wave_numbers(size)[1], variances.dtype)
    return -0.5 * jnp.sum(counts * jnp.log(variances) + powers / variances)


def _simulator(size: int, key: Key, theta: dict[str, Array]) -> Array:
    flat = jnp.stack([theta["log_amplitude"], theta["index"]])
    scale = jnp.sqrt(_variances(flat, size))[jnp.asarray(_wave_numbers(size)[2])]
    white = jax.random.normal(key, (size, size))
    return jnp.fft.ifft2(scale * jnp.fft.fft2(white)).real


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    powers, size = mode_powers(x), x.shape[0]

    def log_density(theta: Array) -> Array:
        return _log_likelihood(theta, powers, size)

    return sample_grid(key, log_density, jnp.array(LOW), jnp.array(HIGH), n)

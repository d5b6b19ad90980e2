"""Samplers that take a fixed number of steps along a Gaussian path.

A velocity v at a point z and an angle predicts the data point sin(angle) z + cos(angle) v and the
noise cos(angle) z - sin(angle) v. A step keeps the predicted data point and reduces the noise. A
step is exact if the data distribution is a single point. Otherwise its error decreases as the
number of steps increases.

Public names: `Sampler`, `VelocityFunction`, `Heun`, `Ancestral`, `data_point`, `score`,
`step_toward`, `target_of_step`.

Sources: Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502); Karras et al.
2022 (arXiv:2206.00364), algorithm 1; Lu et al. 2022, "DPM-Solver" (arXiv:2206.00927).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key
from sbi_flows.densities.paths import Path

VelocityFunction = Callable[[Array, Array], Array]
"""Function from points (*, d) and an angle () to the velocity (*, d)."""


@runtime_checkable
class Sampler(Protocol):
    """Protocol of samplers: frozen, hashable settings that can be called to draw points."""

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Draw points (*, d), starting from noise (*, d).

        Args:
            path: Gaussian path, which sets the angles of the steps.
            velocity: Velocity as a function of points and angle.
            noise: Standard normal noise (*, d).
            key: Random key of the noise that the steps add.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Deterministic sampler: second-order steps of the probability-flow ODE.

    A draw evaluates the velocity 2 * steps - 1 times.

    Attributes:
        steps: Number of steps.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364;
        DPM-Solver, arXiv:2206.00927.
    """

    steps: int = 24

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_count(1, steps=self.steps)

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Draw points (*, d), starting from noise (*, d); the key is not used."""
        return self.path(path, velocity, noise)[-1]

    def path(self, path: Path, velocity: VelocityFunction, noise: Array) -> Array:
        """Return the points before the first step and after each step, (steps + 1, *, d)."""
        angles = path.steps(self.steps).astype(noise.dtype)

        def step(z: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            now, then = ends
            target = data_point(z, velocity(z, now), now)
            guess = step_toward(z, target, now, then)
            average = 0.5 * (target + data_point(guess, velocity(guess, then), then))
            return step_toward(z, average, now, then), z

        z, before = jax.lax.scan(step, noise, (angles[:-2], angles[1:-1]))
        # The last step is first-order: at the data end, a second evaluation would divide by a
        # noise level near zero.
        now, then = angles[-2], angles[-1]
        end = step_toward(z, data_point(z, velocity(z, now), now), now, then)
        return jnp.concatenate([before, jnp.stack([z, end])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Stochastic sampler: steps of the reverse stochastic differential equation.

    Attributes:
        steps: Number of steps; each evaluates the velocity once.
        fresh: Fraction of the noise that a step replaces by new noise, from 0 (the ODE) to 1 (the
            reverse SDE).

    References:
        Denoising Diffusion Implicit Models, arXiv:2010.02502, equation 12; Score-Based Generative
        Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    """

    steps: int = 64
    fresh: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_count(1, steps=self.steps)
        if not 0.0 <= self.fresh <= 1.0:
            raise ValueError(f"fresh: expected a number from 0 to 1, got {self.fresh}")

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Draw points (*, d), starting from noise (*, d)."""
        angles = path.steps(self.steps).astype(noise.dtype)

        def step(z: Array, inputs: tuple[Array, Array, Key]) -> tuple[Array, None]:
            now, then, key = inputs
            v = velocity(z, now)
            target = data_point(z, v, now)
            old = jnp.cos(now) * z - jnp.sin(now) * v
            new = jax.random.normal(key, z.shape, z.dtype)
            # in the reverse SDE, noise at the next angle keeps the fraction tan(now) / tan(then)
            new_share = self.fresh * jnp.sqrt(
                jnp.maximum(1.0 - (jnp.tan(now) / jnp.tan(then)) ** 2, 0.0)
            )
            mixed = jnp.sqrt(1.0 - new_share**2) * old + new_share * new
            return jnp.sin(then) * target + jnp.cos(then) * mixed, None

        keys = jax.random.split(key, self.steps)
        return jax.lax.scan(step, noise, (angles[:-1], angles[1:], keys))[0]


def data_point(z: Array, velocity: Array, angle: Array) -> Array:
    """Return the data point that a velocity predicts at points z."""
    return jnp.sin(angle) * z + jnp.cos(angle) * velocity


def score(z: Array, velocity: Array, angle: Array) -> Array:
    """Return the score of the density of noisy points z, from the predicted noise."""
    return jnp.tan(angle) * velocity - z


def step_toward(z: Array, target: Array, now: Array, then: Array) -> Array:
    """Move points z from the angle `now` to `then`, for a fixed predicted data point."""
    # the noise at z is (z - sin(now) * target) / cos(now); the ratio is finite at the data end
    ratio = jnp.cos(then) / jnp.cos(now)
    return jnp.sin(then) * target + ratio * (z - jnp.sin(now) * target)


def target_of_step(z: Array, after: Array, now: Array, then: Array) -> Array:
    """Return the predicted data point with which `step_toward` moves z to `after`."""
    ratio = jnp.cos(then) / jnp.cos(now)
    return (after - ratio * z) / (jnp.sin(then) - ratio * jnp.sin(now))

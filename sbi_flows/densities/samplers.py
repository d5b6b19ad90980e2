"""Samplers that take a fixed number of steps along a Gaussian path.

Public names: `Sampler`, `Heun`, `Ancestral`, `point`, `score`, `step_toward`, `target_of_step`.

A step turns by an angle: with the velocity v at a point z, the point of the data is
sin(angle) z + cos(angle) v and the noise is cos(angle) z - sin(angle) v. What is held fixed over a
step is the data point, which is exact where all the mass is at one; elsewhere the error falls with
the number of steps.

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
"""Velocity (*, d) at points (*, d) and an angle ()."""


@runtime_checkable
class Sampler(Protocol):
    """A frozen, hashable description of a sampler."""

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Points (*, d) from noise (*, d)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Second-order steps of the probability-flow ODE: 2 * steps - 1 evaluations.

    Attributes:
        steps: Number of steps.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364;
        DPM-Solver, arXiv:2206.00927.
    """

    steps: int = 24

    def __post_init__(self) -> None:
        """Refuse what takes no step."""
        require_count(1, steps=self.steps)

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Points (*, d) from noise (*, d)."""
        return self.path(path, velocity, noise)[-1]

    def path(self, path: Path, velocity: VelocityFunction, noise: Array) -> Array:
        """Points before the first step and after each of them, shape (steps + 1, *, d)."""
        angles = path.steps(self.steps).astype(noise.dtype)

        def step(z: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            now, then = ends
            aim = point(z, velocity(z, now), now)
            guess = step_toward(z, aim, now, then)
            average = 0.5 * (aim + point(guess, velocity(guess, then), then))
            return step_toward(z, average, now, then), z

        z, before = jax.lax.scan(step, noise, (angles[:-2], angles[1:-1]))
        # at the data end a second evaluation would divide by a vanishing noise
        now, then = angles[-2], angles[-1]
        end = step_toward(z, point(z, velocity(z, now), now), now, then)
        return jnp.concatenate([before, jnp.stack([z, end])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Steps of the reverse stochastic differential equation: noise is drawn anew in each.

    Attributes:
        steps: Number of steps, of one evaluation each.
        fresh: Share of the noise that is new, from 0, the ODE, to 1, the reverse SDE.

    References:
        Denoising Diffusion Implicit Models, arXiv:2010.02502, equation 12; Score-Based Generative
        Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    """

    steps: int = 64
    fresh: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what takes no step."""
        require_count(1, steps=self.steps)
        if not 0.0 <= self.fresh <= 1.0:
            raise ValueError(f"fresh: expected a number from 0 to 1, got {self.fresh}")

    def __call__(self, path: Path, velocity: VelocityFunction, noise: Array, key: Key) -> Array:
        """Points (*, d) from noise (*, d)."""
        angles = path.steps(self.steps).astype(noise.dtype)

        def step(z: Array, inputs: tuple[Array, Array, Key]) -> tuple[Array, None]:
            now, then, key = inputs
            pull = velocity(z, now)
            aim, old = point(z, pull, now), jnp.cos(now) * z - jnp.sin(now) * pull
            new = jax.random.normal(key, z.shape, z.dtype)
            # what the noise of the next level has of this one's, in a chain that forgets
            forgotten = self.fresh * jnp.sqrt(
                jnp.maximum(1.0 - (jnp.tan(now) / jnp.tan(then)) ** 2, 0.0)
            )
            mixed = jnp.sqrt(1.0 - forgotten**2) * old + forgotten * new
            return jnp.sin(then) * aim + jnp.cos(then) * mixed, None

        keys = jax.random.split(key, self.steps)
        return jax.lax.scan(step, noise, (angles[:-1], angles[1:], keys))[0]


def point(z: Array, velocity: Array, angle: Array) -> Array:
    """The data point that a velocity aims at."""
    return jnp.sin(angle) * z + jnp.cos(angle) * velocity


def score(z: Array, velocity: Array, angle: Array) -> Array:
    """The score of the density of noisy points, by the noise that a velocity says they hold."""
    return jnp.tan(angle) * velocity - z


def step_toward(z: Array, aim: Array, now: Array, then: Array) -> Array:
    """Where a path at z leads that aims at this data point."""
    # its noise times cos(now) is z - sin(now) * aim; the ratio stays finite at the data end
    ratio = jnp.cos(then) / jnp.cos(now)
    return jnp.sin(then) * aim + ratio * (z - jnp.sin(now) * aim)


def target_of_step(z: Array, after: Array, now: Array, then: Array) -> Array:
    """Return the data point of the step from z to `after`: the inverse of `step_toward`."""
    ratio = jnp.cos(then) / jnp.cos(now)
    return (after - ratio * z) / (jnp.sin(then) - ratio * jnp.sin(now))

"""A continuous flow with a second network that draws in a few evaluations.

Public names: `Distilled`, `add_student`.

What the student learns is where the teacher's ODE leads: a step of it goes as far as many of the
sampler's. Where it stands at the angle `now`, it aims at a data point, as the sampler does, but at
the one whose straight step ends where the teacher's path is at the angle `then`.

Sources: Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative Models for Improved
Sampling Speed" (arXiv:2101.02388), for regression on the ends of a teacher's paths; Salimans & Ho
2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv:2202.00512), equation
9, for the aim of a step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import distrax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_object
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density
from sbi_flows.densities.matching import Diffusion, FlowMatching, Matching
from sbi_flows.densities.ode import Velocity
from sbi_flows.densities.samplers import Heun, point, step_toward, target_of_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled:
    """What `sf.distil` makes of flow matching or diffusion; an estimator cannot be fitted to it.

    Draws take `steps` evaluations of the student's network. Densities are the teacher's.

    Attributes:
        teacher: The density that was fitted.
        steps: Evaluations a draw.

    References:
        Knowledge distillation, arXiv:2101.02388; progressive distillation, arXiv:2202.00512.
    """

    teacher: FlowMatching | Diffusion
    steps: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be distilled."""
        kinds = (FlowMatching, Diffusion)
        require_object("teacher", self.teacher, kinds, "sf.FlowMatching() or sf.Diffusion()")
        require_count(1, steps=self.steps)

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the flow for z in R^dim; both networks are at the identity."""
        return _Distilled(self, key, dim, context_dim)


class _Distilled(Matching):
    def __init__(self, settings: Distilled, key: Key, dim: int, context_dim: int) -> None:
        super().__init__(settings.teacher, key, dim, context_dim)
        self.student = settings.teacher.network.build(nnx.Rngs(key), dim, context_dim)
        self.steps = settings.steps

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The flow given contexts (*, C), a distribution over R^dim."""
        graph, state = nnx.split(self.student)
        student = Velocity(graph, (state, self.student.encode_context(context, key=key)))

        def draw(_: Any, noise: Array, key: Key) -> Array:
            z, angles = noise, self._angles(noise.dtype)
            for now, then in itertools.pairwise(angles):
                aim = point(z, student(z, now, student.arrays), now)
                z = step_toward(z, aim, now, then)
            return z

        return self.flow(context, key, self.path.ends, draw)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Not defined: a student learns from its teacher's paths."""
        raise ValueError(
            "density: expected one that simulations train, got Distilled, which sf.distil makes of "
            "a fitted posterior"
        )

    def paths(self, noise: Array, context: Array) -> Array:
        """Where the teacher is after each step of the student, shape (steps + 1, B, d)."""
        velocity = self.velocity(context, None)
        points = self._heun.path(
            self.path, lambda z, angle: velocity(z, angle, velocity.arrays), noise
        )
        return points[:: self._between]

    def errors(self, paths: Array, context: Array) -> Array:
        """Squared error of each of the student's aims, shape (steps, B)."""
        given, found = self.student.encode_context(context), []
        angles = self._angles(paths.dtype)
        for now, then, z, after in zip(angles[:-1], angles[1:], paths[:-1], paths[1:], strict=True):
            aim = point(z, self.student(z, now, given), now)
            found.append(jnp.sum((aim - target_of_step(z, after, now, then)) ** 2, axis=-1))
        return jnp.stack(found)

    @property
    def _between(self) -> int:
        """Steps of the teacher in one of the student."""
        sampler = self.sampler if isinstance(self.sampler, Heun) else Heun()
        return -(-sampler.steps // self.steps)

    @property
    def _heun(self) -> Heun:
        return Heun(steps=self._between * self.steps)

    def _angles(self, dtype: Any) -> Array:
        return self.path.steps(self._heun.steps).astype(dtype)[:: self._between]


def add_student(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of a distilled density, from those of its teacher, at which the student starts."""
    density = arrays.get("density", {})
    if "network" not in density:  # a network without arrays of this kind
        return dict(arrays)
    return {**arrays, "density": {**density, "student": density["network"]}}

"""Continuous flow with a student network, which draws in a few evaluations.

The teacher is the velocity network that was fitted to simulations. Each network predicts the
noise-free data point from a noisy point at the angle `now`. A step of the student moves the noisy
point along the path given by the student's prediction, up to the angle `then`. The student is
trained so that this one step ends where many steps of the teacher's sampler end.

Public names: `Distilled`, `add_student`.

Sources: Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative Models for Improved
Sampling Speed" (arXiv:2101.02388), for regression on the ends of a teacher's paths; Salimans & Ho
2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv:2202.00512), equation
9, for the target of a step.
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
from sbi_flows.densities.samplers import Heun, data_point, step_toward, target_of_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled:
    """Flow matching or diffusion with a student network, as `sf.distil` returns it.

    Draws take `steps` evaluations of the student network. The teacher computes log densities. The
    student is trained by `sf.distil`; an estimator cannot fit this density.

    Attributes:
        teacher: Settings of the density that was fitted to simulations.
        steps: Number of evaluations of the student for each draw.

    References:
        Knowledge distillation, arXiv:2101.02388; progressive distillation, arXiv:2202.00512.
    """

    teacher: FlowMatching | Diffusion
    steps: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range or of another type."""
        kinds = (FlowMatching, Diffusion)
        require_object("teacher", self.teacher, kinds, "sf.FlowMatching() or sf.Diffusion()")
        require_count(1, steps=self.steps)

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the flow for z in R^dim; the velocities of both networks are zero initially."""
        return _Distilled(self, key, dim, context_dim)


class _Distilled(Matching):
    """Teacher and student networks; see `Distilled`."""

    def __init__(self, settings: Distilled, key: Key, dim: int, context_dim: int) -> None:
        super().__init__(settings.teacher, key, dim, context_dim)
        self.student = settings.teacher.network.build(nnx.Rngs(key), dim, context_dim)
        self.steps = settings.steps

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the flow for contexts (*, C); see `Density.__call__`."""
        graph, state = nnx.split(self.student)
        student = Velocity(graph, (state, self.student.encode_context(context, key=key)))

        def draw(_: Any, noise: Array, key: Key) -> Array:
            z, angles = noise, self._angles(noise.dtype)
            for now, then in itertools.pairwise(angles):
                target = data_point(z, student(z, now, student.arrays), now)
                z = step_toward(z, target, now, then)
            return z

        return self.flow(context, key, self.path.ends, draw)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Raise ValueError: only `sf.distil` trains a student, so it has no loss on simulations."""
        raise ValueError(
            "density: expected one that can be trained on simulations, got Distilled, which "
            "sf.distil makes from a fitted posterior"
        )

    def teacher_paths(self, noise: Array, context: Array) -> Array:
        """Return the teacher's points at the angles where the student's steps start and end.

        Args:
            noise: Shape (B, d).
            context: Shape (B, C).

        Returns:
            Points (steps + 1, B, d), from noise to data.
        """
        velocity = self.velocity(context, None)
        points = self._heun.path(
            self.path, lambda z, angle: velocity(z, angle, velocity.arrays), noise
        )
        return points[:: self._stride]

    def student_errors(self, paths: Array, context: Array) -> Array:
        """Compute the squared errors (steps, B) of the data points that the student predicts.

        Args:
            paths: Points (steps + 1, B, d), as `teacher_paths` returns them.
            context: Shape (B, C).
        """
        encoded, errors = self.student.encode_context(context), []
        angles = self._angles(paths.dtype)
        for now, then, z, after in zip(angles[:-1], angles[1:], paths[:-1], paths[1:], strict=True):
            error = data_point(z, self.student(z, now, encoded), now)
            error -= target_of_step(z, after, now, then)
            errors.append(jnp.sum(error**2, axis=-1))
        return jnp.stack(errors)

    @property
    def _stride(self) -> int:
        """Number of steps of the teacher for each step of the student."""
        sampler = self.sampler if isinstance(self.sampler, Heun) else Heun()
        return -(-sampler.steps // self.steps)

    @property
    def _heun(self) -> Heun:
        return Heun(steps=self._stride * self.steps)

    def _angles(self, dtype: Any) -> Array:
        return self.path.steps(self._heun.steps).astype(dtype)[:: self._stride]


def add_student(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Add a student network to the arrays of a model, as a copy of the teacher's arrays.

    Args:
        arrays: Either the trainable weights of a model or its other arrays.
    """
    density = arrays.get("density", {})
    if "network" not in density:  # the network has no arrays of this kind
        return dict(arrays)
    return {**arrays, "density": {**density, "student": density["network"]}}

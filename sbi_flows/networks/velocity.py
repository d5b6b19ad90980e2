"""Velocity networks: they compute the velocity at a point and a time, given a context.

Time is an angle from 0 (noise) to pi / 2 (data). The context is encoded once (`encode_context`). It
is combined with the time once for all points with the same context and time. Solving an ODE for
many draws at one observation then repeats only the layers that depend on the points.

Public names: `Film`, `VelocityNetwork`, `VelocitySettings`, `TimeContextSettings`,
`TimeContextNetwork`, `time_features`.

Sources: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer"
(arXiv:1709.07871); Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency
Functions in Low Dimensional Domains" (arXiv:2006.10739).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction
from sbi_flows.core.typing import Key
from sbi_flows.networks.mlp import ResidualMLP, dropout, split_key
from sbi_flows.networks.shapes import align

LOG_NOISE = 9.0
"""Log ratio of noise to signal beyond which the time features are constant."""


class VelocityNetwork(nnx.Module):
    """Abstract network that computes a velocity (*, d) at points (*, d)."""

    @abc.abstractmethod
    def encode_context(self, context: Array, *, key: Key | None = None) -> Any:
        """Compute everything that depends only on contexts (*batch, C).

        Args:
            context: Contexts (*batch, C).
            key: Random key of dropout; None turns dropout off.
        """

    @abc.abstractmethod
    def __call__(self, z: Array, angle: Array, encoded: Any, *, key: Key | None = None) -> Array:
        """Compute the velocity.

        Args:
            z: Points (*draws, *batch, d).
            angle: Angles (), or (*batch), in [0, pi / 2].
            encoded: Contexts, as `encode_context` returns them.
            key: Random key of dropout; None turns dropout off.

        Returns:
            Velocities (*draws, *batch, d).
        """


@runtime_checkable
class VelocitySettings(Protocol):
    """Protocol of the settings of a velocity network, which are frozen and hashable."""

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Create the network for `dim` parameters; its initial velocity is zero."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeContextSettings:
    """Settings that all networks derived from `TimeContextNetwork` share."""

    width: int = 128
    blocks: int = 3
    context_blocks: int = 1
    frequencies: int = 6
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        require_count(1, width=self.width, blocks=self.blocks, frequencies=self.frequencies)
        require_count(0, context_blocks=self.context_blocks)
        require_fraction(dropout=self.dropout)


class TimeContextNetwork(VelocityNetwork):
    """Abstract network that combines time and context in one vector of length `width`."""

    def __init__(self, settings: TimeContextSettings, rngs: nnx.Rngs, context_dim: int) -> None:
        """Create the layers that encode the time and the context."""
        self.frequencies = settings.frequencies
        self.context = ResidualMLP(
            context_dim,
            settings.width,
            width=settings.width,
            blocks=settings.context_blocks,
            dropout=settings.dropout,
            rngs=rngs,
        )
        self.time = nnx.Linear(4 * settings.frequencies + 2, settings.width, rngs=rngs)

    def encode_context(self, context: Array, *, key: Key | None = None) -> Array:
        """Encode contexts (*batch, C) as vectors (*batch, width)."""
        return self.context(context, key=key)

    def condition(self, angle: Array, encoded: Array) -> Array:
        """Combine angles (), or (*batch), with encoded contexts; shape (*batch, width)."""
        time = self.time(time_features(angle, self.frequencies))
        return nnx.silu(encoded + align(time, encoded))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film(TimeContextSettings):
    """Residual multilayer perceptron with feature-wise linear modulation (FiLM).

    The time and the context scale and shift the inputs of each layer.

    Attributes:
        width: Width of the hidden layers.
        blocks: Number of residual blocks of two layers.
        context_blocks: Number of residual blocks of the network that encodes the context.
        frequencies: Number of Fourier frequencies of the time; see `time_features`.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        FiLM, arXiv:1709.07871; Fourier features, arXiv:2006.10739.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> network = Film(width=32).build(nnx.Rngs(0), dim=2, context_dim=3)
        >>> encoded = network.encode_context(jnp.zeros((4, 3)))
        >>> network(jnp.zeros((10, 4, 2)), jnp.asarray(0.5), encoded).shape
        (10, 4, 2)
    """

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Create the network; its initial velocity is zero.

        Args:
            rngs: Keys for the initial weights.
            dim: Number of parameters.
            context_dim: Length of the context.
        """
        return _Film(self, rngs, dim, context_dim)


class _Film(TimeContextNetwork):
    def __init__(self, settings: Film, rngs: nnx.Rngs, dim: int, context_dim: int) -> None:
        super().__init__(settings, rngs, context_dim)
        self.dropout, width, blocks = settings.dropout, settings.width, settings.blocks
        # one scale and one shift for each block and for the last layer
        self.film = nnx.Linear(width, 2 * width * (blocks + 1), rngs=rngs)
        self.enter = nnx.Linear(dim, width, rngs=rngs)
        self.first, self.second = (
            nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(blocks)]) for _ in "ab"
        )
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Linear(width, dim, kernel_init=zeros, rngs=rngs)

    def __call__(self, z: Array, angle: Array, encoded: Array, *, key: Key | None = None) -> Array:
        """Compute the velocity at points z (*draws, *batch, d) and angles (), or (*batch)."""
        films = self.film(self.condition(angle, encoded))
        films = jnp.split(films, 2 * (len(self.first) + 1), axis=-1)
        scales, shifts = films[::2], films[1::2]
        h = self.enter(z)
        keys = split_key(key, len(self.first))
        for first, second, scale, shift, k in zip(
            self.first, self.second, scales[:-1], shifts[:-1], keys, strict=True
        ):
            inner = nnx.silu(first(nnx.silu(_modulate(h, scale, shift))))
            h = h + second(dropout(k, inner, self.dropout))
        return self.leave(nnx.silu(_modulate(h, scales[-1], shifts[-1])))


def _modulate(h: Array, scale: Array, shift: Array) -> Array:
    """Scale h by 1 + scale, and shift it."""
    return h * (1.0 + align(scale, h)) + align(shift, h)


def time_features(angle: Array, frequencies: int) -> Array:
    """Compute Fourier features of the time, all between -1 and 1.

    Sines and cosines of the angle resolve the middle of the path. Sines and cosines of the log
    ratio of noise to signal resolve its ends.

    Args:
        angle: Angles (*) from 0 (noise) to pi / 2 (data).
        frequencies: Number of frequencies; each frequency is twice the previous one.

    Returns:
        Features, shape (*, 4 * frequencies + 2).
    """
    position = angle / (math.pi / 4) - 1.0
    # in float32, sin and cos of an angle next to an end are not smaller than these floors
    noise, signal = jnp.maximum(jnp.cos(angle), 1e-7), jnp.maximum(jnp.sin(angle), 1e-7)
    ratio = jnp.clip((jnp.log(noise) - jnp.log(signal)) / LOG_NOISE, -1.0, 1.0)
    coordinates = jnp.stack([position, ratio], axis=-1)
    octaves = jnp.asarray(np.pi * 2.0 ** np.arange(-1, frequencies - 1), coordinates.dtype)
    phases = jnp.expand_dims(coordinates, -1)
    phases = (phases * align(octaves, phases)).reshape(*angle.shape, -1)
    return jnp.concatenate([coordinates, jnp.sin(phases), jnp.cos(phases)], axis=-1)

"""Velocity networks: a point, an angle of the path and a context to a velocity.

Public names: `Film`, `VelocityNetwork`, `VelocitySettings`, `Told`, `ToldNetwork`,
`time_features`.

The context's part is computed once (`given`), and what an angle adds to it once for all points that
share both: a solve with many draws at one observation pays for the points alone.

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
"""Largest absolute log noise-to-signal ratio that a network tells from larger ones."""


class VelocityNetwork(nnx.Module):
    """Abstract velocity (*, d) at points (*, d)."""

    @abc.abstractmethod
    def given(self, context: Array, *, key: Key | None = None) -> Any:
        """What contexts (*batch, C) alone give; a key turns dropout on."""

    @abc.abstractmethod
    def __call__(self, z: Array, angle: Array, given: Any, *, key: Key | None = None) -> Array:
        """Velocity at points z (*draws, *batch, d) and angles (), or (*batch) in [0, pi / 2]."""


@runtime_checkable
class VelocitySettings(Protocol):
    """A frozen, hashable description that builds a `VelocityNetwork` once the sizes are known."""

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Make the network, whose velocity is zero at first."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """Settings of a network that the time and the context tell what to do: see `ToldNetwork`."""

    width: int = 128
    blocks: int = 3
    context_blocks: int = 1
    frequencies: int = 6
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that make no network."""
        require_count(1, width=self.width, blocks=self.blocks, frequencies=self.frequencies)
        require_count(0, context_blocks=self.context_blocks)
        require_fraction(dropout=self.dropout)


class ToldNetwork(VelocityNetwork):
    """Abstract network to which the time and the context are one vector of its width."""

    def __init__(self, settings: Told, rngs: nnx.Rngs, context_dim: int) -> None:
        """Create the layers of both."""
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

    def given(self, context: Array, *, key: Key | None = None) -> Array:
        """What contexts (*batch, C) alone give, shape (*batch, width)."""
        return self.context(context, key=key)

    def told(self, angle: Array, given: Array) -> Array:
        """What a context and angles (), or (*batch), say together, shape (*batch, width)."""
        return nnx.silu(given + align(self.time(time_features(angle, self.frequencies)), given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film(Told):
    """Residual multilayer perceptron whose layers the context and the time scale and shift.

    Attributes:
        width: Width of the hidden layers.
        blocks: Number of residual blocks of two layers.
        context_blocks: Number of residual blocks of the context's own network.
        frequencies: Number of Fourier features of the time, in each of its two forms.
        dropout: Fraction of hidden units dropped in training.

    References:
        FiLM, arXiv:1709.07871; Fourier features, arXiv:2006.10739.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> network = Film(width=32).build(nnx.Rngs(0), dim=2, context_dim=3)
        >>> given = network.given(jnp.zeros((4, 3)))
        >>> network(jnp.zeros((10, 4, 2)), jnp.asarray(0.5), given).shape
        (10, 4, 2)
    """

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Make the network, whose velocity is zero at first."""
        return _Film(self, rngs, dim, context_dim)


class _Film(ToldNetwork):
    def __init__(self, settings: Film, rngs: nnx.Rngs, dim: int, context_dim: int) -> None:
        super().__init__(settings, rngs, context_dim)
        self.dropout, width, blocks = settings.dropout, settings.width, settings.blocks
        # a scale and a shift a block, and those of the last layer
        self.film = nnx.Linear(width, 2 * width * (blocks + 1), rngs=rngs)
        self.enter = nnx.Linear(dim, width, rngs=rngs)
        self.first, self.second = (
            nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(blocks)]) for _ in "ab"
        )
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Linear(width, dim, kernel_init=zeros, rngs=rngs)

    def __call__(self, z: Array, angle: Array, given: Array, *, key: Key | None = None) -> Array:
        """Velocity at points z (*draws, *batch, d) and angles (), or (*batch)."""
        films = self.film(self.told(angle, given))
        films = jnp.split(films, 2 * (len(self.first) + 1), axis=-1)
        scales, shifts = films[::2], films[1::2]
        h = self.enter(z)
        keys = split_key(key, len(self.first))
        for first, second, scale, shift, k in zip(
            self.first, self.second, scales[:-1], shifts[:-1], keys, strict=True
        ):
            inner = nnx.silu(first(nnx.silu(_modulated(h, scale, shift))))
            h = h + second(dropout(k, inner, self.dropout))
        return self.leave(nnx.silu(_modulated(h, scales[-1], shifts[-1])))


def _modulated(h: Array, scale: Array, shift: Array) -> Array:
    return h * (1.0 + align(scale, h)) + align(shift, h)


def time_features(angle: Array, frequencies: int) -> Array:
    """Features of angles (*), shape (*, 4 * frequencies + 2), all between -1 and 1.

    Waves of the angle, which resolve the middle of the path, and of the log ratio of noise to
    signal, which resolve its ends.
    """
    share = angle / (math.pi / 4) - 1.0
    # both floors are those of float32: sin and cos of an angle next to an end are no smaller
    noise, signal = jnp.maximum(jnp.cos(angle), 1e-7), jnp.maximum(jnp.sin(angle), 1e-7)
    ratio = jnp.clip((jnp.log(noise) - jnp.log(signal)) / LOG_NOISE, -1.0, 1.0)
    places = jnp.stack([share, ratio], axis=-1)
    octaves = jnp.asarray(np.pi * 2.0 ** np.arange(-1, frequencies - 1), places.dtype)
    waves = jnp.expand_dims(places, -1)
    waves = (waves * align(octaves, waves)).reshape(*angle.shape, -1)
    return jnp.concatenate([places, jnp.sin(waves), jnp.cos(waves)], axis=-1)

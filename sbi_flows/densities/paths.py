"""Gaussian paths from noise to data, and the distribution of training times along them.

A Gaussian path mixes a data point z and noise e, both of unit variance. After division by its
standard deviation, every such path is a rotation from noise to data by a quarter turn:

    z(angle) = sin(angle) z + cos(angle) e,    velocity  cos(angle) z - sin(angle) e.

The angle is 0 for noise and pi / 2 for data; cot(angle) is sigma, the ratio of noise to signal.
Paths therefore differ only in their first and last angle, and in the distribution of training times
and sampler steps over the angles.

One velocity network serves all paths. The denoiser of Karras et al. 2022, with its preconditioning
for data of unit variance, has the velocity as its raw output (their equation 7). The velocity is
also the v of Salimans & Ho 2022, "Progressive Distillation" (arXiv:2202.00512). The vector field of
Lipman et al. 2023 (arXiv:2210.02747) is the velocity divided by the standard deviation of the
straight path.

Public names: `Path`, `Straight`, `EDM`, `VP`, `VE`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtri

from sbi_flows.core.checks import require_finite, require_positive


@runtime_checkable
class Path(Protocol):
    """Protocol of Gaussian paths: frozen, hashable settings of training and sampling angles."""

    @property
    def ends(self) -> tuple[float, float]:
        """Angle at the noise end and angle at the data end."""
        ...

    def angles(self, uniforms: Array) -> Array:
        """Transform uniform numbers in (0, 1) into random angles for training."""
        ...

    def steps(self, count: int) -> Array:
        """Return the angles (count + 1,) of a sampler's steps, from noise to data."""
        ...

    def weight(self, angle: Array) -> Array:
        """Return the weight (*) of the squared error of the velocity at angles (*)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straight:
    """Straight path at constant speed: t z + (1 - t) e for t from 0 to 1 (optimal transport).

    Attributes:
        late: Exponent of the density of training times, proportional to t ** late. 0 is uniform;
            larger values place more times near the data (alpha in Wildberger et al. 2023).
        smallest: Ratio of noise to signal at the data end of the path.

    References:
        Flow Matching for Generative Modeling, arXiv:2210.02747; Flow Matching for Scalable
        Simulation-Based Inference, arXiv:2305.17161.

    Example:
        >>> [f"{angle:.3f}" for angle in Straight().ends]
        ['0.000', '1.569']
    """

    late: float = 4.0
    smallest: float = 2e-3

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        if not -1.0 < self.late < math.inf:
            raise ValueError(f"late: expected a number above -1, got {self.late}")
        if not 0.0 <= self.smallest < 1.0:
            raise ValueError(f"smallest: expected a number from 0 to 1, got {self.smallest}")

    @property
    def ends(self) -> tuple[float, float]:
        """Angle at the noise end and angle at the data end."""
        return 0.0, math.atan2(1.0, self.smallest)

    def angles(self, uniforms: Array) -> Array:
        """Transform uniform numbers in (0, 1) into random angles for training."""
        time = jnp.minimum(uniforms ** (1.0 / (1.0 + self.late)), 1.0 / (1.0 + self.smallest))
        return jnp.arctan2(time, 1.0 - time)

    def steps(self, count: int) -> Array:
        """Return the angles (count + 1,) of a sampler's steps, from noise to data.

        The steps are shortest near the data, where the velocity changes fastest.
        """
        last = self.smallest / (1.0 + self.smallest)
        noise = last + (1.0 - last) * jnp.linspace(1.0, 0.0, count + 1) ** 3
        return jnp.arctan2(1.0 - noise, noise)

    def weight(self, angle: Array) -> Array:
        """Return the weight (*) of the squared error of the velocity.

        The weighted error is the squared error of the straight path's vector field.
        """
        # inverse variance of the path at the time t = tan(angle) / (1 + tan(angle))
        return (jnp.sin(angle) + jnp.cos(angle)) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM:
    """Diffusion with log-normal noise levels in training (Karras et al. 2022).

    Attributes:
        mean: Mean of log sigma in training.
        spread: Standard deviation of log sigma in training.
        smallest: Smallest sigma, at which sampling ends.
        largest: Largest sigma, at which sampling starts.
        power: Exponent rho of the steps of a sampler; larger values take more steps at small sigma.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364,
        table 1.

    Example:
        >>> [f"{float(angle):.2f}" for angle in EDM().steps(4)]
        ['0.01', '0.06', '0.38', '1.40', '1.57']
    """

    mean: float = -1.2
    spread: float = 1.2
    smallest: float = 2e-3
    largest: float = 80.0
    power: float = 7.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_finite(mean=self.mean)
        require_positive(spread=self.spread, power=self.power)
        require_finite(spread=self.spread, power=self.power)
        _check_levels(self.smallest, self.largest)

    @property
    def ends(self) -> tuple[float, float]:
        """Angle at the noise end and angle at the data end."""
        return _ends(self.smallest, self.largest)

    def angles(self, uniforms: Array) -> Array:
        """Transform uniform numbers in (0, 1) into random angles for training."""
        levels = jnp.exp(self.mean + self.spread * ndtri(uniforms))
        return jnp.arctan2(1.0, jnp.clip(levels, self.smallest, self.largest))

    def steps(self, count: int) -> Array:
        """Return the angles (count + 1,) of a sampler's steps (Karras et al. 2022, equation 5)."""
        first, last = (v ** (1.0 / self.power) for v in (self.largest, self.smallest))
        return jnp.arctan2(1.0, jnp.linspace(first, last, count + 1) ** self.power)

    def weight(self, angle: Array) -> Array:
        """Return ones: the loss weight of Karras et al. 2022 is 1 for errors of the velocity."""
        return jnp.ones_like(angle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP:
    """Variance-preserving diffusion with a linear noise rate and uniform training times.

    Attributes:
        first: Noise rate beta_min at the data, per unit time.
        last: Noise rate beta_max at the noise end, time 1.
        start: Smallest time, at the data end of the path.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456,
        equation 32.

    Example:
        >>> VP().ends[0] < 0.01
        True
    """

    first: float = 0.1
    last: float = 20.0
    start: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_positive(first=self.first, last=self.last, start=self.start)
        require_finite(last=self.last)
        if not self.first < self.last or not self.start < 1.0:
            raise ValueError(
                "first, last, start: expected first < last and start < 1, got "
                f"{self.first}, {self.last} and {self.start}"
            )

    @property
    def ends(self) -> tuple[float, float]:
        """Angle at the noise end and angle at the data end."""
        first, last = (math.exp(-float(self._integral(t)) / 2) for t in (1.0, self.start))
        return math.asin(first), math.asin(last)

    def angles(self, uniforms: Array) -> Array:
        """Transform uniform numbers in (0, 1) into random angles for training."""
        time = 1.0 - (1.0 - self.start) * uniforms
        integral = self._integral(time)
        # this form gives an accurate sine and cosine, even where they are small
        return jnp.arctan2(jnp.exp(-integral / 2), jnp.sqrt(-jnp.expm1(-integral)))

    def steps(self, count: int) -> Array:
        """Return the angles (count + 1,) of a sampler's steps, which have equal length in time."""
        return self.angles(jnp.linspace(0.0, 1.0, count + 1))

    def weight(self, angle: Array) -> Array:
        """Return the weight (*) that makes the loss the squared error of the predicted noise."""
        return jnp.sin(angle) ** 2

    def _integral(self, time: Array | float) -> Array | float:
        """Return the integral of the noise rate from 0 to a time."""
        return time * self.first + 0.5 * time**2 * (self.last - self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VE:
    """Variance-exploding diffusion: log sigma is uniform in training and in sampling.

    Attributes:
        smallest: Smallest sigma, at which sampling ends.
        largest: Largest sigma, at which sampling starts.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456,
        equation 30.

    Example:
        >>> [f"{float(angle):.2f}" for angle in VE(smallest=0.01, largest=100.0).steps(2)]
        ['0.01', '0.79', '1.56']
    """

    smallest: float = 2e-3
    largest: float = 80.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        _check_levels(self.smallest, self.largest)

    @property
    def ends(self) -> tuple[float, float]:
        """Angle at the noise end and angle at the data end."""
        return _ends(self.smallest, self.largest)

    def angles(self, uniforms: Array) -> Array:
        """Transform uniform numbers in (0, 1) into random angles for training."""
        ratio = self.smallest / self.largest
        return jnp.arctan2(1.0, self.largest * ratio**uniforms)

    def steps(self, count: int) -> Array:
        """Return the angles (count + 1,) of a sampler's steps, which are equal in log sigma."""
        return self.angles(jnp.linspace(0.0, 1.0, count + 1))

    def weight(self, angle: Array) -> Array:
        """Return the weight (*) that makes the loss the squared error of the predicted noise."""
        return jnp.sin(angle) ** 2


def _ends(smallest: float, largest: float) -> tuple[float, float]:
    return math.atan2(1.0, largest), math.atan2(1.0, smallest)


def _check_levels(smallest: float, largest: float) -> None:
    require_positive(smallest=smallest, largest=largest)
    if not smallest < largest < math.inf:
        raise ValueError(
            f"smallest, largest: expected smallest < largest, got {smallest} and {largest}"
        )

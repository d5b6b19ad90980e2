"""Gaussian paths from noise to a point, and how training spreads over them.

Public names: `Path`, `Straight`, `EDM`, `VP`, `VE`.

Whatever its name in the literature, a Gaussian path mixes a point z of unit variance with noise e
of unit variance. Divided by its standard deviation it is the quarter turn

    z(angle) = sin(angle) z + cos(angle) e,    velocity  cos(angle) z - sin(angle) e,

from noise at angle 0 to the point at pi / 2; cot(angle) is sigma, the ratio of noise to signal.
What is left of a path is how training and steps spread over the angles, and where it ends.

In these coordinates one network serves all: the denoiser of Karras et al. 2022 with its
preconditioning for unit variance has the velocity for its raw output (their equation 7), which is
the v of Salimans & Ho 2022, "Progressive Distillation" (arXiv:2202.00512), and the vector field of
Lipman et al. 2023 is the velocity divided by the standard deviation of the straight path.
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
    """A frozen, hashable description of the angles of a path."""

    @property
    def ends(self) -> tuple[float, float]:
        """First and last angle."""
        ...

    def angles(self, places: Array) -> Array:
        """Angles that training visits, from uniform places in (0, 1)."""
        ...

    def steps(self, count: int) -> Array:
        """Angles (count + 1,) of the fixed steps of a sampler, from noise to data."""
        ...

    def weight(self, angle: Array) -> Array:
        """Weight of the squared error of the velocity at angles (*)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straight:
    """Straight lines at constant speed: t z + (1 - t) e for t from 0 to 1 (optimal transport).

    Attributes:
        late: Training draws times t from a density proportional to t ** late: 0 spreads them
            evenly, larger ones go toward the data end (the alpha of Wildberger et al.).
        smallest: Ratio of noise to signal at which draws and densities end, next to the data.

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
        """Refuse a density that has no integral."""
        if not -1.0 < self.late < math.inf:
            raise ValueError(f"late: expected a number above -1, got {self.late}")
        if not 0.0 <= self.smallest < 1.0:
            raise ValueError(f"smallest: expected a number from 0 to 1, got {self.smallest}")

    @property
    def ends(self) -> tuple[float, float]:
        """First and last angle."""
        return 0.0, math.atan2(1.0, self.smallest)

    def angles(self, places: Array) -> Array:
        """Angles that training visits, from uniform places in (0, 1)."""
        time = jnp.minimum(places ** (1.0 / (1.0 + self.late)), 1.0 / (1.0 + self.smallest))
        return jnp.arctan2(time, 1.0 - time)

    def steps(self, count: int) -> Array:
        """Angles (count + 1,) of steps that shrink toward the data, where the field is steep."""
        last = self.smallest / (1.0 + self.smallest)
        left = last + (1.0 - last) * jnp.linspace(1.0, 0.0, count + 1) ** 3
        return jnp.arctan2(1.0 - left, left)

    def weight(self, angle: Array) -> Array:
        """Weight that makes the error one of the field on the straight path."""
        # the standard deviation of the path at t = tan / (1 + tan), inverted and squared
        return (jnp.sin(angle) + jnp.cos(angle)) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM:
    """Diffusion with log-normal noise levels in training.

    Attributes:
        mean: Mean of log sigma in training.
        spread: Standard deviation of log sigma in training.
        smallest: Smallest sigma, at which sampling ends.
        largest: Largest sigma, at which it begins.
        power: How the steps of a sampler crowd toward small sigmas (rho).

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
        """Refuse levels that are in no order."""
        require_finite(mean=self.mean)
        require_positive(spread=self.spread, power=self.power)
        require_finite(spread=self.spread, power=self.power)
        _check_levels(self.smallest, self.largest)

    @property
    def ends(self) -> tuple[float, float]:
        """First and last angle."""
        return _ends(self.smallest, self.largest)

    def angles(self, places: Array) -> Array:
        """Angles that training visits, from uniform places in (0, 1)."""
        levels = jnp.exp(self.mean + self.spread * ndtri(places))
        return jnp.arctan2(1.0, jnp.clip(levels, self.smallest, self.largest))

    def steps(self, count: int) -> Array:
        """Angles (count + 1,) of the steps of a sampler, equation 5."""
        first, last = (v ** (1.0 / self.power) for v in (self.largest, self.smallest))
        return jnp.arctan2(1.0, jnp.linspace(first, last, count + 1) ** self.power)

    def weight(self, angle: Array) -> Array:
        """One: the weight of the preconditioned denoiser's error cancels its output's scale."""
        return jnp.ones_like(angle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP:
    """Variance-preserving diffusion with a linear rate of noise, trained evenly in its time.

    Attributes:
        first: Rate at the data, beta_min.
        last: Rate at the noise, beta_max.
        start: Time next to the data at which it ends, of 1.

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
        """Refuse rates and times that are none."""
        require_positive(first=self.first, last=self.last, start=self.start)
        require_finite(last=self.last)
        if not self.first < self.last or not self.start < 1.0:
            raise ValueError(
                "first, last, start: expected first < last and start < 1, got "
                f"{self.first}, {self.last} and {self.start}"
            )

    @property
    def ends(self) -> tuple[float, float]:
        """First and last angle."""
        first, last = (math.exp(-float(self._integral(t)) / 2) for t in (1.0, self.start))
        return math.asin(first), math.asin(last)

    def angles(self, places: Array) -> Array:
        """Angles that training visits, from uniform places in (0, 1)."""
        time = 1.0 - (1.0 - self.start) * places
        integral = self._integral(time)
        # the sine and the cosine of small angles keep their digits
        return jnp.arctan2(jnp.exp(-integral / 2), jnp.sqrt(-jnp.expm1(-integral)))

    def steps(self, count: int) -> Array:
        """Angles (count + 1,) of steps of equal time."""
        return self.angles(jnp.linspace(0.0, 1.0, count + 1))

    def weight(self, angle: Array) -> Array:
        """The weight of an error of the noise, as a share of the velocity's."""
        return jnp.sin(angle) ** 2

    def _integral(self, time: Array | float) -> Array | float:
        return time * self.first + 0.5 * time**2 * (self.last - self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VE:
    """Variance-exploding diffusion: sigma grows geometrically, training is even in its logarithm.

    Attributes:
        smallest: Smallest sigma, at which sampling ends.
        largest: Largest sigma, at which it begins.

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
        """Refuse levels that are in no order."""
        _check_levels(self.smallest, self.largest)

    @property
    def ends(self) -> tuple[float, float]:
        """First and last angle."""
        return _ends(self.smallest, self.largest)

    def angles(self, places: Array) -> Array:
        """Angles that training visits, from uniform places in (0, 1)."""
        share = self.smallest / self.largest
        return jnp.arctan2(1.0, self.largest * share**places)

    def steps(self, count: int) -> Array:
        """Angles (count + 1,) of steps of equal log sigma."""
        return self.angles(jnp.linspace(0.0, 1.0, count + 1))

    def weight(self, angle: Array) -> Array:
        """The weight of an error of the noise, as a share of the velocity's."""
        return jnp.sin(angle) ** 2


def _ends(smallest: float, largest: float) -> tuple[float, float]:
    return math.atan2(1.0, largest), math.atan2(1.0, smallest)


def _check_levels(smallest: float, largest: float) -> None:
    require_positive(smallest=smallest, largest=largest)
    if not smallest < largest < math.inf:
        raise ValueError(
            f"smallest, largest: expected smallest < largest, got {smallest} and {largest}"
        )

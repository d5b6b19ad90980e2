"""An emulator of the simulator: densities of the observation given the parameters.

A density of 8 numbers given 5 parameters may be far simpler than the posterior that follows from
it, and is then learned from far fewer simulations. Draws of it cost next to nothing: a posterior
estimator that trains on them as well no longer over-fits the few real rows.

Public names: `Emulator`.

Sources: Papamakarios et al. 2019, "Sequential Neural Likelihood" (arXiv:1805.07226), for the
densities; Wiqvist, Frellsen & Picchini 2021 (arXiv:2102.06522), who fit a posterior to draws of a
learned likelihood, by the other Kullback-Leibler divergence. Uria et al. 2013, "RNADE"
(arXiv:1306.0186), for the noise on whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.checks import require_count
from sbi_flows.densities.base import DensitySettings
from sbi_flows.densities.conditional import Blueprint, Sizes, Weights, graph_of
from sbi_flows.densities.flow import MAF, NSF
from sbi_flows.estimators.stacking import StackHistory, fit_each
from sbi_flows.prior import Prior
from sbi_flows.standardise import Standardiser
from sbi_flows.training import History, Training, fit
from sbi_flows.typing import Key

CHUNK = 2_500
"""Draws in one compiled call."""

LINEAR = 25.0
"""Scales within which an emulated observation stays as it is: noise of constant size is simpler
than what compressed tails make of it, which only the heaviest need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emulator:
    """Densities of the observation that are fitted first, and how much is drawn from them.

    They are weighted by the log density of held-out rows, as in `sf.Stack`; each member of an
    ensemble trains on draws of the emulator that held out the same rows as it does. Observations
    that are whole numbers are emulated with uniform noise added, and rounded.

    Attributes:
        densities: The densities to fit and to mix.
        training: Settings of their fits; the validation fraction is the estimator's.
        rows: Number of draws for each member, with parameters from the prior.
        max_features: Longer observations are not emulated, and the estimator is fitted without:
            the noise of hundreds of numbers takes more simulations to learn than the posterior.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Uniform(-1, 1).expand([2])
        >>> noisy = lambda key, theta: theta**2 + 0.1 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> small = sf.MAF(transforms=1, hidden=(8,))
        >>> quick = sf.Training(max_epochs=2)
        >>> emulator = sf.Emulator(densities=(small,), training=quick, rows=1000)
        >>> npe = sf.NPE(prior, small, training=quick, emulator=emulator)
        >>> posterior, history = npe.fit(jax.random.key(1), sims)
        >>> history.emulator.shares
        array([1.])
    """

    densities: tuple[DensitySettings, ...] = (MAF(), NSF())
    training: Training = dataclasses.field(
        default_factory=lambda: Training(max_epochs=40, patience=10)
    )
    rows: int = 100_000
    max_features: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            ValueError: There is no density, a number is not positive, or `training` is no training.
        """
        object.__setattr__(self, "densities", tuple(self.densities))
        if not self.densities or not all(hasattr(d, "build") for d in self.densities):
            raise ValueError(
                f"densities: expected one or more densities such as sf.MAF(), got {self.densities}"
            )
        if not isinstance(self.training, Training):
            raise ValueError(f"training: expected sf.Training, got {type(self.training).__name__}")
        require_count(1, rows=self.rows, max_features=self.max_features)


class Emulated(NamedTuple):
    """Draws of an emulator: standard coordinates (M * rows, d), features (M * rows, C)."""

    y: Array
    features: Array


def emulate(
    key: Key,
    emulator: Emulator,
    prior: Prior,
    y: Array,
    x: Array,
    standardiser: Standardiser,
    *,
    members: int,
    validation_fraction: float,
    from_prior: bool,
    progress: bool,
) -> tuple[Emulated, StackHistory]:
    """Fit an emulator and draw from it.

    Args:
        key: The key of the fit that the draws are for: its members then hold out the same rows.
        emulator: What to fit and how much to draw.
        prior: The prior.
        y: Parameters in standard coordinates, shape (N, d).
        x: Observations, flat, shape (N, C).
        standardiser: Observation to features.
        members: Number of members M of the fit that the draws are for.
        validation_fraction: Its validation fraction.
        from_prior: Whether y are draws of the prior; where failed simulations are missing among
            them, parameters are drawn from y instead.
        progress: Show progress bars.

    Returns:
        The draws, those of one member after those of another, and the history of the fits.

    Raises:
        TrainingDiverged: Every density diverged.
    """
    shape = _shape_of(x)
    noise_key, theta_key, draw_key = jax.random.split(jax.random.fold_in(key, 1), 3)
    wide = standardiser._replace(linear=LINEAR)
    emulated = _smooth(shape, wide, noise_key, x)
    training = dataclasses.replace(emulator.training, validation_fraction=validation_fraction)
    sizes = Sizes((False,) * x.shape[1], jax.tree.structure(0), ((y.shape[1],),))

    def fit_one(blueprint: Blueprint) -> tuple[tuple[Blueprint, Weights], History]:
        weights, history = fit(
            key,
            blueprint,
            training,
            emulated,
            y,
            members=members,
            progress=progress,
            label="fit emulator",
        )
        return (blueprint, weights), history

    blueprints = [Blueprint(density, None, sizes) for density in emulator.densities]
    parts, history = fit_each([partial(fit_one, b) for b in blueprints], "emulator")
    size = -(-emulator.rows // CHUNK) * CHUNK
    theta_keys, draw_keys = (jax.random.split(k, members) for k in (theta_key, draw_key))
    drawn = []
    for m in range(members):
        own = _parameters(theta_keys[m], prior, y, size, from_prior=from_prior)
        raw = [
            ((b, jax.tree.map(lambda leaf, m=m: leaf[m], weights)), share)
            for (b, weights), share in parts
        ]
        found = _draw(draw_keys[m], raw, own)
        drawn.append(_finite(own, _whole(shape, wide, standardiser, found), emulator.rows))
    ys, xs = zip(*drawn, strict=True)
    return Emulated(jnp.concatenate(ys), jnp.concatenate(xs)), history


class _Shape(NamedTuple):
    """Which numbers of an observation are whole, and the range of each, shape (C,)."""

    whole: Array
    low: Array
    high: Array


@jax.jit
def _shape_of(x: Array) -> _Shape:
    low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
    return _Shape(jnp.all(x == jnp.round(x), axis=0) | (low == high), low, high)


@jax.jit
def _smooth(shape: _Shape, standardiser: Standardiser, key: Key, x: Array) -> Array:
    """Features of observations whose whole numbers have noise that fills the gaps between them."""
    noise = jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)
    return standardiser(jnp.where(shape.whole[None], x + noise, x))


@jax.jit
def _whole(
    shape: _Shape, emulated: Standardiser, standardiser: Standardiser, features: Array
) -> Array:
    """Features of the observations that emulated features stand for."""
    x = emulated.inverse(features)
    rounded = jnp.clip(jnp.round(x), shape.low[None], shape.high[None])
    fixed = jnp.where((shape.low == shape.high)[None], shape.low[None], rounded)
    return standardiser(jnp.where(shape.whole[None], fixed, x))


@partial(jax.jit, static_argnames=("prior", "n", "from_prior"))
def _parameters(key: Key, prior: Prior, y: Array, n: int, *, from_prior: bool) -> Array:
    if from_prior:
        return prior.to_standard(prior.sample(key, n))
    return y[jax.random.randint(key, (n,), 0, len(y))]


def _draw(key: Key, parts: Sequence[tuple], y: Array) -> Array:
    """Features (n, C) for parameters (n, d): each density draws for its share of the chunks' rows.

    The parameters are in random order, so it does not matter which rows these are.
    """
    ends = np.round(np.cumsum([share for _, share in parts]) * len(y)).astype(int)
    features = None
    for i, ((blueprint, weights), _) in enumerate(parts):
        first = 0 if i == 0 else ends[i - 1]
        chunks = range(first // CHUNK, -(-ends[i] // CHUNK))
        keys = jax.random.split(jax.random.fold_in(key, i), len(y) // CHUNK)
        rows = [
            _draw_chunk(blueprint, weights, keys[c], y[c * CHUNK : (c + 1) * CHUNK]) for c in chunks
        ]
        own = np.concatenate([np.asarray(r) for r in rows])
        if features is None:
            features = np.empty((len(y), own.shape[1]), own.dtype)
        features[first : ends[i]] = own[first - chunks[0] * CHUNK :][: ends[i] - first]
    assert features is not None
    return jnp.asarray(features)


@partial(jax.jit, static_argnums=0)
def _draw_chunk(blueprint: Blueprint, weights: Weights, key: Key, y: Array) -> Array:
    return nnx.merge(graph_of(blueprint), *weights)(y).sample(seed=key)


@partial(jax.jit, static_argnums=2)
def _finite(y: Array, features: Array, n: int) -> tuple[Array, Array]:
    """The first n rows that are finite, from the start again where there are too few."""
    finite = jnp.all(jnp.isfinite(features), axis=1)
    order = jnp.argsort(~finite, stable=True)
    rows = order[jnp.arange(n) % jnp.maximum(jnp.sum(finite), 1)]
    return y[rows], features[rows]

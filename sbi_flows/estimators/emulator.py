"""Emulator of a simulator: densities of the observation given the parameters.

Public names: `Emulator`, `EmulatorFailed`, `Emulated`, `Seen`, `emulate`.

The density of the observation given the parameters can be far simpler than the posterior, for
example for 8 numbers given 5 parameters. It is then learned from far fewer simulations than the
posterior. Draws from this density cost almost nothing. A posterior estimator that trains on the
draws in addition to the few real simulations over-fits less.

Sources: Papamakarios et al. 2019, "Sequential Neural Likelihood" (arXiv:1805.07226), for the
densities; Wiqvist, Frellsen & Picchini 2021 (arXiv:2102.06522), for fitting a posterior to a
learned likelihood (they minimise the reverse Kullback-Leibler divergence).
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

from sbi_flows.core.checks import require_count
from sbi_flows.core.compilation import compiled_per_size
from sbi_flows.core.errors import SbiFlowsError, TrainingDiverged
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import DensitySettings, check_density
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.densities.flow import MAF, NSF
from sbi_flows.densities.sizes import Sizes
from sbi_flows.estimators.stacking import StackHistory, fit_each
from sbi_flows.observations.quantised import Grid, dequantised, find_grid, quantised
from sbi_flows.observations.standardise import Standardiser, fit_standardiser
from sbi_flows.prior.prior import Prior
from sbi_flows.training import FitKeys, History, Training, TrainingData, fit

CHUNK_DRAWS = 2_500
"""Number of draws in one compiled call."""

MAX_FIXED_SUMMARIES = 128
"""Maximum number of fixed summaries that are emulated."""

LINEAR_RANGE = 25.0
"""Number of scales within which standardisation for the emulator is linear. Compressing the tails
would turn noise of constant size into noise that is harder to learn; only very heavy tails need
it."""

NUM_NEIGHBOURS = 20
"""Number of simulations around a parameter vector that estimate the probability of a failure
there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emulator:
    """Settings of an emulator: densities of the observation to fit, and the number of draws.

    The fitted densities are mixed. Their weights maximise the log density of held-out rows, as in
    `sf.Stack`. Each member of the posterior's ensemble has an emulator that held out the same rows,
    and trains on the draws of this emulator. If the observation lies on a grid, such as counts,
    the emulator learns it with added uniform noise, and rounds its draws to the grid. Fewer
    parameters are drawn in regions where simulations failed.

    Attributes:
        densities: The densities to fit and to mix.
        training: Settings of the fits of the densities. The validation fraction and the checkpoint
            are taken from the estimator instead.
        simulations: Number of emulated simulations for each member, with parameters from the prior.
        max_features: Maximum length of an observation. For longer observations, the estimator is
            fitted without an emulator, because learning the noise of hundreds of numbers takes
            more simulations than learning the posterior. This limit does not apply to
            `sf.Summaries`, of which at most 128 are emulated.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Uniform(-1, 1).expand([2])
        >>> noisy = lambda key, theta: theta**2 + 0.1 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> small = sf.MAF(transforms=1, hidden=(8,))
        >>> quick = sf.Training(max_epochs=2)
        >>> emulator = sf.Emulator(densities=(small,), training=quick, simulations=1000)
        >>> npe = sf.NPE(prior, small, training=quick, emulator=emulator)
        >>> posterior, history = npe.fit(jax.random.key(1), sims)
        >>> history.emulator.shares
        array([1.])
    """

    densities: tuple[DensitySettings, ...] = (MAF(), NSF())
    training: Training = dataclasses.field(
        default_factory=lambda: Training(max_epochs=40, patience=10)
    )
    simulations: int = 100_000
    max_features: int = 50

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: `densities` is empty; a number is not positive; or `training` has a wrong
                type or sets a checkpoint.
        """
        densities = self.densities
        densities = tuple(densities) if isinstance(densities, list | tuple) else (densities,)
        if not densities:
            raise ValueError("densities: expected one or more densities such as sf.MAF(), got none")
        for density in densities:
            check_density("densities", density)
        object.__setattr__(self, "densities", densities)
        if not isinstance(self.training, Training):
            raise ValueError(f"training: expected sf.Training, got {type(self.training).__name__}")
        if self.training.checkpoint is not None:
            raise ValueError("checkpoint: expected that of the estimator, got one of the emulator")
        require_count(1, simulations=self.simulations, max_features=self.max_features)


class EmulatorFailed(SbiFlowsError):
    """Error that the simulations cannot be emulated; the message gives the reason."""


class Emulated(NamedTuple):
    """Draws of an emulator: standard coordinates (M * n, d) and features (M * n, C)."""

    y: Array
    features: Array


class Seen(NamedTuple):
    """Simulations to which an emulator is fitted.

    Attributes:
        y: Standard coordinates of the valid simulations, shape (N, d).
        x: Flattened observations, or fixed summaries, of the valid simulations, shape (N, C).
        failed: Standard coordinates of the failed simulations, shape (F, d).
    """

    y: Array
    x: Array
    failed: Array


def emulate(
    keys: FitKeys,
    emulator: Emulator,
    prior: Prior,
    seen: Seen,
    standardiser: Standardiser | None,
    *,
    members: int,
    training: Training,
    progress: bool,
) -> tuple[Emulated, StackHistory]:
    """Fit an emulator and draw simulations from it.

    Args:
        keys: Keys of the posterior fit that trains on the draws. With these keys, the emulator
            holds out the same rows as that fit.
        emulator: Settings of the emulator.
        prior: The prior.
        seen: Simulations to which the emulator is fitted.
        standardiser: Standardiser of the observation; None for fixed summaries, which the
            posterior does not standardise.
        members: Number of members M of the posterior fit.
        training: Settings of the posterior fit; only the validation fraction and the checkpoint
            are used.
        progress: Show progress bars.

    Returns:
        The draws, in the order of the members, and the history of the emulator's fits. The losses
        in the history are negative log densities of the emulated observation.

    Raises:
        EmulatorFailed: The observation is too long, the fit of every density diverged, or some
            member has no finite draw.
        KeyboardInterrupt: A fit of the emulator was interrupted.
    """
    most = emulator.max_features if standardiser is not None else MAX_FIXED_SUMMARIES
    if seen.x.shape[1] > most:
        kind = "numbers" if standardiser is not None else "fixed summaries"
        raise EmulatorFailed(
            f"an observation has {seen.x.shape[1]} {kind}; an emulator accepts at most {most}"
            f"{' (max_features)' if standardiser is not None else ''}"
        )
    fraction = training.validation_fraction
    training = emulator.training.with_checkpoint_of(training)
    training = dataclasses.replace(training, validation_fraction=fraction)
    noise_key, theta_key, draw_key = jax.random.split(keys.emulator, 3)
    space = _space(seen.x, standardiser)
    features = _smooth(space.grid, space.emulated, noise_key, seen.x)
    rows = TrainingData.of_rows(features, seen.y)
    settings = {"members": members, "progress": progress}
    parts, history = _fitted(keys, emulator, training, rows, **settings)
    draws = []
    for m in range(members):
        member_theta_key, member_draw_key = (
            jax.random.fold_in(k, m) for k in (theta_key, draw_key)
        )
        n = emulator.simulations
        y = _parameters(member_theta_key, prior, seen, -(-n // CHUNK_DRAWS) * CHUNK_DRAWS)
        drawn = _draw(member_draw_key, [part.of_member(m) for part in parts], y, n)
        emulated = _standard(space, drawn)
        draws.append(_finite(y, emulated, n))
    ys, xs = zip(*draws, strict=True)
    return Emulated(jnp.concatenate(ys), jnp.concatenate(xs)), history


class _Space(NamedTuple):
    """Maps between observations and features.

    Attributes:
        grid: Grid on which each entry of the observation lies.
        emulated: Standardiser of the observations for the emulator.
        standardiser: Standardiser of the observations for the posterior estimator, or None.
        bounds: Smallest and largest allowed value of each entry, shape (2, C); None for no bounds.
    """

    grid: Grid
    emulated: Standardiser
    standardiser: Standardiser | None
    bounds: Array | None


def _space(x: Array, standardiser: Standardiser | None) -> _Space:
    """Return the maps for observations x (N, C).

    Without a standardiser, which would compress them, extreme draws are clipped at a distance from
    the simulations that equals their range.
    """
    grid = find_grid(np.asarray(x))
    if standardiser is not None:
        return _Space(grid, standardiser._replace(linear=LINEAR_RANGE), standardiser, None)
    low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
    bounds = jnp.stack([low - (high - low), high + (high - low)])
    return _Space(grid, fit_standardiser(x)._replace(linear=LINEAR_RANGE), None, bounds)


class _Part(NamedTuple):
    """A fitted density of the emulator, with its weight in the mixture."""

    blueprint: Blueprint
    weights: Weights
    share: float

    def of_member(self, m: int) -> _Part:
        """Return the density of one member."""
        return self._replace(weights=jax.tree.map(lambda leaf: leaf[m], self.weights))


def _fitted(
    keys: FitKeys,
    emulator: Emulator,
    training: Training,
    rows: TrainingData,
    *,
    members: int,
    progress: bool,
) -> tuple[list[_Part], StackHistory]:
    """Fit every density of the observation to the rows, and compute the mixture weights."""
    num_features, num_parameters = rows.y.shape[1], rows.features.shape[1:]
    sizes = Sizes((False,) * num_features, jax.tree.structure(0), (num_parameters,))

    def fit_one(i: int, blueprint: Blueprint) -> tuple[tuple[Blueprint, Weights], History]:
        settings = {"label": "fit emulator", "name": f"emulator-{i}"}
        weights, history = fit(
            keys, blueprint, training, rows, members=members, progress=progress, **settings
        )
        return (blueprint, weights), history

    blueprints = [Blueprint(density, None, sizes) for density in emulator.densities]
    try:
        fits = [partial(fit_one, i, b) for i, b in enumerate(blueprints)]
        parts, history = fit_each(fits, "density of the emulator")
    except TrainingDiverged as error:
        raise EmulatorFailed(str(error)) from error
    if history.interrupted:
        raise KeyboardInterrupt
    return [_Part(blueprint, weights, share) for (blueprint, weights), share in parts], history


@compiled_per_size
@jax.jit
def _smooth(grid: Grid, emulated: Standardiser, key: Key, x: Array) -> Array:
    """Return continuous features: add noise to entries on a grid, replace constants by noise."""
    features, constant_key = emulated(dequantised(grid, key, x)), jax.random.fold_in(key, 1)
    noise = jax.random.uniform(constant_key, features.shape, features.dtype, -0.5, 0.5)
    return jnp.where(jnp.isinf(grid.step)[None], noise, features)


@compiled_per_size
@jax.jit
def _standard(space: _Space, features: Array) -> Array:
    """Convert emulated features to features of the estimator; NaN where a value overflows."""
    x = quantised(space.grid, jnp.asarray(space.emulated.inverse(features)))
    x = jnp.where(jnp.isfinite(x), x, jnp.nan)
    x = x if space.bounds is None else jnp.clip(x, *space.bounds[:, None])
    return x if space.standardiser is None else space.standardiser(x)


@compiled_per_size
@partial(jax.jit, static_argnums=2)
@full_precision
def _prior_draws(key: Key, prior: Prior, n: int) -> Array:
    return prior.unchecked_to_standard(prior.unchecked_sample(key, n))


def _parameters(key: Key, prior: Prior, seen: Seen, n: int) -> Array:
    """Draw parameters (n, d) from the prior, with lower density where simulations failed."""
    if not len(seen.failed):
        return _prior_draws(key, prior, n)
    from sklearn.neighbors import KNeighborsClassifier

    rows = np.concatenate([seen.y, seen.failed])
    labels = np.arange(len(rows)) < len(seen.y)
    model = KNeighborsClassifier(min(NUM_NEIGHBOURS, len(rows))).fit(rows, labels)
    accepted: list[np.ndarray] = []
    # a fraction s of valid simulations takes about 1 / s passes; draws are repeated if too few
    for i in range(10 + 2 * len(rows) // len(seen.y)):
        prior_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        draws = np.asarray(_prior_draws(prior_key, prior, n))
        probability = model.predict_proba(draws)[:, 1]
        accepted.append(draws[np.asarray(jax.random.uniform(accept_key, (n,))) < probability])
        if sum(map(len, accepted)) >= n:
            break
    draws = np.concatenate(accepted)
    if not len(draws):
        raise EmulatorFailed("no simulation near a draw of the prior is valid")
    return jnp.asarray(draws[np.arange(n) % len(draws)])


def _draw(key: Key, parts: Sequence[_Part], y: Array, n: int) -> Array:
    """Draw features of observations for parameters (N, d); the caller needs the first n rows.

    The parameters are divided between the densities in proportion to the mixture weights. They are
    in random order, so that consecutive rows can be given to one density.
    """
    ends = np.round(np.cumsum([part.share for part in parts]) * n).astype(int)
    ends[-1], first, drawn = len(y), 0, []
    for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
        keys = jax.random.split(jax.random.fold_in(key, i), len(y) // CHUNK_DRAWS)
        chunks = range(first // CHUNK_DRAWS, -(-end // CHUNK_DRAWS))
        rows = [
            _draw_chunk(
                part.blueprint,
                part.weights,
                keys[c],
                y[c * CHUNK_DRAWS : (c + 1) * CHUNK_DRAWS],
            )
            for c in chunks
        ]
        if rows:
            skipped = first - chunks.start * CHUNK_DRAWS
            drawn.append(np.concatenate(rows)[skipped:][: end - first])
        first = end
    return jnp.asarray(np.concatenate(drawn))


@partial(jax.jit, static_argnums=0)
@full_precision
def _draw_chunk(blueprint: Blueprint, weights: Weights, key: Key, y: Array) -> Array:
    return nnx.merge(graph_of(blueprint), *weights)(y).sample(seed=key)


def _finite(y: Array, features: Array, n: int) -> tuple[Array, Array]:
    """Return the first n finite rows; repeat the rows if fewer than n are finite."""
    rows = np.flatnonzero(np.all(np.isfinite(np.asarray(features)), axis=1))
    if not len(rows):
        raise EmulatorFailed("none of its draws is finite")
    rows = rows[np.arange(n) % len(rows)]
    return y[rows], features[rows]

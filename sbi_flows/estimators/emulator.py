"""An emulator of the simulator: densities of the observation given the parameters.

A density of 8 numbers given 5 parameters may be far simpler than the posterior that follows from
it, and is then learned from far fewer simulations. Draws of it cost next to nothing: a posterior
estimator that trains on them as well no longer over-fits the few real rows.

Public names: `Emulator`.

Sources: Papamakarios et al. 2019, "Sequential Neural Likelihood" (arXiv:1805.07226), for the
densities; Wiqvist, Frellsen & Picchini 2021 (arXiv:2102.06522), who fit a posterior to draws of a
learned likelihood, by the other Kullback-Leibler divergence.
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
from sbi_flows.core.errors import SbiFlowsError, TrainingDiverged
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import DensitySettings, check_density
from sbi_flows.densities.conditional import Blueprint, Sizes, Weights, graph_of
from sbi_flows.densities.flow import MAF, NSF
from sbi_flows.estimators.stacking import StackHistory, fit_each
from sbi_flows.observations.quantised import Grid, dequantised, find_grid, quantised
from sbi_flows.observations.standardise import Standardiser
from sbi_flows.prior.prior import Prior
from sbi_flows.training import FitKeys, History, Training, TrainingData, fit

CHUNK = 2_500
"""Draws in one compiled call."""

LINEAR = 25.0
"""Scales within which an emulated observation stays as it is: noise of constant size is simpler
than what compressed tails make of it, which only the heaviest need."""

NEIGHBOURS = 20
"""Simulations around a parameter vector that say how likely one is to fail there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emulator:
    """Densities of the observation that are fitted first, and how much is drawn from them.

    They are weighted by the log density of held-out rows, as in `sf.Stack`; each member of an
    ensemble trains on draws of the emulator that held out the same rows as it does. Observations
    with few values a step apart, such as counts, are emulated with uniform noise added, and
    rounded. Where simulations failed, fewer parameters are drawn.

    Attributes:
        densities: The densities to fit and to mix.
        training: Settings of their fits; the validation fraction and the checkpoint are the
            estimator's.
        simulations: Number of emulated simulations for each member, with parameters from the prior.
        max_features: Longer observations are not emulated, and the estimator is fitted without:
            the noise of hundreds of numbers takes more simulations to learn than the posterior.

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
        """Refuse what cannot be fitted.

        Raises:
            ValueError: There is no density, a number is not positive, or `training` is no training
                or has a checkpoint of its own.
        """
        given = self.densities
        densities = tuple(given) if isinstance(given, list | tuple) else (given,)
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
    """There is no emulator of these simulations; the message says why."""


class Emulated(NamedTuple):
    """Draws of an emulator: standard coordinates (M * n, d), features (M * n, C)."""

    y: Array
    features: Array


class Seen(NamedTuple):
    """Simulations that an emulator is fitted to.

    Attributes:
        y: Standard coordinates of the valid ones, shape (N, d).
        x: Their observations, flat, shape (N, C).
        failed: Standard coordinates of the others, shape (F, d).
    """

    y: Array
    x: Array
    failed: Array


def emulate(
    keys: FitKeys,
    emulator: Emulator,
    prior: Prior,
    seen: Seen,
    standardiser: Standardiser,
    *,
    members: int,
    training: Training,
    progress: bool,
) -> tuple[Emulated, StackHistory]:
    """Fit an emulator and draw from it.

    Args:
        keys: Keys of the fit that the draws are for, so that its members hold out the same rows.
        emulator: What to fit and how much to draw.
        prior: The prior.
        seen: The simulations.
        standardiser: Observation to features.
        members: Number of members M of the fit that the draws are for.
        training: Its settings, for the validation fraction and the checkpoint.
        progress: Show progress bars.

    Returns:
        The draws, those of one member after those of another, and the history of the fits, whose
        losses are those of the observation as it is emulated, not of theta.

    Raises:
        EmulatorFailed: The observation is too long, every density diverged, or none of a member's
            draws is finite.
        KeyboardInterrupt: A fit was interrupted; there is nothing to train on then.
    """
    if seen.x.shape[1] > emulator.max_features:
        raise EmulatorFailed(
            f"observations of {seen.x.shape[1]} numbers are longer than its "
            f"max_features={emulator.max_features}"
        )
    grid, wide = find_grid(np.asarray(seen.x)), standardiser._replace(linear=LINEAR)
    noise_key, theta_key, draw_key = jax.random.split(keys.emulator, 3)
    features = _smooth(grid, wide, noise_key, seen.x)
    fraction = training.validation_fraction
    kept = emulator.training.with_checkpoint_of(training)
    training = dataclasses.replace(kept, validation_fraction=fraction)
    sizes = Sizes((False,) * seen.x.shape[1], jax.tree.structure(0), (seen.y.shape[1:],))

    def fit_one(i: int, blueprint: Blueprint) -> tuple[tuple[Blueprint, Weights], History]:
        weights, history = fit(
            keys,
            blueprint,
            training,
            TrainingData.of_rows(features, seen.y),
            members=members,
            progress=progress,
            label="fit emulator",
            name=f"emulator-{i}",
        )
        return (blueprint, weights), history

    blueprints = [Blueprint(density, None, sizes) for density in emulator.densities]
    try:
        fits = [partial(fit_one, i, b) for i, b in enumerate(blueprints)]
        parts, history = fit_each(fits, "density of the emulator", stacklevel=5)
    except TrainingDiverged as error:
        raise EmulatorFailed(str(error)) from error
    if history.interrupted:
        raise KeyboardInterrupt
    n, drawn = emulator.simulations, []
    for m in range(members):
        own_theta_key, own_draw_key = (jax.random.fold_in(k, m) for k in (theta_key, draw_key))
        y = _parameters(own_theta_key, prior, seen, -(-n // CHUNK) * CHUNK)
        own = [
            (blueprint, jax.tree.map(lambda leaf, m=m: leaf[m], weights), share)
            for (blueprint, weights), share in parts
        ]
        emulated = _standard(grid, wide, standardiser, _draw(own_draw_key, own, y, n))
        drawn.append(_finite(y, emulated, n))
    ys, xs = zip(*drawn, strict=True)
    return Emulated(jnp.concatenate(ys), jnp.concatenate(xs)), history


@jax.jit
def _smooth(grid: Grid, emulated: Standardiser, key: Key, x: Array) -> Array:
    """Features that have a density: those of constants become noise, whatever their size."""
    features, constant_key = emulated(dequantised(grid, key, x)), jax.random.fold_in(key, 1)
    noise = jax.random.uniform(constant_key, features.shape, features.dtype, -0.5, 0.5)
    return jnp.where(jnp.isinf(grid.step)[None], noise, features)


@jax.jit
def _standard(
    grid: Grid, emulated: Standardiser, standardiser: Standardiser, features: Array
) -> Array:
    """Features of the observations that emulated features stand for; NaN where these overflow."""
    x = quantised(grid, emulated.inverse(features))
    return standardiser(jnp.where(jnp.isfinite(x), x, jnp.nan))


@partial(jax.jit, static_argnums=2)
@full_precision
def _prior_draws(key: Key, prior: Prior, n: int) -> Array:
    return prior.unchecked_to_standard(prior.unchecked_sample(key, n))


def _parameters(key: Key, prior: Prior, seen: Seen, n: int) -> Array:
    """Draws (n, d) of the prior, thinned by how often simulations near each of them are valid."""
    if not len(seen.failed):
        return _prior_draws(key, prior, n)
    from sklearn.neighbors import KNeighborsClassifier

    rows = np.concatenate([seen.y, seen.failed])
    labels = np.arange(len(rows)) < len(seen.y)
    model = KNeighborsClassifier(min(NEIGHBOURS, len(rows))).fit(rows, labels)
    kept: list[np.ndarray] = []
    # at a share s of valid simulations, some 1 / s passes; what is missing then is repeated
    for i in range(10 + 2 * len(rows) // len(seen.y)):
        prior_key, keep_key = jax.random.split(jax.random.fold_in(key, i))
        draws = np.asarray(_prior_draws(prior_key, prior, n))
        chance = model.predict_proba(draws)[:, 1]
        kept.append(draws[np.asarray(jax.random.uniform(keep_key, (n,))) < chance])
        if sum(map(len, kept)) >= n:
            break
    found = np.concatenate(kept)
    if not len(found):
        raise EmulatorFailed("no simulation near a draw of the prior is valid")
    return jnp.asarray(found[np.arange(n) % len(found)])


def _draw(key: Key, parts: Sequence[tuple[Blueprint, Weights, float]], y: Array, n: int) -> Array:
    """Features of observations for parameters (N, d): each density draws its share of the first n.

    The parameters are in random order, so it does not matter which rows these are.
    """
    ends = np.round(np.cumsum([share for *_, share in parts]) * n).astype(int)
    ends[-1], first, drawn = len(y), 0, []
    for i, ((blueprint, weights, _), end) in enumerate(zip(parts, ends, strict=True)):
        keys = jax.random.split(jax.random.fold_in(key, i), len(y) // CHUNK)
        chunks = range(first // CHUNK, -(-end // CHUNK))
        rows = [
            np.asarray(_draw_chunk(blueprint, weights, keys[c], y[c * CHUNK : (c + 1) * CHUNK]))
            for c in chunks
        ]
        skipped = first - chunks.start * CHUNK
        drawn += [np.concatenate(rows)[skipped:][: end - first]] if rows else []
        first = end
    return jnp.asarray(np.concatenate(drawn))


@partial(jax.jit, static_argnums=0)
@full_precision
def _draw_chunk(blueprint: Blueprint, weights: Weights, key: Key, y: Array) -> Array:
    return nnx.merge(graph_of(blueprint), *weights)(y).sample(seed=key)


def _finite(y: Array, features: Array, n: int) -> tuple[Array, Array]:
    """The first n rows that are finite, from the start again where there are too few."""
    rows = np.flatnonzero(np.all(np.isfinite(np.asarray(features)), axis=1))
    if not len(rows):
        raise EmulatorFailed("none of its draws is finite")
    rows = rows[np.arange(n) % len(rows)]
    return y[rows], features[rows]

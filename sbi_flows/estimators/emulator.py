"""Emulator of the simulator: learned densities p(x | theta) of the observation.

The likelihood can be a far simpler function than the posterior. It can then be learned from far
fewer simulations. Draws from the learned likelihood are cheap. A posterior estimator that trains on
the simulations and on these draws over-fits less.

Public names: `Emulator`.

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
"""Number of draws in one compiled call."""

LINEAR = 25.0
"""Distance from the median, in units of the scale, beyond which the emulator compresses values.

The limit is wide: compression makes the noise depend on the value, which is harder to learn. Only
the heaviest tails need it.
"""

NEIGHBOURS = 20
"""Number of nearest simulations from which the probability of a valid simulation is estimated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emulator:
    """Settings of an emulator: densities p(x | theta) and the number of draws from them.

    The emulator is fitted before the posterior. It is a mixture of `densities`, weighted by the log
    density of held-out rows as in `sf.Stack`. The emulator and the posterior are ensembles with the
    same held-out rows: each member of the posterior trains on draws from the emulator's member that
    holds out the same rows. If an observed quantity takes values on a grid, such as counts, uniform
    noise is added before the fit, and draws are rounded to the grid. Fewer parameters are drawn
    where many simulations failed.

    Attributes:
        densities: The densities to fit and to mix.
        training: Training settings of the densities. The validation fraction and the checkpoint are
            taken from the training settings of the posterior estimator.
        simulations: Number of emulated simulations for each member, with parameters from the prior.
        max_features: Maximum length of an observation. With longer observations the posterior is
            fitted without an emulator: the likelihood of hundreds of numbers takes more simulations
            to learn than the posterior.

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
            ValueError: `densities` is empty, a number is not positive, `training` is not an
                `sf.Training`, or `training` has a checkpoint.
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
    """The emulator could not be fitted or used; the message gives the reason."""


class Emulated(NamedTuple):
    """Draws from an emulator: standard coordinates (M * n, d) and features (M * n, C)."""

    y: Array
    features: Array


class Seen(NamedTuple):
    """Simulations to which an emulator is fitted.

    Attributes:
        y: Standard coordinates of the parameters of valid simulations, shape (N, d).
        x: Flattened observations of the valid simulations, shape (N, C).
        failed: Standard coordinates of the parameters of failed simulations, shape (F, d).
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
    """Fit an emulator and draw simulations from it.

    Args:
        keys: Keys of the fit of the posterior. Emulator and posterior then hold out the same rows.
        emulator: Settings of the emulator.
        prior: Prior from which the parameters of the draws are drawn.
        seen: Simulations to which the emulator is fitted.
        standardiser: Map from observations to the features of the posterior.
        members: Number of members M of the posterior.
        training: Training settings of the posterior; the emulator takes the validation fraction and
            the checkpoint from them.
        progress: Show progress bars.

    Returns:
        The draws, grouped by member, and the history of the fits. The losses in the history are
        negative log densities of the standardised observation given theta.

    Raises:
        EmulatorFailed: The observation is too long, the training of every density diverged, all
            draws of a member are infinite or NaN, or no simulation near a draw of the prior is
            valid.
        KeyboardInterrupt: The user interrupted a fit.
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
    """Return features with a continuous distribution, to which a density can be fitted.

    Grid values get uniform noise of one grid step. A constant feature becomes uniform noise.
    """
    features, constant_key = emulated(dequantised(grid, key, x)), jax.random.fold_in(key, 1)
    noise = jax.random.uniform(constant_key, features.shape, features.dtype, -0.5, 0.5)
    return jnp.where(jnp.isinf(grid.step)[None], noise, features)


@jax.jit
def _standard(
    grid: Grid, emulated: Standardiser, standardiser: Standardiser, features: Array
) -> Array:
    """Convert emulated features to features of the posterior; NaN where observations overflow."""
    x = quantised(grid, emulated.inverse(features))
    return standardiser(jnp.where(jnp.isfinite(x), x, jnp.nan))


@partial(jax.jit, static_argnums=2)
@full_precision
def _prior_draws(key: Key, prior: Prior, n: int) -> Array:
    return prior.unchecked_to_standard(prior.unchecked_sample(key, n))


def _parameters(key: Key, prior: Prior, seen: Seen, n: int) -> Array:
    """Draw parameters (n, d) from the prior, thinned where simulations fail.

    A draw is kept with the probability that a simulation there is valid, which is estimated from
    the nearest simulations.
    """
    if not len(seen.failed):
        return _prior_draws(key, prior, n)
    from sklearn.neighbors import KNeighborsClassifier

    rows = np.concatenate([seen.y, seen.failed])
    labels = np.arange(len(rows)) < len(seen.y)
    model = KNeighborsClassifier(min(NEIGHBOURS, len(rows))).fit(rows, labels)
    kept: list[np.ndarray] = []
    # if a fraction s of simulations is valid, about 1 / s iterations; then draws are repeated
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
    """Draw features of observations for parameters (N, d) from the mixture of densities.

    Each density draws a consecutive block of rows, whose length is its share of the first n. The
    parameters are in random order, so consecutive blocks are random subsets.
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
    """Return the first n finite rows; if there are fewer, repeat them from the start."""
    rows = np.flatnonzero(np.all(np.isfinite(np.asarray(features)), axis=1))
    if not len(rows):
        raise EmulatorFailed("none of its draws is finite")
    rows = rows[np.arange(n) % len(rows)]
    return y[rows], features[rows]

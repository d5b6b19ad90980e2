"""Ranks of true parameters among posterior draws, for many data sets.

All calibration checks need the same draws. `draw_pass` draws them once, for one chunk of data sets
at a time, and keeps only a few numbers per data set.

Internal names: `draw_pass`, `rank_valid`, `Ranks`, `HalfRanks`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.references import References
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.passes import chunks_of, continuous_ranks, usable
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations, observation_shape

DENSITY_DRAWS, ODE_DENSITY_DRAWS = 100, 7
"""Number of draws per posterior whose density is evaluated, without and with an ODE.

With 100 draws, density ranks are fine enough for a thousand data sets. With 7 draws, ranks of a
correct posterior are still uniform, because each rank is placed at random within its step. Tests
lose little power, but coverage curves are smoothed.
"""


MIN_VARIANCE = 1e-5
"""Added to the variance of each standardised parameter, so that its Cholesky factor exists."""


class HalfRanks(NamedTuple):
    """Ranks among one half of the draws, and moments of the other half.

    For a correct posterior and given data, truth and ranked draws are exchangeable and independent
    of the moments. The ranks are therefore uniform and independent of the moments.

    Attributes:
        uniform: Continuous rank of each true parameter, shape (N, D).
        residual: Continuous rank of each true residual, shape (N, D). The residual of a parameter
            is what its linear regression on all preceding parameters leaves. The regression is
            computed from the other half of the draws.
        mean: Means of the other half, shape (N, D), relative to the prior's offset.
        sd: Standard deviations of the other half, shape (N, D).
        theta: True parameters, shape (N, D), relative to the prior's offset.
        whitening: Mean of the matrices that map standardised parameters (in posterior standard
            deviations from the posterior mean) to residuals, shape (D, D).
    """

    uniform: np.ndarray
    residual: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    theta: np.ndarray
    whitening: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks of true parameters among posterior draws for N data sets.

    The N data sets are the successful simulations. A rank or share is continuous: it is placed at
    random within its step. For a correct posterior, all entries of `uniform`, `density` and
    `distance` are uniform on (0, 1).

    Attributes:
        theta: True parameters, shape (N, D), in the parameters' units.
        uniform: Continuous rank of each true parameter among its draws, shape (N, D).
        half: Ranks among the first half of the draws, which the other half does not affect; None
            if they were not requested.
        density: Continuous share of draws with a higher posterior density than the truth, shape
            (N,); None if densities were not requested.
        distance: Continuous share of draws closer to the reference point than the truth is, shape
            (N,); None without reference points.
        log_prob: Posterior log density of the truth in nats, shape (N,); None if densities were
            not requested, or if the posterior defines credible regions itself.
        mean: Posterior means, shape (N, D), in the parameters' units.
        sd: Posterior standard deviations, shape (N, D), in the parameters' units.
        draws: Number of draws from each posterior.
        labels: Names of the D parameters.
        num_failed: Number of failed simulations that were left out.
    """

    theta: np.ndarray
    uniform: np.ndarray
    half: HalfRanks | None
    density: np.ndarray | None
    distance: np.ndarray | None
    log_prob: np.ndarray | None
    mean: np.ndarray
    sd: np.ndarray
    draws: int
    labels: tuple[str, ...]
    num_failed: int


def draw_pass(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 1_000,
    references: References | None = None,
    density: bool = True,
    halves: bool = False,
    progress: bool = False,
) -> Ranks:
    """Rank the true parameters of N data sets among draws from the posterior of each.

    Args:
        key: Random key.
        posterior: The posterior to check.
        simulations: Pairs (theta, x) from the prior and the simulator; failed rows are left out.
        draws: Draws from each posterior. They must be independent (thin Markov chains).
        references: Reference points for the distances of TARP, one per valid row; without them, no
            distances are computed.
        density: Rank posterior densities as well.
        halves: Rank the truths among one half of the draws as well (`HalfRanks`).
        progress: Show a progress bar over chunks of data sets.

    Returns:
        The ranks, as NumPy arrays.

    Raises:
        ValueError: There are too few successful simulations or draws, the number of parameters
            differs from the posterior's, or references have another shape.
        SbiFlowsError: The posterior returned NaN, or draws that are not finite.
    """
    posterior = as_posterior(posterior, observation_shape(simulations.x))
    valid = usable(posterior, simulations, draws)
    ranks = rank_valid(
        key,
        posterior,
        valid,
        draws=draws,
        references=references,
        density=density,
        halves=halves,
        progress=progress,
    )
    return dataclasses.replace(ranks, num_failed=len(simulations) - len(valid))


def rank_valid(
    key: Key,
    posterior: AbstractPosterior,
    valid: Simulations,
    *,
    draws: int,
    references: References | None,
    density: bool,
    halves: bool,
    progress: bool,
) -> Ranks:
    """Rank truths like `draw_pass`, for any number of valid simulations."""
    n, dim = valid.theta.shape
    points, units = references or References(np.zeros((n, dim)), np.ones(dim))
    if np.shape(points) != (n, dim):
        raise ValueError(f"references: expected shape {(n, dim)}, got {np.shape(points)}")
    points, units = np.asarray(points), jnp.asarray(units)
    draw_key, tie_key = jax.random.split(key)
    ranked = _num_density_draws(posterior, draws) if density else 0
    chunks = []
    for chunk_key, rows, count in chunks_of(draw_key, n, draws * dim, "draw", progress):
        part = valid[rows]
        arrays = _draws_and_densities(chunk_key, posterior, part, draws, ranked)
        relative = map(posterior.prior.subtract_offset, (arrays[0], part.theta, points[rows]))
        sample, truth, point = relative
        reduced = _reduce(sample, truth, point, *arrays[1:], units)
        if halves:
            reduced |= _reduce_halves(sample, truth)
        chunks.append(jax.tree.map(lambda leaf, m=count: np.asarray(leaf)[:m], reduced))
    counts = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    _require_finite(counts["finite"])
    below, denser, nearer = _uniform_ranks(tie_key, counts, draws, ranked)
    if density and not ranked:
        level_key = jax.random.fold_in(tie_key, 3)
        denser = posterior.credible_levels(level_key, valid.theta, valid.x)
    return Ranks(
        theta=np.asarray(valid.theta),
        uniform=below,
        half=_half_ranks(tie_key, counts, posterior.prior, valid, draws) if halves else None,
        density=denser if density else None,
        distance=None if references is None else nearer,
        log_prob=counts["log_prob"] if ranked else None,
        mean=np.asarray(posterior.prior.add_offset(jnp.asarray(counts["mean"]))),
        sd=counts["sd"],
        draws=draws,
        labels=tuple(posterior.prior.labels),
        num_failed=0,
    )


def _num_density_draws(posterior: AbstractPosterior, draws: int) -> int:
    """Return the number of draws per data set whose density is evaluated.

    The number is 0 if the posterior defines credible regions itself, because their levels are then
    known without densities.
    """
    if posterior.has_own_regions:
        return 0
    return min(draws, ODE_DENSITY_DRAWS if posterior.needs_ode else DENSITY_DRAWS)


def _uniform_ranks(
    key: Key, counts: dict[str, np.ndarray], draws: int, ranked: int
) -> list[np.ndarray]:
    """Convert counts of draws to continuous ranks.

    A count is the number of draws that are below the truth, have a higher density, or are nearer to
    the reference point.
    """
    among = {"below": draws, "denser": ranked, "nearer": draws}
    keys = jax.random.split(key, 3)
    return [
        continuous_ranks(k, counts[name], counts[f"{name}_equal"], number)
        for k, (name, number) in zip(keys, among.items(), strict=True)
    ]


def _half_ranks(
    key: Key, counts: dict[str, np.ndarray], prior: Prior, valid: Simulations, draws: int
) -> HalfRanks:
    """Convert the result of `_reduce_halves` to ranks. `key` has given the keys of other ranks."""
    uniform, residual = (
        continuous_ranks(
            jax.random.fold_in(key, tag), counts[name], counts[f"{name}_equal"], draws // 2
        )
        for tag, name in ((4, "half"), (5, "residual"))
    )
    theta = np.asarray(prior.subtract_offset(valid.theta))
    whitening = counts["whitening"].mean(axis=0)
    return HalfRanks(uniform, residual, counts["other_mean"], counts["other_sd"], theta, whitening)


def _draws_and_densities(
    key: Key, posterior: AbstractPosterior, part: Simulations, draws: int, ranked: int
) -> tuple[Array | np.ndarray, Array, Array]:
    """Return draws (B, L, D), log densities (B, ranked) of the first draws, and of truths (B,).

    Densities are zeros of shape (B, 1) and (B,) if `ranked` is 0.
    """
    sample = posterior.sample(key, part.x, draws)
    if not ranked:
        return sample, jnp.zeros((len(part), 1)), jnp.zeros(len(part))
    log_prob = posterior.log_prob(sample[:, :ranked], part.x)
    return sample, log_prob, posterior.log_prob(part.theta, part.x)


@jax.jit
def _reduce(
    sample: Array, theta: Array, points: Array, log_prob: Array, log_truth: Array, units: Array
) -> dict[str, Array]:
    """Reduce the draws of each data set to counts and moments."""
    truth, point = theta[:, None], points[:, None]
    unit = units[None, None]
    distance = jnp.sum(((sample - point) / unit) ** 2, axis=-1)
    truth_distance = jnp.sum(((truth - point) / unit) ** 2, axis=-1)
    finite = jnp.all(jnp.isfinite(sample), axis=(1, 2)) & ~jnp.any(jnp.isnan(log_prob), axis=1)
    return {
        "below": jnp.sum(sample < truth, axis=1),
        "below_equal": jnp.sum(sample == truth, axis=1),
        "denser": jnp.sum(log_prob > log_truth[:, None], axis=1),
        "denser_equal": jnp.sum(log_prob == log_truth[:, None], axis=1),
        "nearer": jnp.sum(distance < truth_distance, axis=1),
        "nearer_equal": jnp.sum(distance == truth_distance, axis=1),
        "mean": jnp.mean(sample, axis=1),
        "sd": jnp.std(sample, axis=1),
        "log_prob": log_truth,
        "finite": finite & ~jnp.isnan(log_truth),
    }


@jax.jit
def _reduce_halves(sample: Array, theta: Array) -> dict[str, Array]:
    """Reduce draws (B, L, D) to counts among one half, and moments of the other half."""
    truth = theta[:, None]
    first, other = jnp.split(sample, [sample.shape[1] // 2], axis=1)
    residual, true_residual, whitening = _residuals(first, truth, other)
    return {
        "half": jnp.sum(first < truth, axis=1),
        "half_equal": jnp.sum(first == truth, axis=1),
        "other_mean": jnp.mean(other, axis=1),
        "other_sd": jnp.std(other, axis=1),
        "residual": jnp.sum(residual < true_residual, axis=1),
        "residual_equal": jnp.sum(residual == true_residual, axis=1),
        "whitening": jnp.mean(whitening, axis=0, keepdims=True),
    }


def _residuals(sample: Array, truth: Array, other: Array) -> tuple[Array, Array, Array]:
    """Whiten draws (B, L, D) and truths (B, 1, D) by the covariance of other draws (B, M, D).

    Each whitened parameter is, up to its scale, the residual of its linear regression on all
    preceding parameters.

    Returns:
        Residuals (B, L, D) and (B, 1, D), and the whitening matrices (B, D, D).
    """
    mean, sd = jnp.mean(other, axis=1, keepdims=True), jnp.std(other, axis=1, keepdims=True)
    scale = jnp.where(sd > 0, sd, 1.0)
    z, true_z, other_z = ((values - mean) / scale for values in (sample, truth, other))
    correlation = jnp.einsum("bli,blj->bij", other_z, other_z) / other.shape[1]
    factor = jnp.linalg.cholesky(correlation + MIN_VARIANCE * jnp.eye(sample.shape[2])[None])
    inverse = jnp.linalg.inv(factor)
    return z @ inverse.mT, true_z @ inverse.mT, inverse


def _require_finite(finite: np.ndarray) -> None:
    """Raise SbiFlowsError unless all entries are true."""
    if not np.all(finite):
        raise SbiFlowsError(
            f"the posterior of {int(np.sum(~finite))} of {len(finite)} data sets gave NaN, or "
            "draws that are not finite"
        )

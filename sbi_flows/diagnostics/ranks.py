"""One pass of posterior draws over many data sets, reduced to ranks as it goes.

Every calibration check needs the same draws: `draw_pass` takes them once, a chunk of data sets at
a time in one compiled shape, and keeps only numbers per data set. Public names: `draw_pass`,
`Ranks`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.typing import Key
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.posteriors.passes import chunks_of, continuous_ranks, usable
from sbi_flows.simulations.simulations import Simulations

DENSITY_DRAWS, SOLVED_DRAWS = 100, 7
"""Draws of each posterior whose density is evaluated: a share out of 100 is fine enough to rank a
thousand data sets by. Fewer where each density is an ODE to solve: the ranks, random between
their steps, are uniform all the same, and the tests lose little; levels are blurred."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """What is left of a draw pass over N data sets; N counts only simulations that succeeded.

    All of `uniform`, `density` and `distance` are uniform on (0, 1) for a correct posterior.

    Attributes:
        theta: True parameters, shape (N, D).
        uniform: Continuous rank of each true parameter among its draws, shape (N, D).
        density: Continuous share of draws denser under the posterior than the truth, shape (N,);
            None where no density was asked for.
        distance: Continuous share of draws nearer to the reference point than the truth, shape
            (N,); None without reference points.
        log_prob: Posterior log density of the truth, shape (N,), nats; None as for `density`.
        mean: Posterior means, shape (N, D).
        sd: Posterior standard deviations, shape (N, D).
        draws: Number of draws from each posterior.
        labels: Names of the D parameters.
        num_failed: Simulations left out because they failed.
    """

    theta: np.ndarray
    uniform: np.ndarray
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
    references: Any | None = None,
    scale: Any | None = None,
    density: bool = True,
    progress: bool = False,
) -> Ranks:
    """Rank the true parameters of N data sets among draws from the posterior of each.

    Args:
        key: Random key.
        posterior: The posterior to check.
        simulations: Pairs (theta, x) from the prior and the simulator; failed rows are left out.
        draws: Draws from each posterior; they must be independent (thin Markov chains).
        references: Reference points for the distances of TARP, shape (N, D) over the rows that
            succeeded; none leaves the distances out.
        scale: Unit of each parameter in those distances, shape (D,); ones by default.
        density: Whether to evaluate the posterior's density too.
        progress: Show a progress bar over chunks of data sets.

    Returns:
        The ranks, on the host.

    Raises:
        ValueError: As `usable` says, or references of another shape.
        SbiFlowsError: The posterior gave NaN, or draws that are not finite.
    """
    valid = usable(posterior, simulations, draws)
    n, dim = valid.theta.shape
    if references is not None and np.shape(references) != (n, dim):
        raise ValueError(f"references: expected shape {(n, dim)}, got {np.shape(references)}")
    points = jnp.zeros((n, dim)) if references is None else jnp.asarray(references)
    units = jnp.ones(dim) if scale is None else jnp.asarray(scale)
    draw_key, tie_key = jax.random.split(key)
    parts = []
    for chunk_key, rows, kept in chunks_of(draw_key, n, draws * dim, "draw", progress):
        part = valid[rows]
        sampled = _sample(chunk_key, posterior, part, draws, density)
        reduced = _reduce(*sampled, part.theta, points[rows], units)
        parts.append(jax.tree.map(lambda leaf, m=kept: np.asarray(leaf)[:m], reduced))
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    _require_finite(joined["finite"])
    compared = {"below": draws, "denser": min(draws, _ranked(posterior)), "nearer": draws}
    uniform = {
        name: continuous_ranks(k, joined[name], joined[f"{name}_equal"], compared[name])
        for name, k in zip(("below", "denser", "nearer"), jax.random.split(tie_key, 3), strict=True)
    }
    if density and hasattr(posterior, "density_ranks"):
        uniform["denser"] = posterior.density_ranks(
            jax.random.fold_in(tie_key, 3), valid.theta, valid.x
        )
    return Ranks(
        theta=np.asarray(valid.theta),
        uniform=uniform["below"],
        density=uniform["denser"] if density else None,
        distance=None if references is None else uniform["nearer"],
        log_prob=joined["log_prob"] if density else None,
        mean=joined["mean"],
        sd=joined["sd"],
        draws=draws,
        labels=tuple(posterior.prior.labels),
        num_failed=len(simulations) - n,
    )


def _ranked(posterior: PosteriorLike) -> int:
    """Most draws of each posterior whose density is evaluated."""
    return SOLVED_DRAWS if getattr(posterior, "solved", False) else DENSITY_DRAWS


def _sample(
    key: Key, posterior: PosteriorLike, part: Simulations, draws: int, density: bool
) -> tuple[Array, Array, Array]:
    """Draws (B, L, D), log densities of the first (B, at most L), and that of the truth (B,)."""
    sample = posterior.sample(key, part.x, draws)
    if not density:
        return sample, jnp.zeros((len(part), 1)), jnp.zeros(len(part))
    log_prob = posterior.log_prob(sample[:, : _ranked(posterior)], part.x)
    return sample, log_prob, posterior.log_prob(part.theta, part.x)


@jax.jit
def _reduce(
    sample: Array, log_prob: Array, log_truth: Array, theta: Array, points: Array, units: Array
) -> dict[str, Array]:
    """Counts and moments of each data set's draws; the draws themselves are not kept."""
    truth, point = theta[:, None], points[:, None]
    unit = units[None, None]
    away = jnp.sum(((sample - point) / unit) ** 2, axis=-1)
    truth_away = jnp.sum(((truth - point) / unit) ** 2, axis=-1)
    finite = jnp.all(jnp.isfinite(sample), axis=(1, 2)) & ~jnp.any(jnp.isnan(log_prob), axis=1)
    return {
        "below": jnp.sum(sample < truth, axis=1),
        "below_equal": jnp.sum(sample == truth, axis=1),
        "denser": jnp.sum(log_prob > log_truth[:, None], axis=1),
        "denser_equal": jnp.sum(log_prob == log_truth[:, None], axis=1),
        "nearer": jnp.sum(away < truth_away, axis=1),
        "nearer_equal": jnp.sum(away == truth_away, axis=1),
        "mean": jnp.mean(sample, axis=1),
        "sd": jnp.std(sample, axis=1),
        "log_prob": log_truth,
        "finite": finite & ~jnp.isnan(log_truth),
    }


def _require_finite(finite: np.ndarray) -> None:
    if not np.all(finite):
        raise SbiFlowsError(
            f"the posterior of {int(np.sum(~finite))} of {len(finite)} data sets gave NaN, or "
            "draws that are not finite"
        )

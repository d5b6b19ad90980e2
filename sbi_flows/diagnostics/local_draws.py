"""True parameters and posterior draws for data sets near an observation, for the local check.

Internal names: `LocalDraws`, `local_pairs`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics.local_classifier import MAX_COORDINATE, Pairs
from sbi_flows.diagnostics.local_neighbours import (
    MOMENT_DRAWS,
    Frame,
    in_frame,
    local_frame,
    nearest,
)
from sbi_flows.observations.standardise import features_of, fit_standardiser
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.passes import chunks_of
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations

NEIGHBOUR_SHARE, MIN_NEIGHBOURS = 0.25, 200
"""Share of the simulations that the classifiers are trained on, and their minimum number."""

MAX_DISTANCE_SD = 10.0
"""Largest distance from the posterior mean, in standard deviations, to which values are clipped."""


class LocalDraws(NamedTuple):
    """Truths and draws for data sets near the observation, and posterior draws at the observation.

    Attributes:
        classifier: Truths and draws in the coordinates of the classifiers.
        parameters: Truths (k, D) and draws (k, D), in posterior standard deviations from the
            posterior mean of each parameter, and weights (k,).
        points: Draws at the observation in the coordinates of the classifiers, shape (n, d).
    """

    classifier: Pairs
    parameters: tuple[np.ndarray, np.ndarray, np.ndarray]
    points: Array


class _Moments(NamedTuple):
    """One posterior draw for each of N data sets, and moments of further draws.

    Attributes:
        theta: The single draw, shape (N, D).
        standard: The single draw in the prior's standard coordinates, shape (N, d).
        center: Mean of the further draws, shape (N, D).
        scale: Standard deviation of the further draws, shape (N, D).
        frame: Frame of the further draws in standard coordinates.
        finite: True where all draws are finite, shape (N,).
    """

    theta: Array | np.ndarray
    standard: Array | np.ndarray
    center: Array | np.ndarray
    scale: Array | np.ndarray
    frame: Frame
    finite: Array | np.ndarray


def local_pairs(
    key: Key,
    posterior: AbstractPosterior,
    sims: Simulations,
    observed: Obs,
    samples: Array | np.ndarray,
    *,
    progress: bool,
) -> LocalDraws:
    """Draw once for each data set, and select the data sets near the observation.

    One draw is paired with the truth of its data set. Other draws define the frame, which gives the
    standardised coordinates of the posterior. If the paired draw also defined the frame, it would
    lie closer to the centre of the frame than the truth.

    Args:
        key: Random key.
        posterior: The posterior.
        sims: Simulations, all successful.
        observed: A batch that consists of the observation.
        samples: Posterior draws at the observation, shape (n, D).
        progress: Show a progress bar.
    """
    prior = posterior.prior
    draw_key, near_key = jax.random.split(key)
    drawn = _draw_moments(draw_key, posterior, sims, progress)
    standard_samples = _to_standard(prior, prior.subtract_offset(samples))
    truths = prior.subtract_offset(sims.theta)
    frame = jax.tree.map(np.asarray, local_frame(standard_samples[None]))
    mean = np.concatenate([drawn.frame.mean, frame.mean])
    sd = np.concatenate([drawn.frame.sd, frame.sd])
    # A width larger by exp(1/2) counts as much as a mean shifted by one prior standard deviation.
    moments = np.concatenate([mean, 2.0 * np.log(sd)], axis=1)
    truth_and_draw = np.asarray(_to_standard(prior, truths)), np.asarray(drawn.standard)
    features = _features(posterior, sims.x, observed)
    rows, weight = nearest(
        near_key, features, moments, truth_and_draw, NEIGHBOUR_SHARE, MIN_NEIGHBOURS
    )
    frames = Frame(*(leaf[rows] for leaf in drawn.frame))
    truth, draw = (in_frame(frames, y[rows]) for y in truth_and_draw)
    scaled = [
        (theta[rows] - drawn.center[rows]) / drawn.scale[rows]
        for theta in (np.asarray(truths), drawn.theta)
    ]
    # Without this limit, one truth far from all draws would dominate the width.
    first, second = (np.clip(z, -MAX_DISTANCE_SD, MAX_DISTANCE_SD).astype(float) for z in scaled)
    return LocalDraws(
        classifier=Pairs(truth, draw, weight),
        parameters=(first, second, weight),
        points=in_frame(frame, standard_samples),
    )


def _draw_moments(
    key: Key, posterior: AbstractPosterior, sims: Simulations, progress: bool
) -> _Moments:
    """Draw for each data set, and reduce the draws to moments, one chunk of data sets at a time.

    Raises:
        SbiFlowsError: A draw is not finite.
    """
    parts, numbers = [], (1 + MOMENT_DRAWS) * posterior.prior.dim
    for chunk_key, rows, count in chunks_of(key, len(sims), numbers, "draw", progress):
        samples = posterior.sample(chunk_key, sims[rows].x, 1 + MOMENT_DRAWS)
        part = _reduce(posterior.prior, posterior.prior.subtract_offset(samples))
        parts.append(jax.tree.map(lambda leaf, m=count: np.asarray(leaf)[:m], part))
    drawn = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    if not np.all(drawn.finite):
        raise SbiFlowsError("the posterior gave draws that are not finite")
    return drawn


@jax.jit
def _reduce(prior: Prior, samples: Array) -> _Moments:
    """Reduce draws (B, 1 + m, D) of B posteriors to the first draw and moments of the others."""
    y, others = _to_standard(prior, samples), samples[:, 1:]
    sd = jnp.maximum(jnp.std(others, axis=1), jnp.finfo(samples.dtype).tiny ** 0.5)
    return _Moments(
        theta=samples[:, 0],
        standard=y[:, 0],
        center=jnp.mean(others, axis=1),
        scale=sd,
        frame=local_frame(y[:, 1:]),
        finite=jnp.all(jnp.isfinite(samples), axis=(1, 2)),
    )


@jax.jit
def _to_standard(prior: Prior, theta: Array | np.ndarray) -> Array:
    """Transform parameters (*, D) to standard coordinates (*, d), clipped to `MAX_COORDINATE`."""
    return jnp.clip(
        prior.unchecked_to_standard(jnp.asarray(theta)), -MAX_COORDINATE, MAX_COORDINATE
    )


def _features(posterior: AbstractPosterior, x: Obs, observed: Obs) -> np.ndarray:
    """Return C features of N data sets and, in the last row, of the observation, (N + 1, C).

    Features are the output of the embedding's network; without a network, the fixed summaries of
    the embedding; without an embedding, the standardised entries of the data.
    """
    joined = jax.tree.map(lambda a, b: np.concatenate([a, np.asarray(b, a.dtype)]), x, observed)
    spaces = posterior.spaces(joined)
    # In a composed posterior, a data set is several observations, each with its own features.
    if spaces and len(spaces[-1]) == len(jax.tree.leaves(joined)[0]):
        return spaces[-1]
    return np.asarray(features_of(fit_standardiser(x), joined))

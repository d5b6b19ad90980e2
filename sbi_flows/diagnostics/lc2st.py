"""Is the posterior right at one observation? A classifier two-sample test that is local to it.

Public names: `check_at`, `LocalCheck`.

Source: Linhart, Gramfort & Rodrigues 2023, "L-C2ST: Local Diagnostics for Posterior Approximations
in Simulation-Based Inference" (arXiv:2306.03580).
"""

from __future__ import annotations

import dataclasses
import textwrap
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SbiFlowsError, SimulationFailed
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.local_classifier import (
    LIMIT,
    MOMENTS,
    Pairs,
    classify,
    in_frame,
    local_frame,
    neighbours,
)
from sbi_flows.diagnostics.local_errors import Errors, Near, errors_of, findings_of, verdict_of
from sbi_flows.diagnostics.verdict import Finding
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.posteriors.base import PosteriorLike, innermost
from sbi_flows.posteriors.direct import Posterior, as_batch
from sbi_flows.posteriors.passes import chunks_of, usable
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations, observation_shape

MIN_SIMULATIONS, MIN_NEAR, MIN_DRAWS, MIN_PERMUTATIONS = 400, 200, 200, 19
NEAR = 0.25
"""Share of the simulations that the classifiers are trained on: those nearest the observation."""

BEYOND = 10.0
"""Most standard deviations of a posterior that a truth counts as away from its mean."""


@dataclasses.dataclass(frozen=True, repr=False)
class LocalCheck:
    """What `check_at` found. Arrays run over the D parameters.

    Attributes:
        verdict: One sentence: consistent with the true posterior at this observation, or not, and
            then in which way.
        p_value: Share of classifiers of permuted labels that tell the posterior from the true one
            as well, the classifier itself among them.
        statistic: Mean of (d - 1/2)^2 over draws of the posterior at the observation, where d is
            the probability of being a true parameter: 0 if they cannot be told, 1/4 if they never
            are confused.
        null: The same of classifiers of permuted labels, shape (P,).
        findings: What is wrong, the surest first; empty where nothing is.
        labels: Names of the parameters.
        shift: How far the posterior lies too high near the observation, in its own standard
            deviations, shape (D,).
        width: How many times too wide it is there, shape (D,); below 1 is too narrow.
        level: Probability of refusing a posterior that is right.
        draws: Draws at the observation, shape (n, D).
        probability: The classifier's probability at each of being a true parameter, shape (n,):
            above 1/2 the posterior has too little mass.
        errors: More of single parameters, of pairs and of the classifiers along each parameter.
        num_simulations: Simulations that succeeded.
        num_near: The nearest of them, which the classifiers were trained on.
        num_failed: Simulations left out because they failed.
    """

    verdict: str
    p_value: float
    statistic: float
    null: np.ndarray
    findings: tuple[Finding, ...]
    labels: tuple[str, ...]
    shift: np.ndarray
    width: np.ndarray
    level: float
    draws: np.ndarray
    probability: np.ndarray
    errors: Errors
    num_simulations: int
    num_near: int
    num_failed: int

    @property
    def consistent(self) -> bool:
        """Whether the test does not reject: the posterior may be right at the observation."""
        return self.p_value > self.level

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """The verdict, how it was come by, and a line a parameter."""
        head = (
            f"local check with the nearest {self.num_near} of {self.num_simulations} simulations: "
            f"statistic {self.statistic:.2g}, {len(self.null)} permutations "
            f"{np.median(self.null):.2g} (median), {np.quantile(self.null, 0.95):.2g} (95%)"
        )
        if self.num_failed:
            head += f"; {self.num_failed} simulations failed and were left out"
        columns = {
            "shift (sd)": (f"{s:+.2f}" for s in self.shift),
            "p": map(p_text, self.errors.p_shift),
            "width": (f"x{w:.2f}" for w in self.width),
            "p ": map(p_text, self.errors.p_width),
        }
        lines = [textwrap.fill(self.verdict, 100), "", head, table(self.labels, columns)]
        return "\n".join([*lines, "p-values of parameters are corrected for their number (max-T)"])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON; the draws are left out."""
        return {
            "verdict": self.verdict,
            "consistent": self.consistent,
            "p_value": self.p_value,
            "level": self.level,
            "statistic": self.statistic,
            "null": self.null.tolist(),
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "shift": dict(zip(self.labels, self.shift.tolist(), strict=True)),
            "width": dict(zip(self.labels, self.width.tolist(), strict=True)),
            "num_simulations": self.num_simulations,
            "num_near": self.num_near,
            "num_failed": self.num_failed,
        }

    def plot(self, most: int = 6) -> Any:
        """Probability of being a true parameter along each of the first parameters; a figure."""
        from sbi_flows.plots.local import probabilities

        some = slice(0, most)
        return probabilities(
            self.labels[some],
            self.draws[:, some],
            self.probability,
            points=self.errors.points[some],
            curve=self.errors.curve[some],
            band=self.errors.band[:, some],
            title=self.verdict,
        )


def check_at(
    key: Key,
    posterior: PosteriorLike,
    x_o: Obs,
    simulator: Simulator | None = None,
    *,
    simulations: int | Simulations = 10_000,
    permutations: int = 100,
    draws: int = 2_000,
    level: float = 0.05,
    progress: bool = True,
) -> LocalCheck:
    """Check a posterior at one observation, where `check` does so on average over data sets.

    A classifier learns to tell the parameters of simulations from one draw of the posterior at each
    of them. Draws at the observation that it can tell are where posterior and truth differ; how
    well classifiers do by chance, permuted labels show. It is trained on the quarter of the
    simulations with the most similar posteriors, the nearer the heavier. So a posterior that is
    right at all of these is refused with a probability of `level`; one that is right at the
    observation and not at others so near may be refused more often. A posterior that is not refused
    may still be wrong in what is finer than so many simulations show.

    Where simulations fail, it is about the others, as for `check`.

    Args:
        key: Random key.
        posterior: The posterior to check; only its `sample` is used.
        x_o: One observation.
        simulator: The simulator that it was trained on, `(key, theta) -> x`; needless where
            `simulations` are given.
        simulations: Number of fresh simulations, at least 400, or simulations from the prior that
            the posterior was not trained on; those that fail are left out and counted.
        permutations: Number of permutations of the labels, at least 19.
        draws: Draws at the observation, at least 200.
        level: Probability of refusing a posterior that is right.
        progress: Show progress bars.

    Returns:
        The report; printing it shows the verdict and a table, `plot` draws it.

    Raises:
        ValueError: x_o is a batch or has another shape than a simulation, a number is out of range,
            parameters are of another width, or there is no simulator.
        SimulationFailed: Fewer than 400 simulations succeeded.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Linhart, Gramfort & Rodrigues 2023, L-C2ST, arXiv:2306.03580: the statistic and the
        permutations. The neighbours, the frame of the posterior and a convex classifier are ours.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500, progress=False)
        >>> flow, quick = sf.MAF(transforms=1), sf.Training(max_epochs=1)
        >>> npe = sf.NPE(prior, flow, training=quick, members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> x_o = jax.numpy.array([0.3, -0.5])
        >>> found = sf.check_at(jax.random.key(2), posterior, x_o, noisy, simulations=1000)
        >>> found.consistent, found.findings
        (True, ())
    """
    _check_settings(simulator, simulations, permutations, draws, level)
    simulate_key, own_key, pair_key, train_key = jax.random.split(key, 4)
    own = posterior.sample(own_key, x_o, draws)
    if own.ndim != 2:
        raise ValueError("x_o: expected one observation, got a batch")
    if not bool(jnp.all(jnp.isfinite(own))):
        raise SbiFlowsError("the posterior gave draws at the observation that are not finite")
    if not isinstance(simulations, Simulations):
        made: Any = simulator
        simulations = simulate(simulate_key, posterior.prior, made, simulations, progress=progress)
    valid = _valid(posterior, simulations)
    observed = as_batch(x_o, observation_shape(valid.x))[0]
    pairs, single, points = _pairs(pair_key, posterior, valid, observed, own, progress)
    found = classify(train_key, pairs, points, permutations)
    p_value = float(1 + np.sum(found.statistic[1:] >= found.statistic[0])) / (1 + permutations)
    near = Near(*single, found.swapped)
    errors = errors_of(near, np.asarray(own, float), found.probability)
    labels = tuple(posterior.prior.labels)
    findings = findings_of(errors, labels, p_value, level)
    return LocalCheck(
        verdict=verdict_of(findings, labels, p_value, level),
        p_value=p_value,
        statistic=float(found.statistic[0]),
        null=found.statistic[1:],
        findings=findings,
        labels=labels,
        shift=errors.shift,
        width=errors.width,
        level=level,
        draws=np.asarray(own),
        probability=found.probability[:, 0],
        errors=errors,
        num_simulations=len(valid),
        num_near=len(pairs.truth),
        num_failed=len(simulations) - len(valid),
    )


def _check_settings(
    simulator: Simulator | None,
    simulations: int | Simulations,
    permutations: int,
    draws: int,
    level: float,
) -> None:
    require_count(MIN_DRAWS, draws=draws)
    require_count(MIN_PERMUTATIONS, permutations=permutations)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    if level * (1 + permutations) < 1:
        raise ValueError(
            f"permutations: expected at least {int(np.ceil(1 / level)) - 1} for a level of "
            f"{level:g}, got {permutations}"
        )
    if isinstance(simulations, Simulations):
        return
    require_count(MIN_SIMULATIONS, simulations=simulations)
    if simulator is None:
        raise ValueError("simulator: expected one, or simulations that it made, got None")


def _valid(posterior: PosteriorLike, simulations: Simulations) -> Simulations:
    """The simulations that succeeded, in memory."""
    if simulations.num_valid < MIN_SIMULATIONS:
        raise SimulationFailed(
            f"{simulations.num_valid} of {len(simulations)} simulations succeeded: too few for a "
            f"local check, which needs {MIN_SIMULATIONS}"
        )
    valid = usable(posterior, simulations, MIN_DRAWS)
    return valid[np.arange(len(valid))] if valid.on_disk else valid


def _pairs(
    key: Key,
    posterior: PosteriorLike,
    sims: Simulations,
    observed: Obs,
    own: Array,
    progress: bool,
) -> tuple[Pairs, Pairs, Array]:
    """Truths and draws at the nearest data sets, and draws (n, D) at the observation, in frames.

    Draws that a frame is made of are not among those that are told from truths: they would lie in
    it better than a truth does.

    Returns:
        The pairs in the frames of the classifiers; in those of single parameters; and the draws.
    """
    prior = posterior.prior
    draw_key, near_key = jax.random.split(key)
    drawn = _drawn(draw_key, posterior, sims, progress)
    at_own = _standard(prior, own)
    frame = jax.tree.map(np.asarray, local_frame(at_own[None]))
    mean, sd = (np.concatenate([drawn.frame[i], frame[i]]) for i in (0, 2))
    # half a factor of e in width is as far as a standard deviation of the prior
    moments = np.concatenate([mean, 2.0 * np.log(sd)], axis=1)
    both = np.asarray(_standard(prior, sims.theta)), drawn.standard
    features = _features(posterior, sims.x, observed)
    near, weight = neighbours(near_key, features, moments, both, NEAR, MIN_NEAR)
    at = tuple(leaf[near] for leaf in drawn.frame)
    # one truth far beyond all draws would be all that a width says
    single = [
        np.clip((theta[near] - drawn.center[near]) / drawn.scale[near], -BEYOND, BEYOND)
        for theta in (np.asarray(sims.theta), drawn.theta)
    ]
    truth, draw = (in_frame(at, y[near]) for y in both)
    return (
        Pairs(truth, draw, weight),
        Pairs(single[0].astype(float), single[1].astype(float), weight),
        in_frame(frame, at_own),
    )


class _Drawn(NamedTuple):
    """A draw at each of N data sets, and moments of others, which are not kept.

    Attributes:
        theta: The draw, shape (N, D).
        standard: The same in standard coordinates, shape (N, d).
        center: Means of the others, shape (N, D).
        scale: Standard deviations, shape (N, D).
        frame: What `local_frame` makes of their standard coordinates.
        finite: Whether all are finite, shape (N,).
    """

    theta: Any
    standard: Any
    center: Any
    scale: Any
    frame: tuple[Any, ...]
    finite: Any


def _drawn(key: Key, posterior: PosteriorLike, sims: Simulations, progress: bool) -> _Drawn:
    parts, numbers = [], (1 + MOMENTS) * posterior.prior.dim
    for own, rows, kept in chunks_of(key, len(sims), numbers, "draw", progress):
        part = _reduced(posterior.prior, posterior.sample(own, sims[rows].x, 1 + MOMENTS))
        parts.append(jax.tree.map(lambda leaf, m=kept: np.asarray(leaf)[:m], part))
    drawn = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    if not np.all(drawn.finite):
        raise SbiFlowsError("the posterior gave draws that are not finite")
    return drawn


@partial(jax.jit, static_argnums=0)
def _reduced(prior: Prior, sampled: Array) -> _Drawn:
    """Draws (B, 1 + m, D) of B posteriors, the first of which is kept."""
    y, others = _standard(prior, sampled), sampled[:, 1:]
    sd = jnp.maximum(jnp.std(others, axis=1), jnp.finfo(sampled.dtype).tiny ** 0.5)
    return _Drawn(
        theta=sampled[:, 0],
        standard=y[:, 0],
        center=jnp.mean(others, axis=1),
        scale=sd,
        frame=local_frame(y[:, 1:]),
        finite=jnp.all(jnp.isfinite(sampled), axis=(1, 2)),
    )


@partial(jax.jit, static_argnums=0)
def _standard(prior: Prior, theta: Any) -> Array:
    """Standard coordinates (*, d) of parameters (*, D), no farther out than `LIMIT`."""
    return jnp.clip(prior.to_standard(theta), -LIMIT, LIMIT)


def _features(posterior: PosteriorLike, x: Obs, observed: Obs) -> np.ndarray:
    """What an embedding makes of the N data sets and, last, of the observation, else entries."""
    joined = jax.tree.map(lambda a, b: np.concatenate([a, np.asarray(b, a.dtype)]), x, observed)
    posterior = innermost(posterior)
    if not isinstance(posterior, Posterior):
        return np.asarray(fit_standardiser(x)(joined))
    return posterior.spaces(joined)[-1]

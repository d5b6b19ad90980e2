"""Local check of a posterior at one observation: a local classifier two-sample test.

Public name: `check_at`.

References:
    Linhart, Gramfort & Rodrigues 2023, L-C2ST: Local Diagnostics for Posterior Approximations in
    Simulation-Based Inference, arXiv:2306.03580.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SbiFlowsError, SimulationFailed
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.local_classifier import classify
from sbi_flows.diagnostics.local_draws import local_pairs
from sbi_flows.diagnostics.local_errors import LocalPairs, errors_of, findings_of, verdict_of
from sbi_flows.diagnostics.local_report import LocalCheck
from sbi_flows.observations.batches import as_batch
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior, single_shape
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.fresh import fresh_simulations
from sbi_flows.posteriors.passes import usable
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.simulations import Simulations, observation_shape

MIN_SIMULATIONS, MIN_PERMUTATIONS = 400, 19
NUM_DRAWS = 2_000
"""Number of posterior draws at the observation."""

SIMULATE_TAG = 2024
"""Number folded into the key of the simulations.

They then differ from simulations that the user makes with a key split from the same key.
"""


def check_at(
    key: Key,
    posterior: PosteriorLike,
    x_o: Obs,
    simulator: Simulator | None = None,
    *,
    simulations: int | Simulations = 10_000,
    permutations: int = 100,
    level: float = 0.05,
    progress: bool = True,
) -> LocalCheck:
    """Check a posterior at one observation. `check` tests the average over data sets.

    A classifier is trained to separate true parameters from posterior draws, one pair for each
    simulation. The trained classifier is applied to posterior draws at the observation. Where it
    gives a probability other than 1/2, the posterior differs from the true posterior. Classifiers
    trained on permuted labels give the null distribution of the test statistic. The training set is
    the quarter of the simulations whose posteriors are most similar to the posterior at the
    observation, weighted by similarity.

    A posterior that is correct for all simulations of the training set is rejected with a
    probability of `level`. A posterior that is correct at the observation, but wrong for some of
    these simulations, may be rejected more often. A posterior that is not rejected may still have
    errors that are too small to be detected with this number of simulations. If some simulations
    fail, the check holds for those that succeed, as in `check`.

    Args:
        key: Random key.
        posterior: The posterior to check; only its method `sample` is used.
        x_o: One observation.
        simulator: The simulator that the posterior was trained on, `(key, theta) -> x`; not needed
            if `simulations` is a set of simulations.
        simulations: Number of fresh simulations, at least 400; or simulations from the prior that
            the posterior was not trained on. Failed simulations are left out and counted.
        permutations: Number of permutations of the labels, at least 19.
        level: Probability of rejecting a correct posterior.
        progress: Show progress bars.

    Returns:
        The report. Printing it shows the verdict and a table; its method `plot` makes a figure.

    Raises:
        ValueError: x_o is a batch or has another shape than a simulation, a setting is out of
            range, the number of parameters of the simulations differs from the posterior's, or
            `simulations` is a number and no simulator is given.
        SimulationFailed: Fewer than 400 simulations succeeded.
        SbiFlowsError: The posterior returned draws that are not finite.

    References:
        Linhart, Gramfort & Rodrigues 2023, L-C2ST, arXiv:2306.03580 (the statistic and the
        permutations). The restriction to neighbours, the coordinates relative to the posterior and
        the convex classifier are specific to this library.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500, progress=False)
        >>> flow, quick = sf.MAF(transforms=1), sf.Training(max_epochs=1)
        >>> npe = sf.NPE(prior, flow, training=quick, members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> x_o = jax.numpy.array([0.3, -0.5])
        >>> report = sf.check_at(jax.random.key(2), posterior, x_o, noisy, simulations=1000)
        >>> report.consistent, report.findings
        (True, ())
    """
    _check_settings(simulator, simulations, permutations, level)
    posterior = as_posterior(posterior, single_shape(x_o))
    _, sample_key, pair_key, train_key = jax.random.split(key, 4)
    samples = posterior.sample(sample_key, x_o, NUM_DRAWS)
    if samples.ndim != 2:
        raise ValueError("x_o: expected one observation, got a batch")
    if not bool(jnp.all(jnp.isfinite(samples))):
        raise SbiFlowsError("the posterior gave draws at the observation that are not finite")
    what = "simulations"
    if not isinstance(simulations, Simulations):
        assert simulator is not None  # `_check_settings` raises otherwise
        simulate_key, what = jax.random.fold_in(key, SIMULATE_TAG), "key"
        simulations = fresh_simulations(
            simulate_key, posterior, simulator, simulations, progress=progress
        )
    valid = _valid(posterior, simulations)
    warn_of_reuse(posterior, valid, what)
    columns = reorder_columns("x", x_o, posterior.columns)
    observed = as_batch(columns, observation_shape(valid.x), posterior.missing)[0]
    local = local_pairs(pair_key, posterior, valid, observed, samples, progress=progress)
    output = classify(train_key, local.classifier, local.points, permutations)
    p_value = float(1 + np.sum(output.statistic[1:] >= output.statistic[0])) / (1 + permutations)
    pairs = LocalPairs(*local.parameters, output.is_swapped)
    errors = errors_of(pairs, np.asarray(samples, float), output.probability)
    labels = tuple(posterior.prior.labels)
    findings = findings_of(errors, labels, p_value, level)
    return LocalCheck(
        verdict=verdict_of(findings, errors, labels, p_value, level),
        p_value=p_value,
        statistic=float(output.statistic[0]),
        null=output.statistic[1:],
        findings=findings,
        labels=labels,
        shift=errors.shift,
        width=errors.width,
        level=level,
        draws=np.asarray(samples),
        probability=output.probability[:, 0],
        errors=errors,
        num_simulations=len(valid),
        num_near=len(local.classifier.truth),
        num_failed=len(simulations) - len(valid),
    )


def _check_settings(
    simulator: Simulator | None,
    simulations: int | Simulations,
    permutations: int,
    level: float,
) -> None:
    """Raise ValueError if a setting is out of range, or if the simulator is missing."""
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
        raise ValueError("simulator: expected a simulator, or its simulations, got None")


def _valid(posterior: AbstractPosterior, simulations: Simulations) -> Simulations:
    """Return the simulations that succeeded, loaded into memory.

    Raises:
        SimulationFailed: Fewer than `MIN_SIMULATIONS` succeeded.
    """
    if simulations.num_valid < MIN_SIMULATIONS:
        raise SimulationFailed(
            f"{simulations.num_valid} of {len(simulations)} simulations succeeded: too few for a "
            f"local check, which needs {MIN_SIMULATIONS}"
        )
    valid = usable(posterior, simulations, NUM_DRAWS)
    return valid[np.arange(len(valid))] if valid.on_disk else valid

"""Check of a posterior: calibration, use of the data, and a verdict.

Public name: `check`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.diagnostics.coverage import coverage_of
from sbi_flows.diagnostics.directions import joint_width
from sbi_flows.diagnostics.held_out import ranks_of_members
from sbi_flows.diagnostics.information import Information, information_of
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.references import crude_references
from sbi_flows.diagnostics.report import Report
from sbi_flows.diagnostics.sbc import sbc_of
from sbi_flows.diagnostics.sharpness import sharpness_of
from sbi_flows.diagnostics.tarp import tarp_of
from sbi_flows.diagnostics.uniformity import detectable_width
from sbi_flows.diagnostics.verdict import (
    MAX_DETECTABLE_WIDTH,
    UNDER,
    findings_of,
    tests_of,
    verdict_of,
)
from sbi_flows.estimators.base import FitHistory
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.composed import ComposedPosterior
from sbi_flows.posteriors.fresh import fresh_simulations
from sbi_flows.posteriors.passes import MIN_DATASETS, MIN_DRAWS
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.simulations import Simulations, observation_shape

INFORMATION_TAG, MEMBERS_TAG, ROWS_TAG = 5, 6, 7
"""Numbers folded into the user's key: for the test of information, members, and random rows."""


def check(
    key: Key,
    posterior: PosteriorLike,
    simulator: Simulator | None = None,
    *,
    simulations: Simulations | None = None,
    history: FitHistory | None = None,
    datasets: int = 1_000,
    draws: int = 1_000,
    level: float = 0.05,
    progress: bool = True,
) -> Report:
    """Check whether a posterior is calibrated, and whether it uses the data.

    Calibration: SBC, TARP and highest-density coverage use the same posterior draws. Each parameter
    is tested for a shift, for a wrong width and for ranks that are not uniform. The joint posterior
    is tested by coverage and by TARP. Holm's correction over all tests limits the probability of
    rejecting a correct posterior to `level`. With few data sets, the verdict is "cannot tell",
    and gives the smallest error that would have been found.

    Information: a posterior that ignores the data can be calibrated. Regressions that are
    independent of the posterior's network test at the same level whether the data, or summaries of
    them, predict where the truth lies within the posterior (see `Information`).

    Both results are averages over data sets simulated from the prior. Use `check_at` to check
    the posterior at one observation. Use `predictive_check` and `misspecification` to test whether
    the simulator describes the real data. If some simulations fail, the verdict holds for
    parameters from the prior conditional on success; the posterior was trained on parameters from
    the same distribution.

    The data sets come from one of three sources:

    - `simulator`: `datasets` fresh simulations.
    - `simulations`: simulations from the prior that the posterior was not trained on.
    - `simulations` and `history`: the simulations of the fit and the history that the fit returned.
      Each member of the ensemble is tested on the rows that it held out. This needs no further
      simulation. The result is about single members, which are less accurate than their mixture.
      It is optimistic, because each member stopped at the epoch that was best for these rows.

    Args:
        key: Random key.
        posterior: The posterior to check.
        simulator: The simulator that the posterior was trained on, `(key, theta) -> x`.
        simulations: Simulations that take the place of the simulator, at least 50 valid rows.
        history: History of the fit, if `simulations` are those of the fit.
        datasets: Number of fresh simulations, at least 50; failed simulations are left out and
            counted. With `simulations`, the maximum number of rows, which are chosen at random.
        draws: Independent draws from each posterior, at least 20.
        level: Probability of rejecting a correct posterior, for each of the two parts.
        progress: Show progress bars.

    Returns:
        The report; printing it shows the verdict and a table. Its method `explain` explains the
        terms.

    Raises:
        ValueError: There is neither a simulator nor simulations, or both; there are too few data
            sets or draws, the level is outside (0, 1), JAX cannot trace the simulator, or the
            sizes of the history do not match the posterior and the simulations.
        SimulationFailed: Fewer than 50 simulations are valid.
        SbiFlowsError: The posterior returned NaN, or draws that are not finite.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> sims = sf.simulate(keys[0], prior, noisy, 500, progress=False)
        >>> flow, quick = sf.MAF(transforms=1), sf.Training(max_epochs=1)
        >>> npe = sf.NPE(prior, flow, training=quick, members=1)
        >>> posterior, _ = npe.fit(keys[1], sims, progress=False)
        >>> report = sf.check(keys[2], posterior, noisy, datasets=400, draws=100)
        >>> report.calibrated, report.uses_data
        (True, True)
    """
    _check_settings(simulator, simulations, history)
    _check_sizes(datasets, draws, level)
    sims = simulations
    if sims is None:
        assert simulator is not None  # `_check_settings` raises otherwise
        simulate_key = jax.random.split(key, 3)[0]
        sims = fresh_simulations(simulate_key, posterior, simulator, datasets, progress=progress)
    sims = sims.aligned(posterior.prior)
    posterior = as_posterior(posterior, observation_shape(sims.x))
    if history is None:
        if sims.on_disk or len(sims) > datasets:
            sims = _random_rows(jax.random.fold_in(key, ROWS_TAG), sims, datasets)
        warn_of_reuse(posterior, sims, "key" if simulations is None else "simulations")
    options = {"datasets": datasets, "draws": draws, "progress": progress}
    ranks, used = _ranks(key, posterior, sims, history, **options)
    record = posterior.origin.record
    if isinstance(posterior, ComposedPosterior):
        # its density is not normalised, and the record is about another kind of observation
        ranks, record = dataclasses.replace(ranks, log_prob=None), {}
    information = information_of(
        jax.random.fold_in(key, INFORMATION_TAG),
        ranks,
        used.x,
        np.asarray(posterior.prior.log_prob(used.theta)),
        record=record,
        level=level,
    )
    sizes = f"datasets={datasets}, draws={draws}, level={float(level)!r}"
    command = _command(key, f"{_source_code(simulations, history)}, {sizes}")
    lacks = posterior.missing.can_miss is not None
    subject = _subject_text(sims, history) + "; on average over missing entries" * lacks
    return _report(ranks, information, level, subject, command)


def _ranks(
    key: Key,
    posterior: AbstractPosterior,
    sims: Simulations,
    history: FitHistory | None,
    *,
    datasets: int,
    draws: int,
    progress: bool,
) -> tuple[Ranks, Simulations]:
    """Rank the truths, and return the simulations that were used.

    Raises:
        SimulationFailed: Fewer than 50 simulations are valid.
    """
    valid = sims.only_valid()
    if len(valid) < MIN_DATASETS:
        kind = SimulationFailed if len(sims) >= MIN_DATASETS else ValueError
        raise kind(
            f"simulations: expected at least {MIN_DATASETS} valid rows, got {len(valid)} "
            f"({len(sims) - len(valid)} of {len(sims)} failed): too few left for a check"
        )
    sizes = {"draws": draws, "progress": progress}
    if history is not None:
        rank_key = jax.random.fold_in(key, MEMBERS_TAG)
        ranks, used = ranks_of_members(
            rank_key, posterior, valid, history, datasets=datasets, **sizes
        )
        return dataclasses.replace(ranks, num_failed=len(sims) - len(valid)), used
    _, reference_key, draw_key = jax.random.split(key, 3)
    references = crude_references(reference_key, valid)
    ranks = draw_pass(draw_key, posterior, sims, references=references, halves=True, **sizes)
    return ranks, valid


def _random_rows(key: Key, sims: Simulations, count: int) -> Simulations:
    """Return random rows in their order, loaded into memory."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    return sims[np.sort(rng.permutation(len(sims))[:count])]


def _report(
    ranks: Ranks, information: Information, level: float, subject: str, command: str
) -> Report:
    """Run all tests on the ranks. `subject` is a clause that is appended to the verdict."""
    sbc, tarp, coverage = sbc_of(ranks), tarp_of(ranks), coverage_of(ranks)
    tests = tests_of(sbc, tarp, coverage)
    findings = findings_of(tests, sbc, tarp, coverage, level, joint_width(ranks))
    least_width = detectable_width(len(ranks.theta), level / len(tests))
    is_known = bool(findings) or least_width <= MAX_DETECTABLE_WIDTH
    only_under_confident = all(f.kind == UNDER for f in findings)
    is_covered = coverage.ks_over_confident > level
    calibration = verdict_of(findings, tests, ranks.labels, level, least_width) + subject
    return Report(
        verdict=f"{calibration}\n{information.verdict}",
        calibrated=is_known and not findings,
        conservative=is_known and (not findings or (only_under_confident and is_covered)),
        findings=findings,
        tests=tests,
        sbc=sbc,
        tarp=tarp,
        coverage=coverage,
        sharpness=sharpness_of(ranks),
        information=information,
        least_width=least_width,
        level=level,
        num_datasets=len(ranks.theta),
        num_failed=ranks.num_failed,
        draws=ranks.draws,
        command=command,
    )


def _source_code(simulations: Simulations | None, history: FitHistory | None) -> str:
    """Return the arguments of `check` that say where the data sets come from."""
    if simulations is None:
        return "simulator"
    return "simulations=simulations" + ", history=history" * (history is not None)


def _command(key: Key, arguments: str) -> str:
    """Return Python code that repeats the check with the same key and precision."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(key)).tolist()
        key_code = f"jax.random.wrap_key_data(\n    jnp.array({words}, dtype=jnp.uint32), "
        key_code += f"impl={str(jax.random.key_impl(key))!r}\n)"
    else:
        key_code = f"jnp.array({np.asarray(key).tolist()}, dtype=jnp.uint32)"
    x64 = 'jax.config.update("jax_enable_x64", True)\n' * bool(jax.config.read("jax_enable_x64"))
    return (
        f"import jax\nimport jax.numpy as jnp\nimport sbi_flows as sf\n\n{x64}key = {key_code}\n"
        f"report = sf.check(\n    key, posterior, {arguments}\n)\n"
    )


def _subject_text(sims: Simulations, history: FitHistory | None) -> str:
    """Return a clause that says what the verdict is about; empty if no simulation failed."""
    members = "; about members, each on rows that it held out" * (history is not None)
    if sims.num_valid == len(sims):
        return members
    return f"{members}; about the {sims.num_valid} of {len(sims)} simulations that did not fail"


def _check_settings(
    simulator: Simulator | None, simulations: Simulations | None, history: FitHistory | None
) -> None:
    """Raise ValueError unless there is exactly one source of data sets."""
    if (simulator is None) == (simulations is None):
        given = "neither" if simulator is None else "both"
        raise ValueError(f"expected a simulator or simulations, got {given}")
    if simulations is not None and not isinstance(simulations, Simulations):
        raise ValueError(
            f"simulations: expected sf.Simulations, got {type(simulations).__name__}; to set the "
            "number of fresh simulations, use datasets"
        )
    if isinstance(simulator, Simulations):
        raise ValueError("simulator: expected a function, got sf.Simulations; use simulations=")
    if history is not None and simulations is None:
        raise ValueError(
            "history: expected simulations=, the simulations of the fit, as well, got none"
        )


def _check_sizes(datasets: int, draws: int, level: float) -> None:
    """Raise ValueError if a size or the level of a check is out of range."""
    require_count(MIN_DATASETS, datasets=datasets)
    require_count(MIN_DRAWS, draws=draws)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")

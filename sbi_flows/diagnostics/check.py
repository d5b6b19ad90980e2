"""Calibration check of a posterior: SBC, TARP and coverage on fresh simulations, and a verdict.

Public name: `check`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.diagnostics.coverage import coverage_of
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.references import crude_posterior, prior_scale
from sbi_flows.diagnostics.report import Report
from sbi_flows.diagnostics.sbc import sbc_of
from sbi_flows.diagnostics.sharpness import sharpness_of
from sbi_flows.diagnostics.tarp import tarp_of
from sbi_flows.diagnostics.verdict import UNDER, findings_of, tests_of, verdict_of
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.passes import MIN_DATASETS, MIN_DRAWS
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations


def check(
    key: Key,
    posterior: PosteriorLike,
    simulator: Simulator,
    *,
    datasets: int = 1_000,
    draws: int = 1_000,
    level: float = 0.05,
    progress: bool = True,
) -> Report:
    """Check the calibration of a posterior on fresh simulations from its prior.

    SBC, TARP and highest-density coverage use the same posterior draws. Each parameter is tested
    for a shift, for a wrong width and for ranks that are not uniform. The joint posterior is tested
    by coverage and by TARP. Holm's correction over all tests limits the probability of rejecting a
    correct posterior to `level`.

    The verdict holds on average over data sets simulated from the prior. Use `check_at` to check
    the posterior at one observation. Use `predictive_check` and `misspecification` to test whether
    the simulator describes the real data. If some simulations fail, the verdict holds for
    parameters from the prior conditional on success; the posterior was trained on parameters from
    the same distribution.

    Args:
        key: Random key.
        posterior: The posterior to check.
        simulator: The simulator that the posterior was trained on, `(key, theta) -> x`.
        datasets: Number of fresh simulations, at least 50; failed simulations are left out and
            counted.
        draws: Independent draws from each posterior, at least 20.
        level: Probability of rejecting a correct posterior.
        progress: Show progress bars.

    Returns:
        The report; printing it shows the verdict and a table.

    Raises:
        ValueError: There are too few data sets or draws, the level is outside (0, 1), or JAX
            cannot trace the simulator.
        SimulationFailed: Fewer than 50 simulations succeeded.
        SbiFlowsError: The posterior returned NaN, or draws that are not finite.
    """
    _check_sizes(datasets, draws, level)
    simulate_key, reference_key, draw_key = jax.random.split(key, 3)
    sims = simulate(simulate_key, posterior.prior, simulator, datasets, progress=progress)
    valid = sims.only_valid()
    if len(valid) < MIN_DATASETS:
        raise SimulationFailed(
            f"{len(sims) - len(valid)} of {len(sims)} simulations failed: too few left for a "
            f"check, which needs {MIN_DATASETS}"
        )
    ranks = draw_pass(
        draw_key,
        posterior,
        sims,
        draws=draws,
        references=crude_posterior(reference_key, valid),
        scale=prior_scale(valid.theta),
        progress=progress,
    )
    return _report(ranks, level, _subject_text(sims), _command(key, datasets, draws, level))


def _report(ranks: Ranks, level: float, subject: str, command: str) -> Report:
    """Run all tests on the ranks. `subject` is a clause that is appended to the verdict."""
    sbc, tarp, coverage = sbc_of(ranks), tarp_of(ranks), coverage_of(ranks)
    tests = tests_of(sbc, tarp, coverage)
    findings = findings_of(tests, sbc, tarp, coverage, level)
    only_under_confident = all(f.kind == UNDER for f in findings)
    is_covered = coverage.ks_over_confident > level
    return Report(
        verdict=verdict_of(findings, tests, ranks.labels, level) + subject,
        calibrated=not findings,
        conservative=not findings or (only_under_confident and is_covered),
        findings=findings,
        tests=tests,
        sbc=sbc,
        tarp=tarp,
        coverage=coverage,
        sharpness=sharpness_of(ranks),
        level=level,
        num_datasets=len(ranks.theta),
        num_failed=ranks.num_failed,
        draws=ranks.draws,
        command=command,
    )


def _command(key: Key, datasets: int, draws: int, level: float) -> str:
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
        "report = sf.check(\n    key, posterior, simulator, "
        f"datasets={datasets}, draws={draws}, level={level!r}\n)\n"
    )


def _subject_text(sims: Simulations) -> str:
    """Return a clause with the number of valid simulations; empty if all succeeded."""
    if sims.num_valid == len(sims):
        return ""
    return f"; about the {sims.num_valid} of {len(sims)} simulations that did not fail"


def _check_sizes(datasets: int, draws: int, level: float) -> None:
    """Raise ValueError if a size or the level of a check is out of range."""
    require_count(MIN_DATASETS, datasets=datasets)
    require_count(MIN_DRAWS, draws=draws)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")

"""Warning about simulations that a posterior was fitted to, or corrected with, before.

Public name: `warn_of_reuse`.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.warn import warn_user
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations

_RANDOM_BITS = 20
"""Number of random bits of a parameter in single precision, with a margin.

With one parameter and counts for x, different simulations may be equal by chance.
"""


def warn_of_reuse(posterior: PosteriorLike, simulations: Simulations, what: str) -> None:
    """Warn if a posterior was fitted to, or corrected with, some of these simulations.

    Posteriors that do not know their simulations, such as those of other libraries, cause no
    warning.

    Args:
        posterior: The posterior.
        simulations: The simulations on which the posterior is checked or corrected.
        what: Name of the argument that the user has to change: "simulations", or "key" if the
            simulations were made with a random key of the user.
    """
    if not isinstance(posterior, AbstractPosterior) or posterior.used_rows is None:
        return
    rows = posterior.used_rows
    found = rows.among(simulations, posterior.prior)
    if not np.any(found):
        return
    count = rows.count_among(found, simulations)
    chance = _expected_by_chance(posterior, rows, simulations, found)
    if count <= chance + 4.0 * math.sqrt(chance):
        return
    use = "train" if posterior.origin is posterior else "train or correct"
    about = "about " * (rows.fraction < 1.0)
    warn_user(
        f"{what}: {about}{count:,} of {simulations.num_valid:,} rows were used to {use} the "
        "posterior; a check or a correction with them is too optimistic. Simulate with another "
        "random key",
        SbiFlowsWarning,
    )


def _expected_by_chance(
    posterior: AbstractPosterior, rows: UsedRows, simulations: Simulations, found: np.ndarray
) -> float:
    """Return the expected number of new simulations that equal a used row by chance.

    It is negligible unless there are few parameters and x consists of integers.
    """
    places = np.flatnonzero(found)[:100]
    x = [np.asarray(leaf[places], float) for leaf in jax.tree.leaves(simulations.x)]
    is_continuous = any(np.any(leaf != np.floor(leaf)) for leaf in x)
    bits = _RANDOM_BITS * (posterior.prior.standard_dim + is_continuous)
    return len(simulations) * rows.count * 2.0**-bits

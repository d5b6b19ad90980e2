"""Posteriors over random priors and units of the data are right (a part of `random_units.py`)."""

import pytest

from tests.random_units import PRIORS, try_one


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("seed", range(1_000, 1_000 + 2 * len(PRIORS)))
def test_a_random_problem_is_solved(seed):
    outcome = try_one(seed)
    assert outcome.kind == "right", outcome.text

"""What is computed for a fixed key does not change with the code."""

import json

import numpy as np
import pytest

from tests.cases import DENSITIES
from tests.golden.draws import PATH, X, cases, density_posterior

RECORD = json.loads(PATH.read_text())

AT_A_FACE = {("density MAF", "map")}
"""A mode one rounding step from a face of the prior, where log densities of neighbouring numbers
differ by tens: rounding, of a division by a constant say, decides on the path that leads there."""


def test_every_recorded_case_is_compared():
    assert {name for name, _ in cases()} == RECORD.keys()


QUICK = {"density NSF"}


def _case(name, compute):
    is_slow = name not in QUICK and name.startswith(("density", "composed"))
    return pytest.param(name, compute, id=name, marks=[pytest.mark.slow] * is_slow)


@pytest.mark.promotes
@pytest.mark.parametrize(("name", "compute"), [_case(n, c) for n, c in cases()])
def test_draws_are_those_of_the_record(name, compute):
    for part, value in compute().items():
        expected = np.asarray(RECORD[name][part])
        if (name, part) in AT_A_FACE:
            posterior = density_posterior(DENSITIES[name.removeprefix("density ")])
            modes = posterior.log_prob(np.stack([value, expected]).astype(np.float32), X[0])
            assert modes[0] >= modes[1] - 1e-3
            np.testing.assert_allclose(value, expected, atol=0.1, err_msg=part)
        else:
            np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-5, err_msg=part)

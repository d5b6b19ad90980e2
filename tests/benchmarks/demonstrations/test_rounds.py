"""Truncated rounds, compared with exact posteriors."""

import jax
import numpy as np
import pytest

from benchmarks.demonstrations.rounds import Case, markdown, rounds_at, run
from benchmarks.suite.records import BadInput
from simulators import get


def test_a_task_without_a_case_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--tasks: expected names out of sir, lynx_hare; got slcp"):
        run(tmp_path, ("sir", "slcp"))


def test_a_row_of_the_table_has_the_largest_difference():
    row = {
        "observation": 2,
        "simulations": 10_000,
        "masses": [1.0, 0.125],
        "c2st": 0.5312,
        "shifts": [0.1, -0.25],
        "ratios": [0.9, 1.125],
        "seconds": 59.7,
    }
    expected = "| `sir` | 2 | 10,000 | 0.12 | 0.531 | -0.25 | 0.90 to 1.12 | 60 |"
    assert markdown({"sir": [row]})[2] == expected


@pytest.mark.release
def test_rounds_are_compared_with_the_exact_posterior():
    task = get("gaussian_linear")
    found = rounds_at(
        jax.random.key(0),
        task,
        Case(300, 2, lambda x: {"counts": x}),
        task.observation(1),
        task.reference(1, 2_000),
    )
    assert found["simulations"] == sum(300 for _ in found["masses"])
    assert found["masses"][0] == 1.0
    assert found["c2st"] < 0.8
    assert np.max(np.abs(found["shifts"])) < 1.0
    assert np.ptp(np.log(found["ratios"])) < 1.0

"""Time to the same held-out loss by rows a step."""

import pytest

from benchmarks.speed.batches import markdown, time_to_loss


@pytest.mark.slow
def test_each_number_of_rows_has_a_time_or_says_that_it_did_not_reach():
    found = time_to_loss("gaussian_linear", (16, 450), budget=500, repeats=1)
    assert found["default"] == 16
    rates = {fit["batch"]: fit["rate"] for fit in found["fits"]}
    assert rates[450] / rates[16] == pytest.approx((450 / 16) ** 0.5)
    lines = markdown({"gaussian_linear": found})
    assert lines[2].startswith("| gaussian_linear | 16 (default) |")
    for fit, line in zip(found["fits"], lines[2:], strict=True):
        reached = fit["loss"] <= found["target"]
        assert reached == (fit["seconds"] is not None)
        assert reached != ("not reached" in line)
        assert not reached or fit["seconds"] <= fit["whole_seconds"]
    # the default's own best loss is below the target
    assert found["fits"][0]["seconds"] is not None

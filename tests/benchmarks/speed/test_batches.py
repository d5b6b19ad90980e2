"""Time to the same validation loss by batch size."""

import pytest

from benchmarks.speed.batches import markdown, time_to_loss


@pytest.mark.release
def test_each_batch_size_has_a_time_or_did_not_reach_the_target():
    result = time_to_loss("gaussian_linear", (16, 450), budget=500, repeats=1)
    assert result["default"] == 16
    rates = {fit["batch"]: fit["rate"] for fit in result["fits"]}
    assert rates[450] / rates[16] == pytest.approx((450 / 16) ** 0.5)
    lines = markdown({"gaussian_linear": result})
    assert lines[2].startswith("| gaussian_linear | 16 (default) |")
    for fit, line in zip(result["fits"], lines[2:], strict=True):
        is_reached = fit["loss"] <= result["target"]
        assert is_reached == (fit["seconds"] is not None)
        assert is_reached != ("not reached" in line)
        assert not is_reached or fit["seconds"] <= fit["whole_seconds"]
    # the default's own best loss is below the target
    assert result["fits"][0]["seconds"] is not None

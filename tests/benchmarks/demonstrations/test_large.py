"""`python -m benchmarks large` on small data."""

import json

import numpy as np
import pytest

import sbi_flows as sf
from benchmarks.demonstrations import large


@pytest.mark.slow
def test_memory_and_losses_are_recorded(tmp_path):
    case = large.Case((16, 16), 500, 1, sf.ConvNet(width=4, features=4))
    large.run(tmp_path, {"small": case})
    found = json.loads((tmp_path / "large.json").read_text())["cases"]["small"]
    assert found["rows"] == 500 and found["epochs"] == 1
    assert 0.1 < found["peak_memory_gib"] < 100 and np.isfinite(found["held_out_loss"])


def test_fields_have_the_spectrum_of_their_parameters():
    theta = np.tile([[0.3, 2.0]], (2_000, 1))
    x = large._fields(np.random.default_rng(0), theta, (64,)).astype(float)
    power = np.mean(np.abs(np.fft.rfft(x)) ** 2, axis=0) / 64
    k = np.arange(1, 33)
    np.testing.assert_allclose(power[1:], np.exp(0.6) * k**-2.0 + 0.01, rtol=0.15)

"""Settings of a fit that are refused, and what the others mean."""

import jax
import jax.numpy as jnp
import pytest

import sbi_flows as sf
from sbi_flows import training
from sbi_flows.training import FitKeys, TrainingData
from tests.cases import unchecked
from tests.training.test_training import DIM, blueprint


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("batch_size", 0, "batch_size: expected a whole number of at least 1, got 0"),
        ("batch_size", 64.0, "batch_size: expected a whole number of at least 1, got 64.0"),
        ("max_epochs", -1, "max_epochs: expected a whole number of at least 1, got -1"),
        ("patience", 0, "patience: expected a positive number, got 0"),
        ("patience", "a", "patience: expected a positive number, got 'a'"),
        ("learning_rate", "1e-3", "learning_rate: expected a positive number, got '1e-3'"),
        ("learning_rate", 0.0, "learning_rate: expected a positive number, got 0.0"),
        ("learning_rate", float("nan"), "learning_rate: expected a positive number, got nan"),
        ("learning_rate", float("inf"), "learning_rate: expected a positive number, got inf"),
        ("clip_norm", -1.0, "clip_norm: expected a positive number, got -1.0"),
        ("weight_decay", -1.0, "weight_decay: expected"),
        ("weight_decay", float("nan"), "weight_decay: expected zero or a positive number, got nan"),
        ("validation_fraction", 0.0, r"validation_fraction: expected a number in \(0, 1\), got 0"),
        ("validation_fraction", 1.0, r"validation_fraction: expected a number in \(0, 1\), got 1"),
        ("ema_decay", 1.0, r"ema_decay: expected None or \[0, 1\), got 1.0"),
        ("learning_rate", (), "learning_rate: expected one or more numbers, got none"),
        ("learning_rate", (1e-3, 0.0), "learning_rate: expected a positive number, got 0.0"),
        ("devices", 0, "devices: expected a whole number of at least 1, got 0"),
        ("matmul_precision", "half", "matmul_precision: expected what .* takes, .*got 'half'"),
        ("ema_decay", -0.1, r"ema_decay: expected None or \[0, 1\), got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        unchecked(sf.Training, **{setting: value})


def test_what_is_no_optimiser_is_refused():
    with pytest.raises(ValueError, match="optimizer: expected an optax optimiser, got str"):
        unchecked(sf.Training, optimizer="adam")


@pytest.mark.parametrize(("rows", "fraction"), [(9, 0.1), (12, 0.95)])
def test_too_few_rows_are_refused(rows, fraction):
    data = TrainingData.of_rows(jnp.zeros((rows, DIM)), jnp.zeros((rows, DIM)))
    settings = sf.Training(validation_fraction=fraction)
    with pytest.raises(ValueError, match=f"at least 10 valid rows, .*got {rows}"):
        training.fit(FitKeys.of(jax.random.key(0)), blueprint(), settings, data)

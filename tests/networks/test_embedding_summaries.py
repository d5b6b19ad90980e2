"""Fixed summaries of embeddings: exact values of simple cases, spectra, number of summaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbi_flows.densities import MAF
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.densities.sizes import Sizes
from sbi_flows.networks.embeddings import DeepSet, Fusion
from sbi_flows.networks.embeddings.base import own_scale
from sbi_flows.networks.embeddings.summaries import LINEAR, LOGARITHMIC
from sbi_flows.simulations.simulations import observation_shape
from tests.embedding_cases import (
    BATCH,
    CASES,
    CONV,
    DEEP_SET,
    FUSION,
    SERIES,
    filled,
    like_of,
    masks,
    observations,
    summaries,
)

POWERS = (
    "mean square",
    "mean cube",
    "mean product",
)


def named(settings, x, mask=None):
    """Return summaries by name, without the final arcsinh."""
    labels = settings.summary_labels(observation_shape(x))
    scale = np.where([label.startswith(POWERS) for label in labels], LOGARITHMIC, LINEAR)
    values = scale * np.sinh(np.asarray(jax.jit(settings.summarise)(x, mask)) / scale)
    return dict(zip(labels, values.T, strict=True))


def test_summaries_of_a_set_are_moments_and_quantiles_of_present_entries():
    x = observations((11, 2))
    mask = masks(x)
    values = named(DEEP_SET, filled(x, mask), mask)
    for row in range(BATCH):
        for column in range(2):
            entries = np.asarray(x[row, :, column])[np.asarray(mask[row, :, column])]
            got = {name: values[name][row] for name in values}
            wanted = {
                f"mean[{column}]": entries.mean(),
                f"mean square[{column}]": np.mean(entries**2),
                f"mean cube[{column}]": np.mean(entries**3),
                f"log variance[{column}]": np.log(np.var(entries) + 1e-6) / 2.0,
                f"quantile 0.25[{column}]": np.quantile(entries, 0.25),
                f"quantile 0.95[{column}]": np.quantile(entries, 0.95),
                f"minimum[{column}]": entries.min(),
                f"maximum[{column}]": entries.max(),
            }
            for name, value in wanted.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        both = np.asarray(mask[row].all(axis=-1))
        product = np.mean(np.prod(np.asarray(x[row]), axis=-1)[both])
        np.testing.assert_allclose(values["mean product[0, 1]"][row], product, rtol=1e-4)
        count = np.asarray(mask[row].any(axis=-1)).sum()
        np.testing.assert_allclose(values["n"][row], (np.log1p(count) - 4) / 2, rtol=1e-4)


def test_summaries_of_a_large_set_show_the_shape_of_its_distribution():
    x = observations((600,)) ** 3
    mask = masks(x)
    values = named(DEEP_SET, filled(x, mask), mask)
    for row in range(BATCH):
        entries = np.asarray(x[row])[np.asarray(mask[row])]
        low, centre, high, q = np.quantile(entries, [0.25, 0.5, 0.75, 0.975])
        wanted = np.arcsinh((q - centre) / (high - low + 1e-3))
        np.testing.assert_allclose(values["relative quantile 0.975"][row], wanted, rtol=1e-4)
        wanted = np.log((high - low) ** 2 + 1e-6) / 2
        np.testing.assert_allclose(values["log interquartile range"][row], wanted, atol=1e-4)


def test_summaries_of_a_set_of_series_are_means_and_variances():
    settings, shape = CASES["set of series"]
    x = observations(shape)
    values = named(settings, x)
    inner = np.asarray(jax.jit(SERIES.summarise)(x.reshape(-1, 9), None)).reshape(BATCH, 3, -1)
    labels = SERIES.summary_labels(like_of((9,)))
    first = labels.index("mean square")
    raw = np.asarray(summaries("set of series")(x, None))
    index = list(values).index("mean of mean square")
    np.testing.assert_allclose(raw[:, index], inner.mean(axis=1)[:, first], atol=1e-5)
    index = list(values).index("variance of mean square")
    np.testing.assert_allclose(raw[:, index], np.arcsinh(inner.var(axis=1)[:, first]), atol=1e-5)


def test_summaries_of_a_series():
    x = observations((40,))
    mask = masks(x)
    values = named(SERIES, filled(x, mask), mask)
    row, present = np.asarray(x[0], float), np.asarray(mask[0])
    standard = (row - row[present].mean()) / row[present].std()
    for lag in (2, 5, 34):
        both = present[lag:] & present[:-lag]
        wanted = np.log(np.mean((standard[lag:] - standard[:-lag])[both] ** 2) + 1e-6) / 2
        np.testing.assert_allclose(values[f"log variogram lag {lag}"][0], wanted, atol=1e-4)
    places = np.flatnonzero(present)
    assert np.max(np.diff(places)) > 1  # there are gaps
    steps = np.diff(standard[places]) ** 2 / np.diff(places)
    wanted = np.log(np.mean(steps) + 1e-6) / 2
    np.testing.assert_allclose(values["log variogram of successive points"][0], wanted, atol=1e-4)
    magnitude = np.log(standard**2 + 1e-2)
    got = values["mean log squared deviation"][0]
    np.testing.assert_allclose(got, magnitude[present].mean(), atol=1e-4)
    wanted = np.log(magnitude[present].var() + 1e-6) / 2
    np.testing.assert_allclose(
        values["log variance of log squared deviation"][0], wanted, atol=1e-4
    )
    both = present[5:] & present[:-5]
    scaled = (magnitude - magnitude[present].mean()) / magnitude[present].std()
    wanted = np.log(np.mean((scaled[5:] - scaled[:-5])[both] ** 2) + 1e-6) / 2
    np.testing.assert_allclose(
        values["log variogram of log squared deviation, lag 5"][0], wanted, atol=1e-4
    )
    all_three = present[2:] & present[1:-1] & present[:-2]
    wanted = np.log(np.mean(np.diff(row, 2)[all_three] ** 2) + 1e-6) / 2
    name = "log mean square second difference"
    np.testing.assert_allclose(values[name][0], wanted, atol=1e-4)
    wanted = row[5:10][present[5:10]].mean()
    np.testing.assert_allclose(values["cell 1"][0], wanted, atol=1e-4)


def test_successive_points_of_two_channels_with_different_gaps():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 30, 2)), jnp.float32)
    mask = jnp.stack([jnp.arange(30) % 3 != 1, jnp.arange(30) > 4], axis=-1)[None]
    values = named(SERIES, filled(x, mask), mask)
    for channel in range(2):
        row, places = np.asarray(x[0, :, channel]), np.flatnonzero(mask[0, :, channel])
        steps = np.diff(row[places]) ** 2 / np.diff(places) / np.var(row[places])
        got = values[f"log variogram of successive points[{channel}]"][0]
        assert got == pytest.approx(np.log(np.mean(steps) + 1e-6) / 2, abs=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [30, 1000])
def test_the_main_summaries_of_a_series_fit_for_a_few_channels(channels, length):
    labels = SERIES.summary_labels(like_of((length, channels)))
    for name in ("mean square", "log variance", "log variogram of successive points", "spectrum 0"):
        found = [label for label in labels if label.startswith(name)]
        assert len(found) >= channels, name
    assert len(labels) <= 64


def test_a_spectrum_shows_the_frequency_and_white_noise_is_flat():
    time = jnp.arange(128.0)
    values = named(SERIES, jnp.stack([jnp.cos(2 * jnp.pi * k * time / 128) for k in (1, 12, 60)]))
    power = np.stack([v for name, v in values.items() if name.startswith("spectrum")])
    peaks = np.argmax(power, axis=0)
    assert peaks[0] == 0 and peaks[2] == len(power) - 1 and 4 <= peaks[1] <= 9
    noise = observations((32, 32), batch=40)
    for mask in (None, masks(noise)):
        values = named(CONV, noise if mask is None else filled(noise, mask), mask)
        means = [np.mean(v) for name, v in values.items() if name.startswith("spectrum")]
        assert len(means) >= 8
        np.testing.assert_allclose(means, 0.0, atol=0.15)


def test_summaries_of_an_image():
    x = observations((8, 10))
    values = named(CONV, x)
    image = np.asarray(x[1], float)
    np.testing.assert_allclose(values["cell 0 1"][1], image[:2, 3:5].mean(), atol=1e-4)
    standard = (image - image.mean()) / image.std()
    wanted = np.log(np.mean((standard[:, 1:] - standard[:, :-1]) ** 2) + 1e-6) / 2
    np.testing.assert_allclose(values["log variogram axis 1"][1], wanted, atol=1e-4)


def test_the_summaries_of_a_fusion_are_those_of_its_parts():
    x = observations(CASES["fusion"][1])
    labels = FUSION.summary_labels(observation_shape(x))
    values = np.asarray(summaries("fusion")(x, None))
    np.testing.assert_allclose(
        values[:, labels.index("redshift")], LINEAR * np.arcsinh(x["redshift"] / LINEAR), atol=1e-6
    )
    image = jax.jit(CONV.summarise)(x["image"], None)
    index = labels.index("image: mean")
    first = CONV.summary_labels(observation_shape(x["image"])).index("mean")
    np.testing.assert_allclose(values[:, index], image[:, first], atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3, 8, 9, 30, 64, 100])
def test_there_are_at_most_64_summaries_of_an_array(columns):
    for settings, shape in ((DEEP_SET, (5,)), (SERIES, (90,)), (CONV, (12, 12))):
        labels = settings.summary_labels(like_of((*shape, columns)))
        assert 1 <= len(labels) <= 64
        assert len(labels) > columns or columns > 63


def test_summaries_of_many_columns_are_projections_that_read_them_all():
    x = observations((5, 100))
    settings = DeepSet(width=8, layers=0, features=2)
    labels = settings.summary_labels(observation_shape(x))
    assert "mean, projection 0" in labels and "mean square, projection 23" in labels
    values = settings.summarise(x, None)
    assert values.shape == (len(x), len(labels)) and np.all(np.isfinite(values))
    np.testing.assert_allclose(settings.summarise(x[:, ::-1], None), values, atol=1e-5)
    changed = settings.summarise(x.at[..., 99].add(3.0), None)
    assert np.all(np.abs(np.asarray(changed - values)).max(axis=1) > 0.1)


def test_long_parts_without_an_embedding_are_projected():
    x = {"spectrum": observations((600,)), "redshift": observations(())}
    settings = Fusion({"spectrum": None, "redshift": None})
    labels = settings.summary_labels(observation_shape(x))
    assert labels[:2] == ("redshift", "fraction of redshift present")
    assert labels[2:-1] == tuple(f"spectrum, projection {i}" for i in range(64))
    values = np.asarray(settings.summarise(x, None))
    assert values.shape == (BATCH, 67)
    assert 0.5 < values[:, 2:-1].std() < 1.5
    np.testing.assert_array_equal(values[:, [1, 66]], 1.0)


def test_own_scale_shows_the_shape_of_narrow_observations():
    x, constant = observations((9, 2)), jnp.full((BATCH, 9, 1), 0.3)
    mask = masks(x)
    narrow = 2.0 + 0.02 * x
    wanted = np.ma.masked_array(x, ~np.asarray(mask))
    wanted = (wanted - wanted.mean(axis=1, keepdims=True)) / wanted.std(axis=1, keepdims=True)
    got = own_scale(filled(narrow, mask), mask, (1,))
    np.testing.assert_allclose(got, wanted.filled(0.0), atol=0.02)
    assert np.max(np.abs(own_scale(constant, None, (1,)))) < 1e-3


def test_summaries_of_extreme_observations_are_finite():
    """Features of 91.72 are those of the largest numbers, whose tails are uncompressed."""
    settings, like = Fusion({"a": None}), {"a": like_of((600,))}
    count = len(settings.summary_labels(like))
    sizes = Sizes((False,), jax.tree.structure(like), ((600,),), summaries=count)
    blueprint = Blueprint(MAF(), settings, sizes)
    signs = jnp.where(jnp.arange(600) % 3 == 0, -1.0, 1.0)
    inputs = blueprint.inputs(91.72 * jnp.stack([signs, jnp.ones(600)]))
    assert jnp.all(jnp.isfinite(inputs))

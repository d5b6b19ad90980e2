"""Figures show the expected numbers on the expected axes and reject invalid input."""

import types

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from sbi_flows import plots

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_rank_ecdf_is_the_difference_from_uniform():
    ranks = np.c_[np.full(10, 0.25), np.linspace(0.05, 0.95, 10)]
    ax = plots.rank_ecdf(ranks, labels=["alpha", "beta"], band=([0.5], [0.4], [0.6]))
    assert legend_of(ax) == ["95% band", "alpha", "beta"]
    grid, difference = ax.lines[0].get_data()
    at = np.searchsorted(grid, 0.3)
    assert difference[at] == pytest.approx(1.0 - grid[at])  # all ranks lie below .3
    assert np.abs(ax.lines[1].get_ydata()).max() < 0.06
    edge = ax.collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == pytest.approx(-0.1) and edge[:, 1].max() == pytest.approx(0.1)


def test_rank_ecdf_draws_on_the_given_axes():
    ax = plt.figure().add_subplot()
    assert plots.rank_ecdf(RNG.random(50), ax=ax) is ax
    assert ax.get_legend() is None


def test_coverage_curve_has_diagonal_band_and_curves():
    levels = np.array([0.25, 0.5, 0.75])
    ax = plots.coverage_curve(
        levels, {"HPD": levels**2, "TARP": levels}, band=(levels - 0.1, levels + 0.1)
    )
    assert legend_of(ax) == ["95% band", "HPD", "TARP"]
    by_name = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(by_name["HPD"].get_ydata(), levels**2)
    assert by_name["HPD"].get_color() != by_name["TARP"].get_color()


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_corner_has_a_panel_a_pair_and_labels_at_the_edge(dim):
    labels = [f"theta[{i}]" for i in range(dim)]
    draws = RNG.normal(size=(300, dim)) * np.geomspace(1, 1e3, dim)
    figure = plots.corner(
        {"NPE": draws, "NUTS": jnp.asarray(draws[:100])}, labels=labels, truth=np.zeros(dim)
    )
    assert len(figure.axes) == dim * (dim + 1) // 2
    assert [ax.get_xlabel() for ax in figure.axes[-dim:]] == labels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["NPE", "NUTS"]
    diagonal = figure.axes[0]
    assert [line.get_label() for line in diagonal.lines[:2]] == ["NPE", "NUTS"]
    assert np.allclose(diagonal.lines[2].get_xdata(), 0.0)  # the truth


def test_corner_contours_enclose_their_share_of_the_draws():
    draws = RNG.normal(size=(20_000, 2))
    ax = plots.corner(draws, levels=(0.5, 0.9), limits=[(-4, 4)] * 2).axes[1]
    levels = ax.collections[-1].get_paths()  # the lines, outermost first
    radii = [np.hypot(*path.vertices.T).mean() for path in levels]
    assert radii == pytest.approx(np.sqrt(-2 * np.log1p(-np.array([0.9, 0.5]))), rel=0.08)


def test_corner_stops_at_the_face_of_the_support():
    figure = plots.corner(RNG.exponential(size=(4000, 1)))
    density = figure.axes[0].lines[0]
    assert figure.axes[0].get_xlim()[0] == pytest.approx(0.0, abs=0.01)
    assert np.argmax(density.get_ydata()) < 5


def test_corner_takes_a_constant_and_draws_outside_the_limits():
    constant = np.c_[np.ones(50), RNG.normal(size=50)]
    assert len(plots.corner(constant).axes) == 3
    assert len(plots.corner(constant, limits=[(5, 6), (5, 6)]).axes) == 3


def test_predictive_bands_are_quantiles_after_the_transform():
    simulated = RNG.normal(size=(500, 6, 2))
    simulated[0, 3, 1] = np.nan
    observed = np.zeros((6, 2))
    years = np.arange(1900, 1906)
    axes = plots.predictive(
        observed, simulated, time=years, transform=jnp.exp, labels=["hare", "lynx"]
    )
    assert [ax.get_ylabel() for ax in axes] == ["hare", "lynx"]
    assert legend_of(axes[0]) == ["90%", "50%", "median", "observed"]
    median, data = axes[1].lines
    np.testing.assert_allclose(
        median.get_ydata(), np.exp(np.median(simulated[1:, :, 1], axis=0)), rtol=0.02
    )
    np.testing.assert_allclose(data.get_data(), [years, np.ones(6)])
    band = axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(
        np.quantile(np.exp(simulated[1:, :, 1]), 0.95, axis=0).max(), rel=1e-4
    )


def test_predictive_of_one_channel_returns_its_axes():
    ax = plt.figure().add_subplot()
    assert plots.predictive(np.zeros(4), RNG.normal(size=(20, 4)), ax=ax) is ax


def test_loss_curves_mark_the_kept_weights():
    history = types.SimpleNamespace(
        train_loss=np.array([[3.0, 3.1], [2.0, 2.2], [1.0, 1.4]]),
        validation_loss=np.array([[2.5, 2.6], [2.4, 2.7], [2.6, 2.8]]),
        start_loss=np.array([2.7, 2.55]),
        best_epoch=np.array([2, 0]),
        likelihood=True,
    )
    ax = plots.loss_curves(history)
    assert legend_of(ax) == ["training", "validation", "kept"]
    kept = [tuple(float(v[0]) for v in m.get_data()) for m in ax.lines if m.get_marker() == "o"]
    assert kept == [(2, 2.4), (0, 2.55)]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.rank_ecdf([0.5, 1.5]), r"ranks: expected values in \[0, 1\]"),
        (lambda: plots.rank_ecdf([0.5], labels=["a", "b"]), "labels: expected 1 names, got 2"),
        (lambda: plots.coverage_curve([0.5], {"HPD": [0.1, 0.2]}), r"HPD: expected shape \(1,\)"),
        (lambda: plots.corner(np.full((5, 2), np.nan)), "samples: expected finite values"),
        (
            lambda: plots.corner({"a": np.zeros((5, 2)), "b": np.zeros((6, 3))}),
            r"samples: expected arrays \(n, D\) with one D .* shapes {'a': \(5, 2\), 'b'",
        ),
        (lambda: plots.corner(np.zeros((5, 2)), truth=[1.0]), r"truth: expected shape \(2,\)"),
        (lambda: plots.corner(np.zeros((5, 2)), limits=[(0, 1)]), r"limits: expected .*\(2, 2\)"),
        (lambda: plots.predictive(np.zeros(3), np.zeros((5, 4))), r"simulated: .* got \(5, 4\)"),
        (lambda: plots.predictive(np.zeros((1, 1, 1)), np.zeros(1)), "observed: expected shape"),
        (
            lambda: plots.predictive(np.zeros(3), np.full((5, 3), np.inf)),
            "simulated: expected finite rows, got none",
        ),
        (lambda: plots.predictive([0.0], [[1.0]], time=[1, 2]), r"time: expected shape \(1,\)"),
        (
            lambda: plots.predictive(np.zeros((3, 2)), np.zeros((5, 3, 2)), ax=plt.gca()),
            "ax: expected 2 axes, got 1",
        ),
    ],
)
def test_bad_input_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()

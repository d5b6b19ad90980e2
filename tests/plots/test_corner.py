"""Corner plots show true widths and masses, and match parameters by name."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows import plots
from sbi_flows.plots.panels import summary_text

SQRT_8_LN_2 = np.sqrt(8 * np.log(2))
"""Full width at half maximum of a normal distribution of unit standard deviation."""


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def half_maximum_width(line):
    """Total length over which a curve is above half of its maximum."""
    x, y = line.get_data()
    middles = (y[1:] + y[:-1]) / 2
    return np.sum(np.diff(x)[middles >= y.max() / 2])


def rings(ax, set_number=-1):
    """Closed lines of each contour of a set, the outermost contour first."""
    lines = [c for c in ax.collections if c.get_facecolor().size == 0]
    return [path.to_polygons() for path in lines[set_number].get_paths()]


def area(polygons):
    """Area inside closed lines, from the cross products of their points (the shoelace formula)."""
    areas = [np.sum(p[:-1, 0] * p[1:, 1] - p[1:, 0] * p[:-1, 1]) / 2 for p in polygons]
    return abs(sum(areas))


def mass_inside(polygons, points):
    inside = [plt.matplotlib.path.Path(polygon).contains_points(points) for polygon in polygons]
    return np.mean(np.sum(inside, axis=0) % 2)


def turns(line):
    """Number of local maxima of a curve above 5% of its peak."""
    y = line.get_ydata()
    peaks = (y[1:-1] > y[:-2]) & (y[1:-1] >= y[2:]) & (y[1:-1] > 0.05 * y.max())
    return int(peaks.sum())


@pytest.mark.parametrize("n", [5_000, 20_000])
def test_a_narrow_posterior_keeps_its_width_beside_a_wide_one(rng, n):
    narrow, wide = rng.normal(size=(n, 2)), 50 * rng.normal(size=(n, 2))
    figure = plots.corner({"narrow": narrow, "wide": wide})
    for line, std in zip(figure.axes[0].lines, (1.0, 50.0), strict=True):
        assert half_maximum_width(line) == pytest.approx(SQRT_8_LN_2 * std, rel=0.1)
        assert turns(line) == 1
        assert line.get_ydata().max() == pytest.approx(1.0)
    for set_number, std in ((0, 1.0), (1, 50.0)):
        outer, inner = rings(figure.axes[1], set_number)
        expected = 2 * np.pi * std**2 * np.log([10.0, 2.0])
        assert [area(outer), area(inner)] == pytest.approx(expected, rel=0.1)


def test_two_narrow_modes_keep_their_widths(rng):
    n, apart = 8_000, np.r_[np.full(2_000, -40.0), np.full(6_000, 40.0)]
    draws = np.c_[rng.normal(size=n) + apart, rng.normal(size=n)]
    figure = plots.corner({"modes": draws, "wide": 50 * rng.normal(size=(n, 2))})
    line = figure.axes[0].lines[0]
    x, y = line.get_data()
    assert y[x < 0].max() == pytest.approx(1 / 3, abs=0.04)
    assert half_maximum_width(line) == pytest.approx(SQRT_8_LN_2, rel=0.1)
    outer, inner = rings(figure.axes[1], 0)
    assert len(outer) == 2
    fresh = np.c_[rng.normal(size=n) + apart, rng.normal(size=n)]
    assert mass_inside(outer, fresh) == pytest.approx(0.9, abs=0.03)
    assert mass_inside(inner, fresh) == pytest.approx(0.5, abs=0.03)
    # the larger mode holds half of all draws inside the radius that holds two thirds of its own
    assert area(inner) == pytest.approx(2 * np.pi * np.log(3), rel=0.1)


def crescents(rng, n):
    """Two thin crescents, as of the posterior of two moons: 0.01 wide and 0.3 long."""
    angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, n), rng.normal(0.1, 0.01, n)
    side = rng.choice([-1.0, 1.0], n)
    return np.c_[side * (radius * np.cos(angle) + 0.25), radius * np.sin(angle)]


def ridge(rng, n):
    return rng.normal(size=(n, 2)) @ np.array([[1.0, 0.99], [0.0, 0.14]])


def box(rng, n):
    return rng.uniform(size=(n, 2))


@pytest.mark.parametrize("draw", [crescents, ridge, box])
@pytest.mark.parametrize("n", [1_000, 10_000])
def test_contours_enclose_the_stated_mass_of_fresh_draws(rng, draw, n):
    levels = (0.5, 0.9)
    ax = plots.corner(draw(rng, n), levels=levels, limits=[(-4, 4)] * 2).axes[1]
    fresh = draw(rng, 20_000)
    for polygons, level in zip(rings(ax), sorted(levels, reverse=True), strict=True):
        assert mass_inside(polygons, fresh) == pytest.approx(level, abs=0.05)


def test_copies_of_draws_carry_no_information(rng):
    draws = rng.normal(size=(500, 2))
    once, copies = (plots.corner(d).axes for d in (draws, np.repeat(draws, 20, axis=0)))
    widths = [half_maximum_width(axes[0].lines[0]) for axes in (once, copies)]
    assert widths[1] == pytest.approx(widths[0], rel=0.02)
    areas = [area(rings(axes[1])[0]) for axes in (once, copies)]
    assert areas[1] == pytest.approx(areas[0], rel=0.05)


def test_whole_numbers_are_not_taken_for_copies(rng):
    line = plots.corner(rng.poisson(3.0, size=(5_000, 1))).axes[0].lines[0]
    x, y = line.get_data()
    heights = [y[np.argmin(np.abs(x - k))] for k in (1, 2, 3, 1.5)]
    assert heights[:3] == pytest.approx([2 / 3, 1, 1], abs=0.1)
    assert heights[3] < 0.6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scale", "offset"), [(1e-9, 2459000.5), (1e-200, 0.0), (1e200, 0.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("n", [1, 2, 300])
def test_draws_of_any_size_and_number_are_drawn(rng, scale, offset, n):
    draws = offset + scale * rng.normal(size=(n, 2))
    figure = plots.corner(draws, quantiles=(0.16, 0.84), titles=True, labels=["a", "b"])
    figure.canvas.draw()
    assert np.nanmax(figure.axes[0].lines[0].get_ydata()) == pytest.approx(1.0)


def test_outliers_do_not_widen_a_mode(rng):
    draws = rng.standard_cauchy(size=(20_000, 1))
    line = plots.corner(draws).axes[0].lines[0]
    assert half_maximum_width(line) == pytest.approx(2.0, rel=0.15)


def test_a_region_beyond_the_limits_is_not_drawn(rng):
    draws = rng.normal(size=(4_000, 2))
    assert len(plots.corner(draws, limits=[(0, 0.5)] * 2).axes[1].collections) == 0
    few = rings(plots.corner(draws, limits=[(-1.5, 1.5)] * 2).axes[1])
    assert area(few[-1]) == pytest.approx(2 * np.pi * np.log(2), rel=0.1)


PRIOR = {"b": dist.Normal(0.0, 1.0).expand([2]), "a": dist.Normal(5.0, 1.0)}
LABELS = ["b[0]", "b[1]", "a"]


def centers(figure, line=0):
    """Where each curve on the diagonal has its peak."""
    dim = round((np.sqrt(8 * len(figure.axes) + 1) - 1) / 2)
    diagonal = [figure.axes[i * (i + 3) // 2] for i in range(dim)]
    return [ax.lines[line].get_xdata()[np.argmax(ax.lines[line].get_ydata())] for ax in diagonal]


def x_labels(figure, dim=3):
    return [ax.get_xlabel() for ax in figure.axes[-dim:]]


def test_draws_by_name_take_their_labels_from_the_prior():
    prior = sf.as_prior(PRIOR)
    draws = prior.unflatten(prior.sample(jax.random.key(0), 500))
    figure = plots.corner(draws, truth={"a": 5.0, "b": np.array([1.0, 2.0])})
    assert x_labels(figure) == LABELS == list(prior.labels)
    assert centers(figure) == pytest.approx([0, 0, 5], abs=0.7)
    truths = [figure.axes[i].lines[1].get_xdata()[0] for i in (0, 2, 5)]
    assert truths == [1.0, 2.0, 5.0]


SHIFT = np.array([0.0, 20.0])


def test_sets_of_named_draws_are_matched_by_name(rng):
    npe = {"a": rng.normal(size=800) + 5, "b": rng.normal(size=(800, 2)) + SHIFT}
    nuts = {"b": rng.normal(size=(600, 2)) + SHIFT, "a": rng.normal(size=600) + 5}
    figure = plots.corner({"NPE": npe, "NUTS": nuts})
    assert x_labels(figure) == ["a", "b[0]", "b[1]"]
    for line in (0, 1):
        assert centers(figure, line) == pytest.approx([5, 0, 20], abs=0.7)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["NPE", "NUTS"]
    # labels state the order
    assert x_labels(plots.corner({"NPE": npe, "NUTS": nuts}, labels=LABELS)) == LABELS


def test_a_dict_of_equal_shapes_contains_sets_unless_the_labels_do_not_fit(rng):
    samples = {"p": rng.normal(size=(50, 2)), "q": rng.normal(size=(50, 2))}
    assert len(plots.corner(samples).axes) == 3
    assert len(plots.corner(samples, labels=["u", "v"]).axes) == 3
    named = ["p[0]", "p[1]", "q[0]", "q[1]"]
    assert x_labels(plots.corner(samples, labels=named), 4) == named
    assert x_labels(plots.corner({"all": samples}), 4) == named


def test_true_parameters_by_name_follow_the_labels(rng):
    draws = rng.normal(size=(50, 3))
    figure = plots.corner(draws, labels=LABELS, truth={"a": 3, "b": [1, 2]})
    assert [figure.axes[i].lines[1].get_xdata()[0] for i in (0, 2, 5)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"labels": LABELS, "truth": {"b": [1, 2], "c": 3}},
            r"truth: expected the parameters b\[0\], b\[1\], a, got .* \(missing a; unknown c\)",
        ),
        ({"labels": LABELS, "truth": {"b": 1, "a": 3}}, r"missing b\[0\], b\[1\]; unknown b"),
        ({"truth": {"b": [1, 2], "a": 3}}, "labels: expected names of the parameters, because"),
        ({"quantiles": (16, 50, 84)}, r"quantiles: expected probabilities .* got \(16, 50, 84\)"),
    ],
)
def test_names_and_quantiles_that_do_not_fit_are_refused(rng, settings, message):
    with pytest.raises(ValueError, match=message):
        plots.corner(rng.normal(size=(50, 3)), **settings)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "samples: expected draws, got an empty dict"),
        ({"A": {"a": np.ones(5)}, "B": np.ones((5, 1))}, "got {'A': 'dict', 'B': 'array'}"),
        (
            {"A": {"a": np.ones(5)}, "B": {"b": np.ones(5)}},
            r"samples B: expected the parameters a, got b \(missing a; unknown b\)",
        ),
        ({"a": np.ones(5), "b": np.ones(6)}, r"got the shapes {'a': \(5,\), 'b': \(6,\)}"),
        ({"A": {"a": np.ones(5), "b": np.ones(6)}}, r"samples A: expected arrays \(n, \*event\)"),
        ({"A": {}}, "samples A: expected arrays"),
        ({"a": np.full(5, np.nan)}, "samples: expected finite values"),
    ],
)
def test_named_draws_that_do_not_agree_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        plots.corner(samples)


def test_quantiles_of_the_first_set_are_dashed_lines(rng):
    draws = rng.normal(size=(2_000, 2)) + 3
    figure = plots.corner({"A": draws, "B": draws[:500] + 1}, quantiles=(0.16, 0.5, 0.84))
    dashed = [line for line in figure.axes[2].lines if line.get_linestyle() == "--"]
    drawn = [line.get_xdata()[0] for line in dashed]
    np.testing.assert_allclose(drawn, np.quantile(draws[:, 1], [0.16, 0.5, 0.84]))
    plain = plots.corner(draws)
    assert [len(ax.lines) for ax in plain.axes] == [1, 0, 1]
    assert [ax.get_title() for ax in plain.axes] == [""] * 3


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 8])
def test_titles_do_not_overlap(rng, dim):
    draws = rng.lognormal(sigma=2.0, size=(400, dim)) * np.geomspace(1, 1e5, dim)
    labels = [f"log_transmission[{i}]" for i in range(dim)]
    figure = plots.corner({"NPE": draws, "NUTS": draws + 1}, labels=labels, titles=True)
    figure.canvas.draw()
    diagonal = [figure.axes[i * (i + 3) // 2] for i in range(dim)]
    boxes = [ax.title.get_window_extent() for ax in diagonal]
    panels = [ax.get_window_extent() for ax in figure.axes]
    others = [*panels, figure.legends[0].get_window_extent()]
    for i, each in enumerate(boxes):
        assert each.count_overlaps([b for j, b in enumerate(boxes) if j != i]) == 0
        assert each.count_overlaps(others) == 0
        assert figure.bbox.x0 <= each.x0 and each.x1 <= figure.bbox.x1
        assert each.y1 <= figure.bbox.y1
    assert diagonal[0].get_title().split()[:2] == ["log_transmission[0]", "="]


@pytest.mark.parametrize(
    ("low", "median", "high", "text"),
    [
        (1.14, 1.23, 1.33, "1.23 +0.10 -0.09"),
        (-0.5, 0.0004, 0.5, "0.00 +0.50 -0.50"),
        (99.0, 100.0, 112.0, "100 +12 -1"),
        (12_000.0, 12_340.0, 12_900.0, "12340 +560 -340"),
        (1.1e7, 1.2e7, 1.35e7, "(1.20 +0.15 -0.10)e+7"),
        (1.1e-6, 1.2e-6, 1.35e-6, "(1.20 +0.15 -0.10)e-6"),
        (2.0, 2.0, 2.0, "2"),
        (1.0, 1.0, 1.5, "1.00 +0.50 -0.00"),
    ],
)
def test_titles_have_sensible_digits(low, median, high, text):
    # linear interpolation puts these quantiles at rows 16, 50 and 84 of 101
    draws = np.interp(np.arange(101), [0, 16, 50, 84, 100], [low, low, median, high, high])
    assert summary_text(draws) == text

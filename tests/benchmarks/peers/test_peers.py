"""`python -m benchmarks peers`: bad input, records, tables, and each contestant."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from benchmarks.__main__ import main
from benchmarks.peers import compare, measure, report
from benchmarks.peers.contestant import Fit, Recipe
from benchmarks.peers.flowjax_flow import FlowjaxFlow
from benchmarks.peers.ours import Ours
from benchmarks.peers.sbi_npe import SbiNPE
from benchmarks.peers.table import PEERS, Peer

TINY = (
    "--budget 250 --repeats 2 --observations 2 --epochs 2 --max-epochs 3 --draws 40 --datasets 4 "
    "--check-draws 5 --held-out 6"
).split()
RECIPE = Recipe(transforms=1, bins=4, hidden=(8, 8), batch=50)


class Fake:
    """Contestant that draws from a normal distribution, whose width approaches one with epochs."""

    start = 3.0

    def __init__(self, prior, recipe):
        self.dim, self.recipe, self.calls = prior.dim, recipe, []

    def describe(self):
        return {"parameters": 7}

    def fit(self, theta, x, *, seed, epochs, patience, watch=None):
        self.calls.append((len(theta), epochs, watch is not None))
        for epoch in range(epochs):
            self.width = 1.0 + self.start / 2**epoch
            if watch is not None:
                watch()
        return Fit(epochs, 2 * epochs)

    def sample(self, x, n, *, seed):
        return self.width * np.random.default_rng(seed).normal(size=(len(x), n, self.dim))

    def log_prob(self, theta, x):
        return np.full(theta.shape[:2], -self.width)


class Ahead(Fake):
    start = 2.0


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(compare, "OURS", {"ours": Ahead})
    monkeypatch.setitem(PEERS, "sbi", Peer("json", Fake))
    monkeypatch.setitem(PEERS, "flowjax", Peer("a_package_that_nobody_has", Fake))


@pytest.mark.release
@pytest.mark.promotes
def test_a_record_and_a_table(fakes, tmp_path, capsys):
    arguments = ["--peer", "flowjax", "sbi", "--tasks", "gaussian_linear_uniform"]
    assert main(["peers", *arguments, *TINY, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == (
        "peer flowjax: not installed, skipped; pip install 'sbi-flows[peers]'"
    )
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert (record["kind"], record["skipped"]) == ("peers", ["flowjax"])
    assert record["settings"]["budget"] == 250 and record["recipe"]["bins"] == 8
    assert {"machine", "versions", "revision", "time"} < record.keys()
    result = record["tasks"]["gaussian_linear_uniform"]
    assert result["target"] == {"peer": "sbi", "held_out_loss": 1.75}
    ours, sbi = result["contestants"]["ours"], result["contestants"]["sbi"]
    assert sbi["fit"]["curve"]["losses"] == [4.0, 2.5, 1.75]
    assert sbi["fit"]["stop_reason"] == "max_epochs"
    assert (sbi["to_target"]["steps"], ours["to_target"]["steps"]) == (6, 6)
    assert len(ours["training"]["steps_per_second"]) == len(ours["sbc"]["seconds"]) == 2
    assert len(ours["c2st"]["values"]) == 2 and ours["c2st"]["mean"] > 0.6
    assert "ours / sbi" in printed.out and f"written: {file}" in printed.out


@pytest.mark.release
@pytest.mark.promotes
def test_all_contestants_get_the_same_data(tmp_path):
    fakes = []

    def make(prior, recipe):
        fakes.append(Fake(prior, recipe))
        return fakes[-1]

    settings = compare.Settings(
        peers=(), repeats=2, budget=250, epochs=2, max_epochs=2, draws=10, held_out=5, datasets=3
    )
    peers = {"one": Peer("json", make), "two": Peer("json", make)}
    task = compare.simulators.get("bernoulli_glm_raw")  # whose references are stored
    result = compare.compare(task, peers, RECIPE, settings)
    assert [contestant.recipe for contestant in fakes] == [RECIPE, RECIPE]
    timed = [(250, 2, False)] * 3
    assert fakes[0].calls == fakes[1].calls == [*timed, (250, 2, True), (250, 2, True)]
    assert result["target"] is None
    assert [c["to_target"] for c in result["contestants"].values()] == [None] * 4


def test_steps_to_the_target_loss():
    fit = {"epochs": 4, "steps": 40, "curve": {"losses": [3.0, 2.0, 1.5, 1.0], "seconds": [1] * 4}}
    reached = compare._to_target(fit, {"median": 5.0}, 2.0 - compare.LOSS_TOLERANCE / 2)
    assert reached == {"epochs": 2, "steps": 20, "seconds": 4.0, "measured_seconds": 1}
    assert set(compare._to_target(fit, {"median": 5.0}, 0.9).values()) == {None}


def test_a_ratio_is_ours_over_theirs():
    def contestant(rate, seconds, steps):
        timing = {"median": seconds}
        return {
            "training": {"median": rate, "compilation_seconds": 1.0},
            "fit": {"held_out_loss": 2.0, "steps": 10},
            "to_target": {"steps": steps, "seconds": steps},
            **{what: timing for what in ("sample", "log_prob", "sbc")},
            "c2st": {"mean": None},
            "described": {},
        }

    contestants = {"ours": contestant(30.0, 1.0, None), "a": contestant(10.0, 4.0, 5)}
    lines = report.text("t", {"contestants": contestants, "target": None}, ("ours",)).splitlines()
    rows = {line[:35].strip(): line[35:].split() for line in lines[2:]}
    assert rows["training steps per second"] == ["30.0", "10.0", "3.00"]
    assert rows["draws at one observation, s"] == ["1.000", "4.000", "0.25"]
    assert rows["steps to the target loss"] == ["-", "5", "-"]
    assert rows["this time with compilation, s"] == ["-", "6.0", "-"]
    assert rows["C2ST"] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "sbi", "nobody"], "--peer: expected names out of flowjax, sbi; got nobody"),
        (["--tasks", "nothing"], "--tasks: expected names out of"),
        (["--budget", "249"], "--budget: expected at least 250, got 249"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--max-epochs", "1"], "--max-epochs: expected at least 2, got 1"),
        (["--results", "pyproject.toml"], "--results: cannot write to"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(compare, "compare", None)  # nothing may run
    monkeypatch.setitem(PEERS, "sbi", Peer("json", Fake))
    assert main(["peers", "--peer", "sbi", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: error: " + message)


def test_the_clock_of_a_curve_stops_during_the_callback(monkeypatch):
    ticks = iter([0.0, 1.0, 11.0, 13.0, 23.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    curve = measure.Curve(lambda: 5.0)
    curve.watch()
    curve.watch()
    assert (curve.losses, curve.seconds) == ([5.0, 5.0], [1.0, 3.0])


@pytest.mark.promotes
def test_ranks_are_shares_of_the_draws_below():
    contestant = Fake(sf.as_prior(dist.Normal(0.0, 1.0).expand([2])), RECIPE)
    contestant.width = 1.0
    data = measure.Data(np.array([[-9.0, 9.0]] * 3), np.zeros((3, 1)))
    np.testing.assert_array_equal(measure.sbc_ranks(contestant, data, 10, 1), [[0.0, 1.0]] * 3)


BOX = dist.Uniform(jnp.array([0.0, -1.0]), jnp.array([2.0, 1.0])).to_event(1)
HALF_LINES = dist.LogNormal(0.0, 0.5).expand([2]).to_event(1)
MAKERS = [
    pytest.param(Ours, id="ours"),
    pytest.param(FlowjaxFlow, id="flowjax"),
    pytest.param(SbiNPE, id="sbi"),
]
DEFAULTS = pytest.param(
    partial(Ours, defaults=True), id="ours, defaults", marks=pytest.mark.release
)


def data_of(prior):
    theta = np.asarray(prior.sample(jax.random.key(0), 260))
    return theta, theta + 0.5 * np.random.default_rng(0).normal(size=theta.shape)


def require(make):
    package = {FlowjaxFlow: "flowjax", SbiNPE: "sbi"}.get(make)
    if package is not None:
        pytest.importorskip(package)


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize(
    "distribution",
    [
        pytest.param(BOX, marks=pytest.mark.release, id="box"),
        pytest.param(HALF_LINES, id="half-lines"),
    ],
)
@pytest.mark.parametrize("make", [*MAKERS, DEFAULTS])
def test_a_contestant_draws_inside_and_integrates_to_one(make, distribution):
    require(make)
    prior = sf.as_prior(distribution)
    theta, x = data_of(prior)
    contestant = make(prior, RECIPE)
    # by default, four members take 14 batches of 16 rows an epoch
    steps = 12 if make in (Ours, FlowjaxFlow, SbiNPE) else 4 * 3 * 14
    assert contestant.fit(theta, x, seed=1, epochs=3, patience=3) == Fit(3, steps)
    draws = contestant.sample(x[:3], 50, seed=1)
    assert draws.shape == (3, 50, 2) and np.all(prior.contains(draws))
    assert contestant.sample(x[:1], 50, seed=1).shape == (1, 50, 2)
    high = np.array([2.0, 1.0]) if distribution is BOX else np.array([12.0, 12.0])
    low = np.array([0.0, -1.0]) if distribution is BOX else np.zeros(2)
    sides = (low + (np.arange(160)[:, None] + 0.5) / 160 * (high - low)).T
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(1, -1, 2)
    cell = np.prod((high - low) / 160)
    alone = contestant.log_prob(grid, x[:1])
    assert alone.shape == (1, 160**2)
    assert np.exp(alone).sum() * cell == pytest.approx(1.0, abs=0.05)
    # in a batch, the densities are the same up to the uncertainty of sbi's leakage correction
    batch = contestant.log_prob(np.repeat(grid[:, ::200], 2, axis=0), np.repeat(x[:1], 2, axis=0))
    np.testing.assert_allclose(batch, np.repeat(alone[:, ::200], 2, axis=0), atol=0.3)
    described = contestant.describe()
    assert described["parameters"] > 100 and json.dumps(described)


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize("make", MAKERS)
def test_a_contestant_is_watched_after_each_epoch(make):
    require(make)
    prior = sf.as_prior(BOX)
    theta, x = data_of(prior)
    contestant, losses = make(prior, RECIPE), []

    def watch():
        losses.append(measure.held_out_loss(contestant, measure.Data(theta[:50], x[:50])))

    fit = contestant.fit(theta, x, seed=1, epochs=4, patience=4, watch=watch)
    assert fit == Fit(4, 16)
    assert len(losses) == 4 and len(set(losses)) > 1
    # the best weights by the validation rows are those of one of the epochs
    best = measure.held_out_loss(contestant, measure.Data(theta[:50], x[:50]))
    assert min(abs(best - loss) for loss in losses) < 1e-5


@pytest.mark.promotes
def test_watching_does_not_change_a_fit_of_sbi():
    require(SbiNPE)
    prior = sf.as_prior(BOX)
    theta, x = data_of(prior)
    watched, alone = SbiNPE(prior, RECIPE), SbiNPE(prior, RECIPE)
    watched.fit(
        theta,
        x,
        seed=1,
        epochs=3,
        patience=3,
        watch=lambda: watched.log_prob(theta[:9, None], x[:9]),
    )
    alone.fit(theta, x, seed=1, epochs=3, patience=3)
    np.testing.assert_array_equal(*(c.log_prob(theta[:9, None], x[:9]) for c in (watched, alone)))


@pytest.mark.promotes
def test_autoregressive_flows_are_made():
    require(SbiNPE)
    contestant = SbiNPE(sf.as_prior(BOX), Recipe(coupling=False, hidden=(8, 8)))
    assert contestant._model() == (
        "zuko_nsf",
        {"num_transforms": 5, "num_bins": 8, "hidden_features": (8, 8)},
    )

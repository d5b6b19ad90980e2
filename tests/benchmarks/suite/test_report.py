"""The report: values in their cells, and one page without external files."""

import base64
import json
import re

import numpy as np
import pytest

import simulators
from benchmarks.__main__ import main
from benchmarks.suite import published, report, scaling
from benchmarks.suite.records import SCHEMA


def record(task="two_moons", budget=1000, seed=1, c2st=0.6, verdict="calibrated: fine"):
    kind = verdict.split()[0].rstrip(":")
    return {
        "schema": SCHEMA,
        "kind": "run",
        "task": task,
        "method": "npe",
        "budget": budget,
        "seed": seed,
        "machine": {"cores": 2, "architecture": "x86_64", "memory_gib": 24, "device": "cpu"},
        "c2st": {"mean": c2st, "values": [] if c2st is None else [c2st - 0.01, c2st + 0.01]},
        "predictive": [
            {"distance_p": 0.4, "worst_p": 1.0},
            {"distance_p": 0.3 / seed, "worst_p": 1},
        ],
        "held_out_loss": -1.5,
        "outside_support": 0.0,
        "check": {
            "verdict": verdict,
            "calibrated": kind == "calibrated",
            "conservative": kind in ("calibrated", "under-confident"),
        },
        "seconds": dict.fromkeys(("simulate", "fit", "draw", "check"), 2.0 * seed),
        "compile_seconds": {"fit": 5.0 * seed},
        "peak_memory_gib": 1.25,
        "history": {"epochs": 3},
    }


def write(folder, *records):
    for r in records:
        name = f"run-{r['task']}-{r['method']}-{r['budget']}-seed{r['seed']}.json"
        (folder / name).write_text(json.dumps(r))


@pytest.fixture
def results(tmp_path):
    write(
        tmp_path,
        record(seed=1, c2st=0.6),
        record(seed=2, c2st=0.7, verdict="under-confident in theta[0] (1.2 times too wide)"),
        record(budget=10_000, c2st=0.55),
        record(
            "slcp",
            verdict="biased in theta<1> (0.5 posterior sd too high; corrected p 1e-04); "
            "mis-shaped in theta<2> (corrected p 0.01)",
        ),
        record("mine", c2st=None),
    )
    (tmp_path / "run-spoilt.json").write_text("{")
    (tmp_path / "run-old.json").write_text(json.dumps({**record(), "schema": SCHEMA - 1}))
    return tmp_path


def rows(text, heading):
    part = text.split(f"## {heading}")[1].split("## ")[0]
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if "|" in line
    ]


def test_values_stand_beside_published_values(results, capsys):
    assert main(["report", "--results", str(results)]) == 0
    assert "run-spoilt.json: not a record, ignored" in capsys.readouterr().err
    text = (results / "report.md").read_text()
    header, _, *table = rows(text, "Summary")
    assert header[2:6] == ["C2ST at 1,000", "best published", "C2ST at 10,000", "best published"]
    two_moons = ["two_moons", "npe", "0.650", "0.725", "0.550", "0.592", "calibrated"]
    assert [r for r in table if r[0] == "two_moons"] == [two_moons]
    assert ["mine", "npe", "-", "-", "-", "-", "calibrated"] in table
    accuracy = {tuple(r[:3]): r[3:] for r in rows(text, "Accuracy")[2:]}
    # two observations, .02 apart
    assert accuracy["two_moons", "npe", "1,000"][:3] == ["0.650", "0.010", "0.725"]
    assert accuracy["two_moons", "npe", "10,000"][3] == "0.592 (NRE-C)"
    assert accuracy["mine", "npe", "1,000"] == ["-", "-", "-", "-"]
    verdicts = {tuple(r[:3]): r[3] for r in rows(text, "Calibration")[2:]}
    assert verdicts["two_moons", "npe", "1,000"] == "conservative: under-confident in theta[0]"
    assert verdicts["two_moons", "npe", "10,000"] == "calibrated"
    assert verdicts["slcp", "npe", "1,000"] == "biased in theta<1>; mis-shaped in theta<2>"
    predictive = {tuple(r[:3]): r[4] for r in rows(text, "Calibration")[2:]}
    assert predictive["two_moons", "npe", "1,000"] == "0.225"  # of .3 and .15
    times = {tuple(r[:3]): r[3:] for r in rows(text, "Times")[2:]}
    assert times["two_moons", "npe", "1,000"] == ["3.0", "3.0", "7.5", "3.0", "3.0", "1.2"]
    assert "2 cores, x86_64, 24 GiB, cpu" in text
    (law,) = rows(text, "Scaling")[2:]
    slope = np.log(0.15 / 0.05) / np.log(10)
    assert law[:4] == ["two_moons", "npe", "C2ST", f"N^-{slope:.2f}"]
    assert law[5] == "0.550"
    assert float(law[6]) == pytest.approx(0.5 + 0.05 * 10**-slope, abs=2e-3)
    assert "Comparison of methods" not in text


def test_methods_are_compared(results):
    write(results, {**record(c2st=0.52, budget=10_000), "method": "stack", "held_out_loss": -3.0})
    report.run(results)
    header, _, *table = rows((results / "report.md").read_text(), "Comparison of methods")
    assert header == ["task", "simulations", "npe", "stack"]
    assert ["two_moons", "10,000", "0.550 (-1.500)", "0.520 (-3.000)"] in table
    assert ["slcp", "1,000", "0.600 (-1.500)", "-"] in table
    assert ["mine", "1,000", "- (-1.500)", "-"] in table


def test_members_of_a_stack_have_their_columns(results):
    part = {"density": "NSF(transforms=5)", "emulator": None}
    stacked = {
        **record(budget=10_000),
        "method": "stack",
        "estimator": {
            "estimators": [{**part, "emulator": "Emulator()"}, part, {**part, "density": "MAF()"}]
        },
        "history": {
            "shares": [0.9, 0.1, 0.0],
            "held_out_loss": [-2.0, -1.0, None],
            "mixture_loss": -2.125,
        },
    }
    write(results, stacked)
    report.run(results)
    header, _, row = rows((results / "report.md").read_text(), "Members of the stacks")
    assert header[3:] == ["NSF, emulated", "NSF", "MAF", "mixture"]
    assert row[2:] == ["10,000", "-2.000 (90%)", "-1.000 (10%)", "- (0%)", "-2.125"]


def test_the_page_stands_alone(results, tmp_path):
    page = report.run(results, tmp_path / "out")
    text = page.read_text()
    assert not re.search(r"(src|href)=.(?!data:)", text)
    picture = re.search(r"data:image/png;base64,([\w+/=]+)", text)[1]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert '<td class="wrong">biased in theta&lt;1&gt;; mis-shaped in theta&lt;2&gt;</td>' in text
    assert '<td class="fine">calibrated</td>' in text


def test_nothing_to_report_is_refused(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert f"--results: no finished run in {tmp_path}" in capsys.readouterr().err


def test_every_published_figure_is_of_a_task_and_has_a_source():
    figures = published.published()
    assert len({(p.task, p.budget, p.method) for p in figures}) == len(figures)
    # the tasks of Lueckmann et al. 2021; the other tasks have no published figures
    assert {p.task for p in figures} == {
        "bernoulli_glm",
        "bernoulli_glm_raw",
        "gaussian_linear",
        "gaussian_linear_uniform",
        "gaussian_mixture",
        "lotka_volterra",
        "sir",
        "slcp",
        "slcp_distractors",
        "two_moons",
    }
    assert {p.task for p in figures} <= set(simulators.names())
    assert all(0.45 < p.c2st <= 1.0 and "arXiv:" in p.source for p in figures)
    best = published.best_amortised("slcp", 10_000)
    assert (best.method, best.c2st) == ("NLE", 0.771)
    assert published.best_amortised("slcp", 7) is None


BUDGETS = np.repeat([1e3, 1e4, 1e5], 4)


def noisy_scores(floor, seed):
    """Scores with Gaussian errors of .004, which exceed the excess at the largest budget."""
    noise = np.random.default_rng(seed).normal(size=len(BUDGETS))
    return floor + 3.0 * BUDGETS**-0.4 + 0.004 * noise


def test_a_power_law_is_recovered_with_an_interval_that_covers_it():
    laws = [scaling.power_law(BUDGETS, noisy_scores(0.5, seed), floor=0.5) for seed in range(100)]
    assert np.median([law.exponent for law in laws]) == pytest.approx(0.4, abs=0.02)
    assert laws[0].at(1e4) == pytest.approx(0.5 + 3.0 * 1e4**-0.4, rel=0.05)
    assert 82 <= sum(law.low <= 0.4 <= law.high for law in laws) <= 98
    assert scaling.power_law([1e3, 1e4, 1e5], [0.4, 0.45, 0.48], floor=0.5) is None
    assert scaling.power_law([1e3, 1e4], [0.6, 0.5], floor=0.5) is None
    assert scaling.power_law([1e3, 1e3, 1e3], [0.6, 0.7, 0.6], floor=0.5) is None
    assert scaling.power_law([1e3, 1e4, 1e5], [0.6, 0.7, 0.8], floor=0.5) is None


def test_a_law_of_unknown_floor_is_recovered():
    laws = [scaling.power_law(BUDGETS, noisy_scores(-2.0, seed)) for seed in range(40)]
    assert np.median([law.exponent for law in laws]) == pytest.approx(0.4, abs=0.1)
    assert np.median([law.floor for law in laws]) == pytest.approx(-2.0, abs=0.02)
    assert 30 <= sum(law.low <= 0.4 <= law.high for law in laws) <= 39
    assert np.median([law.high - law.low for law in laws]) < 0.5
    assert scaling.power_law([1e3, 1e4, 1e5], [3.0, 2.0, 1.5]) is None
    assert scaling.power_law([1e3, 1e3, 1e4, 1e4], [3.0, 2.9, 2.0, 1.5]) is None
    assert scaling.power_law([1e3, 1e4, 1e5, 1e5], [1.0, 2.0, 2.5, 2.6]) is None
    # a straight line in the logarithm has no floor
    assert scaling.power_law([1e3, 1e4, 1e5, 1e6], [3.0, 2.5, 2.0, 1.5]) is None
    # an end of the interval that the data do not bound is infinite
    loose = scaling.power_law([1e3, 1e3, 1e4, 1e4, 1e5], [3.0, 2.6, 2.1, 2.3, 2.0])
    assert loose is not None and loose.high == np.inf

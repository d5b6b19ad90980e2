"""The table of the kinds of density."""

from benchmarks.demonstrations.choosing import KINDS, choosing_table


def record(task, method, c2st):
    return {
        "task": task,
        "method": method,
        "budget": 10_000,
        "c2st": {"mean": c2st, "values": [c2st] * 5},
        "held_out_loss": -1.25,
        "seconds": {"fit": 61.4, "draw again": 2.0, "held-out": 30.0},
        "compile_seconds": {"held-out": 4.5},
        "check": {"calibrated": True, "conservative": False, "verdict": "calibrated"},
    }


def test_a_row_is_a_run_in_the_order_of_tasks_and_kinds():
    runs = [
        record("two_moons", "npe-diffusion", 0.6),
        record("two_moons", "stack", 0.5),
        record("slcp", "npe-cnf", 0.8),
        record("two_moons", "npe", 0.7),
    ]
    _, _, *rows = choosing_table(runs)
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| slcp", KINDS["npe-cnf"]],
        ["| two_moons", KINDS["npe"]],
        ["| two_moons", KINDS["npe-diffusion"]],
    ]
    # "draw again" covers four observations; compilation is subtracted from the time of densities
    assert rows[0] == "| slcp | `CNF` | 0.800 | -1.250 | 61 | 0.50 | 25.5 | calibrated |"

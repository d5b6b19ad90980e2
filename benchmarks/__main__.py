"""Command line of the benchmarks: accuracy, calibration, speed, real data, and other libraries."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from benchmarks.suite.records import BadInput, writable_folder

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 after bad input, which is said in one line on stderr.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except BadInput as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="accuracy, calibration and times on benchmark tasks", prog="benchmarks run"
    )
    run.set_defaults(command=_run)
    run.add_argument("--tasks", nargs="+", default=[], metavar="TASK")
    run.add_argument(
        "--simulator",
        metavar="MODULE:NAME",
        help="a simulators.Task of your own, or the name of its entry point, scored alike",
    )
    run.add_argument("--methods", nargs="+", default=["stack"], metavar="METHOD", help="(stack)")
    run.add_argument("--budgets", nargs="+", type=int, default=[10_000], metavar="N")
    run.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds (1)")
    run.add_argument("--observations", type=int, default=5, metavar="N", help="how many (5)")
    run.add_argument(
        "--observations-from",
        type=Path,
        metavar="DIR",
        help="take x_1, x_2, ... of DIR/<task>.npz instead of the task's own observations",
    )
    run.add_argument("--draws", type=int, default=10_000, metavar="N", help="per C2ST (10000)")
    run.add_argument(
        "--datasets", type=int, default=1_000, metavar="N", help="of the calibration check (1000)"
    )
    run.add_argument(
        "--check-draws", type=int, default=1_000, metavar="N", help="for each of them (1000)"
    )
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    _add_folder(run, "--results", "results")
    references = commands.add_parser(
        "references", help="reference posteriors that take long", prog="benchmarks references"
    )
    references.set_defaults(command=_references)
    references.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="(all)")
    references.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to keep them ($SBI_FLOWS_CACHE)"
    )
    references.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="compare our samplers with the draws of DIR/<task>.npz instead",
    )
    _add_folder(references, "--results", "results")
    report = commands.add_parser(
        "report", help="finished runs beside published figures", prog="benchmarks report"
    )
    report.set_defaults(command=_report)
    report.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="(results/)"
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (the same)")
    demo = commands.add_parser(
        "demo", help="lynx and hare: real data end to end, beside NUTS", prog="benchmarks demo"
    )
    demo.set_defaults(command=_demo)
    _add_folder(demo, "--folder", "demo")
    uses = commands.add_parser(
        "uses", help="two real uses: an epidemic, a hierarchical model", prog="benchmarks uses"
    )
    uses.set_defaults(command=_uses)
    _add_folder(uses, "--folder", "uses")
    rounds = commands.add_parser(
        "rounds", help="truncated rounds, beside exact posteriors", prog="benchmarks rounds"
    )
    rounds.set_defaults(command=_rounds)
    rounds.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="(sir lynx_hare)")
    rounds.add_argument(
        "--observations-from", type=Path, metavar="DIR", help="as for `run`, where DIR has the task"
    )
    _add_folder(rounds, "--results", "results")
    speed = commands.add_parser(
        "speed", help="training steps, check and a cold process", prog="benchmarks speed"
    )
    speed.set_defaults(command=_speed)
    _add_folder(speed, "--results", "results")
    batches = commands.add_parser(
        "batches", help="time to the same loss by rows a step", prog="benchmarks batches"
    )
    batches.set_defaults(command=_batches)
    _add_folder(batches, "--results", "results")
    _add_continuous(commands)
    accelerator = commands.add_parser(
        "accelerator",
        help="what a GPU does with a fit, beside its limits",
        prog="benchmarks accelerator",
    )
    accelerator.set_defaults(command=_accelerator)
    accelerator.add_argument(
        "--rows", type=int, default=100_000, metavar="N", help="simulations of each fit (100000)"
    )
    _add_folder(accelerator, "--results", "results")
    _add_peers(commands)
    return parser


def _add_continuous(commands: Any) -> None:
    continuous = commands.add_parser(
        "continuous",
        help="densities of continuous flows: integrals, draws beside densities, and their time",
        prog="benchmarks continuous",
    )
    continuous.set_defaults(command=_continuous)
    continuous.add_argument(
        "--densities",
        nargs="+",
        default=["NSF", "FlowMatching", "Diffusion"],
        metavar="NAME",
        help="(NSF FlowMatching Diffusion)",
    )
    continuous.add_argument(
        "--peer-epochs",
        type=int,
        default=100,
        metavar="N",
        help="most epochs of sbi's flow matching, timed where it is installed; 0 for none (100)",
    )
    _add_folder(continuous, "--results", "results")


def _add_peers(commands: Any) -> None:
    peers = commands.add_parser(
        "peers", help="training and posteriors beside other libraries'", prog="benchmarks peers"
    )
    peers.set_defaults(command=_peers)
    peers.add_argument(
        "--peer",
        dest="peers",
        nargs="+",
        default=["flowjax", "sbi"],
        metavar="NAME",
        help="(flowjax sbi)",
    )
    peers.add_argument("--tasks", nargs="+", default=["slcp"], metavar="TASK", help="(slcp)")
    peers.add_argument(
        "--flow", choices=("coupling", "autoregressive"), default="coupling", help="(coupling)"
    )
    numbers = {
        "--budget": (10_000, "simulations"),
        "--repeats": (3, "timings of each call"),
        "--observations": (3, "of the C2ST"),
        "--epochs": (10, "of each timed fit"),
        "--max-epochs": (1_000, "of the fit until it has converged"),
        "--draws": (10_000, "draws and densities timed, and draws of the C2ST"),
        "--datasets": (200, "of SBC"),
        "--check-draws": (1_000, "for each of them"),
        "--held-out": (1_000, "fresh simulations behind the held-out loss"),
    }
    for option, (default, meaning) in numbers.items():
        told = f"{meaning} ({default})"
        peers.add_argument(option, type=int, default=default, metavar="N", help=told)
    _add_folder(peers, "--results", "results")


def _add_folder(parser: argparse.ArgumentParser, option: str, default: str) -> None:
    parser.add_argument(
        option, type=Path, default=Path(default), metavar="DIR", help=f"for the output ({default}/)"
    )


def _settings(kind: Callable[..., T], arguments: argparse.Namespace, **more: Any) -> T:
    """Those of the arguments that are fields of the settings, lists as tuples, and some more."""
    names = set(vars(arguments)) & {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {name: getattr(arguments, name) for name in names}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, **more)


# each command imports what it needs when it is chosen: `--help` should not wait for JAX


def _run(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    from benchmarks.suite import runner
    from benchmarks.suite.settings import Settings

    import_seconds = time.perf_counter() - began
    settings = _settings(Settings, arguments)
    runner.run(settings, import_seconds=import_seconds)


def _references(arguments: argparse.Namespace) -> None:
    if arguments.check is not None:
        folder = writable_folder(arguments.results, "--results")
        from benchmarks.suite import reference_check

        reference_check.run(arguments.check, tuple(arguments.tasks), folder)
        return
    from benchmarks.suite import references
    from simulators.adapters import stored

    references.run(arguments.folder or stored.cache_folder(), tuple(arguments.tasks))


def _report(arguments: argparse.Namespace) -> None:
    from benchmarks.suite import report

    report.run(arguments.results, arguments.out)


def _demo(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.folder, "--folder")
    from benchmarks.demonstrations import demo

    demo.run(folder)


def _uses(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.folder, "--folder")
    from benchmarks.demonstrations import uses

    uses.run(folder)


def _rounds(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import rounds

    rounds.run(arguments.results, tuple(arguments.tasks), arguments.observations_from)


def _speed(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.results, "--results")
    from benchmarks.speed import speed

    speed.run(folder)


def _batches(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.results, "--results")
    from benchmarks.speed import batches

    batches.run(folder)


def _continuous(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import continuous

    continuous.run(_settings(continuous.Settings, arguments))


def _accelerator(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.results, "--results")
    from benchmarks.speed import accelerator

    accelerator.run(folder, arguments.rows)


def _peers(arguments: argparse.Namespace) -> None:
    from benchmarks.peers import compare

    coupling = arguments.flow == "coupling"
    compare.run(_settings(compare.Settings, arguments, coupling=coupling))


if __name__ == "__main__":
    sys.exit(main())

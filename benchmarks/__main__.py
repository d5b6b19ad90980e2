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
    """Argument parser whose error messages are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Command-line arguments. The default is `sys.argv[1:]`.

    Returns:
        The exit status: 0 for success, 2 for an error in the input. The error message is one line
        on stderr.
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
    _add_run(commands)
    _add_references(commands)
    _add_report(commands)
    demo = _command(commands, "demo", _demo, "lynx and hare: real data end to end, beside NUTS")
    _add_folder(demo, "--folder", "demo")
    uses = _command(commands, "uses", _uses, "two real uses: an epidemic, a hierarchical model")
    _add_folder(uses, "--folder", "uses")
    inside = _command(
        commands, "inside-jax", _inside_jax, "a posterior as a prior for NUTS, and in a scan"
    )
    _add_folder(inside, "--results", "results")
    _add_rounds(commands)
    observations = _command(
        commands, "observations", _observations, "sets, series, images, missing entries"
    )
    _add_folder(observations, "--results", "results")
    observations.add_argument("--cases", nargs="+", help="names of the cases (all)")
    large = _command(commands, "large", _large, "memory of fits to long observations on disk")
    _add_folder(large, "--results", "results")
    verdict = _command(commands, "verdict", _verdict, "how often a check finds what it should")
    _add_folder(verdict, "--results", "results")
    verdict.add_argument("--repeats", type=int, default=40, help="checks of each posterior (40)")
    verdict.add_argument("--fits", type=int, default=4, help="fits of each kind of data (4)")
    speed = _command(commands, "speed", _speed, "times of training, of a check, of a cold process")
    _add_folder(speed, "--results", "results")
    batches = _command(commands, "batches", _batches, "time to the same loss by batch size")
    _add_folder(batches, "--results", "results")
    _add_continuous(commands)
    _add_accelerator(commands)
    _add_peers(commands)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    """Add a command that calls `function` with the parsed arguments; return its parser."""
    parser = commands.add_parser(name, help=summary, prog=f"benchmarks {name}")
    parser.set_defaults(command=function)
    return parser


def _add_folder(parser: argparse.ArgumentParser, option: str, default: str) -> None:
    parser.add_argument(
        option, type=Path, default=Path(default), metavar="DIR", help=f"output folder ({default}/)"
    )


def _add_numbers(parser: argparse.ArgumentParser, numbers: dict[str, tuple[int, str]]) -> None:
    """Add integer options; `numbers` maps each name to its default value and its help text."""
    for option, (default, meaning) in numbers.items():
        text = f"{meaning} ({default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=text)


def _add_run(commands: Any) -> None:
    run = _command(commands, "run", _run, "accuracy, calibration and times on benchmark tasks")
    run.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of tasks")
    run.add_argument(
        "--simulator",
        metavar="MODULE:NAME",
        help="your own simulators.Task, or the name of its entry point",
    )
    run.add_argument(
        "--methods", nargs="+", default=["stack"], metavar="METHOD", help="methods (stack)"
    )
    run.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[10_000],
        metavar="N",
        help="numbers of simulations (10000)",
    )
    run.add_argument(
        "--observations-from",
        type=Path,
        metavar="DIR",
        help="use x_1, x_2, ... of DIR/<task>.npz instead of the task's own observations",
    )
    _add_numbers(
        run,
        {
            "--seeds": (1, "number of seeds"),
            "--observations": (5, "maximum number of observations per task"),
            "--draws": (10_000, "draws per C2ST"),
            "--datasets": (1_000, "data sets of the calibration check"),
            "--check-draws": (1_000, "draws for each of these data sets"),
            "--jobs": (1, "runs in parallel"),
        },
    )
    _add_folder(run, "--results", "results")


def _add_references(commands: Any) -> None:
    references = _command(
        commands, "references", _references, "reference posteriors that need NUTS"
    )
    references.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks (all)")
    references.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the draws ($SBI_FLOWS_CACHE)"
    )
    references.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="compare our samplers with the draws in DIR/<task>.npz instead",
    )
    _add_folder(references, "--results", "results")


def _add_report(commands: Any) -> None:
    report = _command(commands, "report", _report, "finished runs beside published values")
    report.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of the records (results/)",
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="output folder (the same)")


def _add_rounds(commands: Any) -> None:
    rounds = _command(commands, "rounds", _rounds, "truncated rounds, beside exact posteriors")
    rounds.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks (sir lynx_hare)"
    )
    rounds.add_argument(
        "--observations-from",
        type=Path,
        metavar="DIR",
        help="as for `run`, for the tasks that have a file in DIR",
    )
    _add_folder(rounds, "--results", "results")


def _add_continuous(commands: Any) -> None:
    continuous = _command(
        commands,
        "continuous",
        _continuous,
        "continuous flows: integrals of densities, agreement with draws, times",
    )
    continuous.add_argument(
        "--densities",
        nargs="+",
        default=["NSF", "FlowMatching", "Diffusion"],
        metavar="NAME",
        help="densities (NSF FlowMatching Diffusion)",
    )
    _add_numbers(
        continuous,
        {
            "--peer-epochs": (
                100,
                "maximum number of epochs of sbi's flow matching, if it is installed; 0 for none",
            )
        },
    )
    _add_folder(continuous, "--results", "results")


def _add_accelerator(commands: Any) -> None:
    accelerator = _command(
        commands, "accelerator", _accelerator, "training on a GPU, beside the limits of the GPU"
    )
    _add_numbers(accelerator, {"--rows": (100_000, "simulations of each fit")})
    _add_folder(accelerator, "--results", "results")


def _add_peers(commands: Any) -> None:
    peers = _command(commands, "peers", _peers, "training and posteriors of other libraries")
    peers.add_argument(
        "--peer",
        dest="peers",
        nargs="+",
        default=["flowjax", "sbi"],
        metavar="NAME",
        help="libraries (flowjax sbi)",
    )
    peers.add_argument("--tasks", nargs="+", default=["slcp"], metavar="TASK", help="tasks (slcp)")
    peers.add_argument(
        "--flow",
        choices=("coupling", "autoregressive"),
        default="coupling",
        help="kind of flow (coupling)",
    )
    _add_numbers(
        peers,
        {
            "--budget": (10_000, "simulations"),
            "--repeats": (3, "timings of each call"),
            "--observations": (3, "observations of the C2ST"),
            "--epochs": (10, "epochs of each timed fit"),
            "--max-epochs": (1_000, "maximum number of epochs of the converged fit"),
            "--draws": (10_000, "timed draws and densities, and draws of the C2ST"),
            "--datasets": (200, "data sets of SBC"),
            "--check-draws": (1_000, "draws for each of these data sets"),
            "--held-out": (1_000, "new simulations for the held-out loss"),
        },
    )
    _add_folder(peers, "--results", "results")
    help_text = "sbi and BayesFlow with their embeddings, on sets and images"
    embeddings = _command(commands, "peer-embeddings", _peer_embeddings, help_text)
    _add_folder(embeddings, "--results", "results")
    embeddings.add_argument(
        "--tasks",
        nargs="+",
        default=["drift_diffusion", "random_field"],
        metavar="TASK",
        help="tasks (drift_diffusion random_field)",
    )


def _settings(kind: Callable[..., T], arguments: argparse.Namespace, **more: Any) -> T:
    """Make an object of class `kind`. Its fields come from `arguments` and from `more`."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type] # a class
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return kind(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}, **more
    )


# Each command imports its modules when it runs, so that `--help` does not import JAX.


def _run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    from benchmarks.suite import runner
    from benchmarks.suite.settings import Settings

    import_seconds = time.perf_counter() - start
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


def _inside_jax(arguments: argparse.Namespace) -> None:
    folder = writable_folder(arguments.results, "--results")
    from benchmarks.demonstrations import inside_jax

    inside_jax.run(folder)


def _observations(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import observations

    observations.run(arguments.results, arguments.cases)


def _large(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import large

    large.run(arguments.results)


def _verdict(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import verdict

    verdict.run(arguments.results, arguments.repeats, arguments.fits)


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


def _peer_embeddings(arguments: argparse.Namespace) -> None:
    from benchmarks.demonstrations import peer_embeddings

    peer_embeddings.run(arguments.results, arguments.tasks)


if __name__ == "__main__":
    sys.exit(main())

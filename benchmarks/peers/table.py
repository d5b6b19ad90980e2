"""Registry of the peer libraries, by their names on the command line.

Public names: `PEERS`, `Peer`, `choose`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import sbi_flows as sf
from benchmarks.peers.contestant import Contestant, Recipe
from benchmarks.peers.flowjax_flow import FlowjaxFlow
from benchmarks.peers.sbi_npe import SbiNPE
from benchmarks.suite.records import BadInput


class Peer(NamedTuple):
    """Peer library: its Python package, and a function that makes its contestant."""

    package: str
    make: Callable[[sf.Prior, Recipe], Contestant]


PEERS: dict[str, Peer] = {"flowjax": Peer("flowjax", FlowjaxFlow), "sbi": Peer("sbi", SbiNPE)}


def choose(names: Sequence[str]) -> dict[str, Peer]:
    """Return the installed peers among the given names; print the other names to stderr.

    Raises:
        BadInput: A name is unknown. The message lists the known names.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        known = ", ".join(PEERS)
        raise BadInput(f"--peer: expected names out of {known}; got {', '.join(unknown)}")
    installed: dict[str, Peer] = {}
    for name in names:
        if importlib.util.find_spec(PEERS[name].package) is not None:
            installed[name] = PEERS[name]
        else:
            print(
                f"peer {name}: not installed, skipped; pip install 'sbi-flows[peers]'",
                file=sys.stderr,
            )
    return installed

"""Damaged and forged files of posteriors, and what happens when they are loaded.

`python -m tests.hostile 10000` loads 10,000 files and prints a summary as JSON.
"""

import copy
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sbi_flows as sf
from sbi_flows.artefact.container import KEY, pack
from tests.artefacts import opened

NASTY: list[Any] = [
    *(
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "__import__('os')",
        "Film",
        "NSF",
        "Normal",
    ),
    *(None, True, -1, 0, 1, 2, 2**31, 10**18, 0.5, -1e300, "", "x" * 300, [], {}, [[]], {"": 0}),
    *({"type": "os.system", "fields": {"command": "touch pwned"}}, {"tensor": "prior/0"}),
    *({"type": "Independent", "arguments": {}}, {"number": "inf"}, {"constraint": "real"}),
]

RUNS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
    "pickle.",
)
"""Prefixes of audit events that loading a file must never cause."""

Maker = Callable[[random.Random, bytes, dict, dict], bytes]


def flipped(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Change some bytes."""
    spoilt = bytearray(good)
    for _ in range(draw.choice([1, 1, 2, 20])):
        spoilt[draw.randrange(len(good))] = draw.randrange(256)
    return bytes(spoilt)


def cut(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Remove the end of the file, or a part in the middle."""
    first = draw.randrange(len(good))
    last = draw.choice([len(good), draw.randrange(first, len(good) + 1)])
    return good[:first] + good[last:]


def grown(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Append bytes."""
    return good + draw.randbytes(draw.choice([1, 8, 4096]))


def longer_header(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Change the length of the header, up to the largest number."""
    length = draw.choice([0, 1, 2**22, 2**22 + 1, 2**40, 2**64 - 1, draw.randrange(2 * len(good))])
    return length.to_bytes(8, "little") + good[8:]


def wrong_end(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Reverse the byte order of the length of the header, or of the tensors."""
    begin = 8 + int.from_bytes(good[:8], "little")
    if draw.random() < 0.5:
        return good[:8][::-1] + good[8:]
    return good[:begin] + np.frombuffer(good[begin:], np.uint8)[::-1].tobytes()


def edited(draw: random.Random, _: bytes, document: dict, tensors: dict) -> bytes:
    """Replace, remove, add or move values of the document, with a valid hash."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice([1, 1, 1, 3])):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and draw.random() < 0.85:
                place = place[key]
                continue
            kind = draw.random()
            if kind < 0.7:
                place[key] = copy.deepcopy(draw.choice(NASTY))
            elif kind < 0.85:
                del place[key]
            elif isinstance(place, dict):
                place[draw.choice(["extra", "__class__", "type"])] = draw.choice(NASTY)
            else:
                place.append(draw.choice(place))
            break
    return pack(document, tensors)


def bigger(draw: random.Random, _: bytes, document: dict, tensors: dict) -> bytes:
    """Claim sizes that are far larger than the tensors."""
    document = copy.deepcopy(document)
    huge = draw.choice([10**4, 10**6, 2**31 - 1])
    part = document["ensembles"][0]
    settings = part["density"]["fields"]
    name = draw.choice([n for n in settings if isinstance(settings[n], int | list)] or ["width"])
    settings[name] = [huge] * len(settings[name]) if isinstance(settings.get(name), list) else huge
    if draw.random() < 0.3:
        document["observation"] = {"dtype": "float32", "shape": [huge, huge]}
    if draw.random() < 0.3:
        document["prior"]["shapes"][0] = [huge]
    if draw.random() < 0.3:
        part["members"] = huge
    return pack(document, tensors)


def retensored(draw: random.Random, _: bytes, document: dict, tensors: dict) -> bytes:
    """Change a tensor's dtype, shape, name or values, remove it, or add another one."""
    tensors = dict(tensors)
    name = draw.choice(list(tensors))
    array = tensors[name]
    kind = draw.randrange(6)
    if kind == 0:
        kinds = ["float64", "float16", "int32", "bool"]
        tensors[name] = array.astype(draw.choice(kinds))
    elif kind == 1:
        tensors[name] = array[..., None] if array.ndim else array.reshape(1)
    elif kind == 2:
        del tensors[name]
    elif kind == 3:
        tensors[draw.choice(["prior/7", "ensembles/9/x", "../x"])] = tensors.pop(name)
    elif kind == 4:
        tensors["more"] = np.zeros(10 ** draw.randrange(6), np.uint8)
    else:
        odd = draw.choice([np.nan, np.inf, -1e30, 1e-45, 0.0])
        tensors[name] = np.full_like(array, odd, dtype=array.dtype)
    return pack(document, tensors)


def odd_text(draw: random.Random, good: bytes, document: dict, tensors: dict) -> bytes:
    """Insert JSON that is too deep, repeats a key, or holds NaN or a huge number."""
    text = draw.choice(
        [
            "[" * draw.choice([60, 10**5]),
            '{"a":' * 10**4,
            '{"a":1,"a":2}',
            '{"a":NaN}',
            '{"a":-Infinity}',
            '{"a":1e999}',
            '{"a":%s}' % ("9" * draw.choice([30, 10**5])),
            '{"a":"\\ud800"}',
            "[" + "[]," * 10**6 + "[]]",
            "",
            "null",
        ]
    )
    where = draw.randrange(3)
    if where == 0:
        head = text.encode()
    elif where == 1:
        head = json.dumps({"__metadata__": {KEY: text}}).encode()
    else:
        begin = 8 + int.from_bytes(good[:8], "little")
        inner = text.replace("\\", "\\\\").replace('"', '\\"').encode()
        head = good[8:begin].replace(b'"record', b'"x\\":' + inner + b',\\"record', 1)
        return len(head).to_bytes(8, "little") + head + good[begin:]
    return len(head).to_bytes(8, "little") + head


MAKERS: tuple[Maker, ...] = (
    *(flipped, cut, grown, longer_header, wrong_end, odd_text, bigger),
    *(edited, edited, edited, retensored, retensored),
)


class Attack:
    """Source of damaged and forged files, made from a valid one.

    Attributes:
        good: Bytes of the valid file.
    """

    def __init__(self, path: Path) -> None:
        """Read the valid file."""
        self.good, self.parts = path.read_bytes(), opened(path)

    def make(self, seed: int) -> bytes:
        """Return the bytes of a damaged or forged file; equal seeds give equal bytes."""
        draw = random.Random(seed)
        return draw.choice(MAKERS)(draw, self.good, *copy.copy(self.parts))


def outcome(path: Path) -> str:
    """Load a file and return "loaded", "refused" or "net"; any error but ArtefactError is raised.

    "net" means that no check of the library refused the file, only the handler of all other errors.
    """
    try:
        sf.load(path)
    except sf.ArtefactError as error:
        return "net" if "describes no posterior that can be built" in str(error) else "refused"
    return "loaded"


def watched(good: list[Path], count: int) -> dict[str, Any]:
    """Load `count` files; return outcomes, forbidden audit events, and growth of memory in MiB."""
    attacks, seen, ran = [Attack(path) for path in good], Counter(), []
    active = False

    def hook(event: str, arguments: Any) -> None:
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if active and (event.startswith(RUNS) or writes):
            ran.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    for path in good:
        sf.load(path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x.sbif"
        for seed in range(min(100, count)):  # fills the caches of JAX before memory is measured
            target.write_bytes(attacks[seed % len(attacks)].make(10**6 + seed))
            outcome(target)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(count):
            target.write_bytes(attacks[seed % len(attacks)].make(seed))
            active = True
            seen[outcome(target)] += 1
            active = False
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seen": dict(seen), "ran": ran[:5], "grown": (after - before) / unit}


if __name__ == "__main__":
    golden = sorted((Path(__file__).parent / "golden").glob("*.sbif"))
    print(json.dumps(watched(golden, int(sys.argv[1]))))

"""Random invalid values for arrays, priors and stores, for tests of error messages.

`python -m tests.hostile_inputs 1000` tries 1000 values of each kind, and prints how many were
accepted and how many raised an error, as JSON.
"""

import collections
import copy
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import numpyro.distributions as dist

import sbi_flows as sf
from sbi_flows.observations.batches import as_batch

DTYPES: tuple[Any, ...] = (
    *("<f4", ">f4", ">f8", ">i2", "f2", "u1", "i8", "u8", "?", "c8", "O", "U8", "S8", "V4"),
    *("datetime64[s]", "timedelta64[s]", np.longdouble, ml_dtypes.bfloat16),
    *(ml_dtypes.int4, ml_dtypes.float8_e4m3fn, [("a", "f4"), ("b", "f4")]),
)


class Raises:
    """An object that claims to be an array, and cannot be converted to one."""

    shape, ndim, dtype = (5, 3), 2, np.dtype(float)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")

    def __len__(self) -> int:
        return -1


def _nested(levels: int) -> Any:
    found: Any = np.zeros(5)
    for _ in range(levels):
        found = {"a": found}
    return found


def _looped() -> list:
    found: list = []
    found.append(found)
    return found


def _array(draw: random.Random) -> Any:
    """Return an array of a random dtype, shape and byte order, which may hold NaN or infinity."""
    sizes = [5, 3, 1, 0, 4]
    shape = tuple(draw.choice(sizes) for _ in range(draw.choice([0, 1, 1, 2, 2, 2, 2, 3])))
    if draw.random() < 0.5:
        shape = draw.choice([(5, 3), (5,), (3,)])
    rng = np.random.default_rng(draw.randrange(2**32))
    values = rng.normal(size=shape)
    if draw.random() < 0.3 and values.size:
        odd = draw.choice([np.nan, np.inf, -np.inf, 1e300, 1e-300, 2.0**70])
        values.flat[draw.randrange(values.size)] = odd
    with np.errstate(all="ignore"):
        try:
            found = values.astype(np.dtype(draw.choice(DTYPES)))
        except (TypeError, ValueError):
            found = values.astype(object)
    changes: list[Callable[[np.ndarray], Any]] = [
        *(lambda a: a, lambda a: a, lambda a: a[::-1] if a.ndim else a),
        *(np.asfortranarray, lambda a: a.T, lambda a: a.tolist(), list if found.ndim else float),
        lambda a: np.ma.masked_array(a, mask=rng.random(a.shape) < 0.5),
        lambda a: np.broadcast_to(a.reshape(-1)[:1], (draw.choice([5, 2**40]), 3)),
        lambda a: np.broadcast_to(a.reshape(-1)[:1], (5, 2**40)),
        lambda a: jnp.asarray(a),
    ]
    try:
        return draw.choice(changes)(found)
    except (TypeError, ValueError):
        return found


def anything(draw: random.Random, deep: bool = True) -> Any:
    """Return a random array, a tree of arrays, or an object of another kind."""
    kind = draw.random()
    if kind < 0.6:
        return _array(draw)
    if kind < 0.8 and deep:
        names = ["a", "b", "", "../x", "\u00e9\u202e\0", "\ud800", 1, ("a", 1), None]
        parts = {draw.choice(names): anything(draw, False) for _ in range(draw.randrange(4))}
        return draw.choice([dict, dict, lambda d: list(d.values()), collections.UserDict])(parts)
    keys = jax.random.split(jax.random.key(0), 5)
    plain = (None, 3, 1.5, 1j, "abc", b"abc", [], {}, [[1, 2], [3]], [10**400] * 5, {1, 2}, len)
    odd = (Raises(), Raises, iter([1]), range(5), np, keys, float("nan"), memoryview(b"abcde"))
    trees = (_nested(40), _nested(10**5), _looped(), [[_looped()]] * 5, (np.zeros(5), None))
    return draw.choice([*plain, *odd, *trees])


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or "refused" after a clear error; raise any other error."""
    try:
        return call()
    except (sf.SbiFlowsError, jaxtyping.TypeCheckError):  # tests check types at run time
        return "refused"
    except ValueError as error:
        if not re.match(r"[^:]+(: .*)?: expected .*, ?(got|not|rows)", str(error), re.DOTALL):
            raise AssertionError(f"expected `expected ..., got ...` in: {error}") from error
        return "refused"


NASTY: list[Any] = [
    *(None, True, -1, 0, 1, 2, 2**31, 2**62, 10**400, 0.5, -1e300, float("nan"), "", "x" * 300),
    *("../x", "\u00e9\0", [], {}, [[]], {"": 0}, [2**40, 2**40], {"name": "zstd"}, {"name": "os"}),
    *("<f4", ">f4", "float64", "complex64", "object", "big", "datetime64[s]"),
]


class Stores:
    """A valid store, and copies of it with random damage."""

    def __init__(self, folder: Path) -> None:
        """Create the valid store."""
        self.folder = folder
        self.prior = {"rate": dist.LogNormal(0.0, 1.0), "place": dist.Uniform(-1.0, 1.0)}
        self.simulate(folder / "good")
        paths = [p for p in (folder / "good").rglob("*") if p.is_file() and p.name != ".lock"]
        self.files = sorted(p.relative_to(folder / "good") for p in paths)

    def simulate(self, path: Path) -> sf.Simulations:
        """Simulate the missing rows of a store."""
        store = sf.SimulationStore(path, chunk=8)
        return store.simulate(jax.random.key(3), self.prior, _noisy, 24, progress=False)

    def spoilt(self, seed: int) -> Path:
        """Return a damaged copy, which replaces the previous one."""
        draw, path = random.Random(seed), self.folder / "spoilt"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / "good", path)
        documents = [f for f in self.files if f.name == "zarr.json"]
        first, second = (path / draw.choice(self.files) for _ in range(2))
        content, kind = bytearray(first.read_bytes()), draw.randrange(8)
        if kind == 0:
            first.write_bytes(content[: draw.randrange(len(content) + 1)])
        elif kind == 1:
            content[draw.randrange(len(content))] = draw.randrange(256)
            first.write_bytes(content)
        elif kind == 2:
            first.unlink()
        elif kind == 3:
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        else:
            first = path / draw.choice(documents)
            first.write_text(json.dumps(_edited(draw, json.loads(first.read_text()))))
        return path

    def read(self, path: Path) -> sf.Simulations:
        """Read all files of a store."""
        store = sf.SimulationStore(path)
        sims = store.simulations()
        for column in jax.tree.leaves(sims.x):
            column[:]
        assert repr(store.failures()) and repr(store)
        store.verify()
        return sims


def _noisy(key: Any, theta: Any) -> Any:
    noise = jax.random.normal(key, (3,))
    return {"curve": theta["rate"] + noise, "size": theta["place"] + jnp.sum(noise)}


def _edited(draw: random.Random, document: Any) -> Any:
    """Return a JSON document with a value replaced, removed or added."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return document
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and draw.random() < 0.8:
            place = place[key]
        elif draw.random() < 0.75:
            place[key] = copy.deepcopy(draw.choice(NASTY))
            return document
        elif isinstance(place, dict) and draw.random() < 0.5:
            place["extra"] = draw.choice(NASTY)
            return document
        else:
            del place[key]
            return document


def _calls(stores: Stores, seed: int) -> list[Callable[[], Any]]:
    good, prior = np.ones((5, 3), np.float32), sf.as_prior(dist.Normal(0.0, 1.0).expand([3]))
    names, value = ("theta", "x", "valid", "round"), anything(random.Random(seed))
    fields = {"theta": good, "x": good, names[seed % 4]: value}
    spoilt = stores.spoilt(seed)
    return [
        lambda: sf.Simulations(**fields),
        lambda: sf.Simulations(good, good)[value],
        lambda: as_batch(value, jax.ShapeDtypeStruct((3,), jnp.float32)),
        lambda: prior.contains(value),
        lambda: sf.as_prior(value),
        lambda: stores.read(spoilt),
        lambda: stores.simulate(spoilt),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        stores, seen = Stores(Path(name)), collections.Counter()
        for seed in range(int(sys.argv[1])):
            for call in _calls(stores, seed):
                found = outcome(call)
                seen["refused" if isinstance(found, str) else "accepted"] += 1
    print(json.dumps(seen))

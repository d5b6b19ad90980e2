"""JSON from a source that is not trusted: bounded, and with one meaning only.

Public names: `parse`, `written`, `fields`, `checked`, `counted`, `number`, `items`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

from sbi_flows.core.errors import ArtefactError

DEEPEST = 48
"""Lists and objects within each other, at the most."""

LONGEST = 20
"""Digits of a whole number, at the most."""

T = TypeVar("T")

# possessive: what could be tried again would be held for each character
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)

_HALVES = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str, name: str) -> Any:
    """What the text says.

    Raises:
        ArtefactError: It is no JSON, or it names a key twice, nests too deeply, or holds NaN,
            infinity, a number with too many digits or half a character.

    Example:
        >>> parse('{"a": [1, 2.5, null]}', "document")
        {'a': [1, 2.5, None]}
        >>> parse('{"a": 1, "a": 2}', "document")
        Traceback (most recent call last):
        ...
        sbi_flows.core.errors.ArtefactError: document: expected each key once, got 'a' twice
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > DEEPEST:
            raise ArtefactError(f"{name}: expected at most {DEEPEST} levels of nesting, got more")

    def pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ArtefactError(f"{name}: expected each key once, got {key!r} twice")
            found[key] = value
        return found

    def whole(digits: str) -> int:
        if len(digits) > LONGEST:
            raise ArtefactError(f"{name}: expected numbers of at most {LONGEST} digits, got more")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ArtefactError(f"{name}: expected finite numbers, got {digits[:LONGEST]}")
        return value

    def constant(word: str) -> NoReturn:
        raise ArtefactError(f"{name}: expected finite numbers, got {word}")

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=whole,
            parse_float=real,
            parse_constant=constant,
        )
        if _HALVES.search(text):  # a pair of these may be a character, one of them is none
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{name}: expected JSON, got {error}") from None
    return value


def written(value: Any) -> str:
    """The text of plain data, in one form only."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def fields(name: str, value: Any, *expected: str) -> tuple:
    """The values of an object that has these keys and no others, in this order."""
    value = checked(name, value, dict, "an object")
    if set(value) != set(expected):
        got = sorted(value)[:10]
        raise ArtefactError(f"{name}: expected the keys {sorted(expected)}, got {got}")
    return tuple(value[key] for key in expected)


def checked(name: str, value: Any, kind: type[T], wanted: str) -> T:
    """The value, if it is of this kind; a truth value is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ArtefactError(f"{name}: expected {wanted}, got {_short(value)}")
    return value


def counted(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds."""
    value = checked(name, value, int, "a whole number")
    if not least <= value <= most:
        raise ArtefactError(f"{name}: expected a number from {least} to {most}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtefactError(f"{name}: expected a number, got {_short(value)}")
    return value


def items(name: str, value: Any, most: int) -> list:
    """A list of limited length."""
    value = checked(name, value, list, "a list")
    if len(value) > most:
        raise ArtefactError(f"{name}: expected at most {most} entries, got {len(value)}")
    return value


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."

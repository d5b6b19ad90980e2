"""JSON from untrusted files: limited in size and depth, and unambiguous.

Functions named `expect_...` return a value of the expected type, or raise ArtefactError.

Public names: `parse_json`, `to_json`, `expect_fields`, `expect_type`, `expect_integer`,
`expect_number`, `expect_list`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

from sbi_flows.core.errors import ArtefactError

MAX_DEPTH = 48
"""Maximum nesting of lists and objects."""

MAX_DIGITS = 20
"""Maximum number of digits of an integer."""

T = TypeVar("T")

# possessive quantifiers, as backtracking would need memory for each character
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)

_SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, name: str) -> Any:
    """Parse JSON.

    Args:
        text: The JSON text.
        name: Name of the part of the file, for error messages.

    Raises:
        ArtefactError: The text is not JSON, or it repeats a key, nests too deeply, or holds NaN,
            infinity, an integer with too many digits or half of a surrogate pair.

    Example:
        >>> parse_json('{"a": [1, 2.5, null]}', "document")
        {'a': [1, 2.5, None]}
        >>> parse_json('{"a": 1, "a": 2}', "document")
        Traceback (most recent call last):
        ...
        sbi_flows.core.errors.ArtefactError: document: expected each key once, got 'a' twice
    """
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise ArtefactError(f"{name}: expected at most {MAX_DEPTH} levels of nesting, got more")

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for key, value in pairs:
            if key in parsed:
                raise ArtefactError(f"{name}: expected each key once, got {key!r} twice")
            parsed[key] = value
        return parsed

    def to_integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ArtefactError(
                f"{name}: expected numbers of at most {MAX_DIGITS} digits, got more"
            )
        return int(digits)

    def to_float(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ArtefactError(f"{name}: expected finite numbers, got {digits[:MAX_DIGITS]}")
        return value

    def refuse(word: str) -> NoReturn:
        raise ArtefactError(f"{name}: expected finite numbers, got {word}")

    try:
        value = json.loads(
            text,
            object_pairs_hook=to_object,
            parse_int=to_integer,
            parse_float=to_float,
            parse_constant=refuse,
        )
        if _SURROGATES.search(text):  # two may encode one character, a single one is invalid
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{name}: expected JSON, got {error}") from None
    return value


def to_json(value: Any) -> str:
    """Convert plain data to JSON text; equal data give the same text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def expect_fields(name: str, value: Any, *expected: str) -> tuple:
    """Return the values of an object that has exactly the expected keys, in their order."""
    value = expect_type(name, value, dict, "an object")
    if set(value) != set(expected):
        got = sorted(value)[:10]
        raise ArtefactError(f"{name}: expected the keys {sorted(expected)}, got {got}")
    return tuple(value[key] for key in expected)


def expect_type(name: str, value: Any, kind: type[T], wanted: str) -> T:
    """Return a value of a type; a boolean is not an integer.

    Args:
        name: Name of the value, for the error message.
        value: The value.
        kind: The expected type.
        wanted: The expected type in words.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ArtefactError(f"{name}: expected {wanted}, got {_short(value)}")
    return value


def expect_integer(name: str, value: Any, least: int, most: int) -> int:
    """Return an integer from `least` to `most`."""
    value = expect_type(name, value, int, "a whole number")
    if not least <= value <= most:
        raise ArtefactError(f"{name}: expected a number from {least} to {most}, got {value}")
    return value


def expect_number(name: str, value: Any) -> float:
    """Return an integer or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtefactError(f"{name}: expected a number, got {_short(value)}")
    return value


def expect_list(name: str, value: Any, most: int) -> list:
    """Return a list of at most `most` entries."""
    value = expect_type(name, value, list, "a list")
    if len(value) > most:
        raise ArtefactError(f"{name}: expected at most {most} entries, got {len(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

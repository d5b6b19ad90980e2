"""Strict parser for JSON from untrusted files.

The parser limits nesting and numbers, and rejects ambiguous JSON. Functions with names `expect_...`
check the type of a value; they return the value or raise ArtefactError.

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

# possessive quantifiers avoid backtracking, which would need memory for each character
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)

_SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, name: str) -> Any:
    """Parse JSON.

    Args:
        text: The JSON text.
        name: Name of the part of the file, for error messages.

    Raises:
        ArtefactError: The text is not JSON, an object repeats a key, the nesting is too deep, or
            the text contains NaN, infinity, an integer with too many digits or half of a surrogate
            pair.

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
        if _SURROGATES.search(text):  # a pair encodes one character; a single one is invalid
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{name}: expected JSON, got {error}") from None
    return value


def to_json(value: Any) -> str:
    """Convert JSON data to text. Equal data always give the same text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def expect_fields(name: str, value: Any, *expected: str) -> tuple:
    """Check that a JSON object has exactly the expected keys; return its values in this order."""
    value = expect_type(name, value, dict, "an object")
    if set(value) != set(expected):
        got = sorted(value)[:10]
        raise ArtefactError(f"{name}: expected the keys {sorted(expected)}, got {got}")
    return tuple(value[key] for key in expected)


def expect_type(name: str, value: Any, kind: type[T], wanted: str) -> T:
    """Check that a value has the expected type, and return it. Booleans do not count as integers.

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
    """Check that a value is an integer from `least` to `most`, and return it."""
    value = expect_type(name, value, int, "a whole number")
    if not least <= value <= most:
        raise ArtefactError(f"{name}: expected a number from {least} to {most}, got {value}")
    return value


def expect_number(name: str, value: Any) -> float:
    """Check that a value is an integer or a float, and return it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtefactError(f"{name}: expected a number, got {_short(value)}")
    return value


def expect_list(name: str, value: Any, most: int) -> list:
    """Check that a value is a list of at most `most` entries, and return it."""
    value = expect_type(name, value, list, "a list")
    if len(value) > most:
        raise ArtefactError(f"{name}: expected at most {most} entries, got {len(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

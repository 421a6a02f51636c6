"""What files of our own formats must hold: a kind of value for each key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

DEEPEST = 32
"""Levels of lists and objects, of which our formats have six."""


class Kind(NamedTuple):
    """What a value must be."""

    words: str
    holds: Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """Return whether a value is a number of things that a computer can hold."""
    return type(value) is int and 0 <= value < 2**48


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that is neither infinite nor NaN."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Return whether a value is a string, without halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


TEXT = Kind("a string", is_text)
COUNT = Kind("a whole number of at least 0", is_count)
INTEGER = Kind("a whole number", lambda value: type(value) is int and abs(value) < 2**64)
NUMBER = Kind("a finite number", is_finite)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def optional(kind: Kind) -> Kind:
    """Return the kind that also takes null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind, n_items: int | None = None) -> Kind:
    """Return the kind of lists of a kind, of any length or of one."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and n_items in (None, len(value)) and all(map(kind.holds, value))

    return Kind(f"a list of {kind.words} each", holds)


def object_of(kind: Kind) -> Kind:
    """Return the kind of objects whose values are of a kind."""
    return Kind(
        f"an object with {kind.words} under each key",
        lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())),
    )


def one_of(values: Collection[Any]) -> Kind:
    """Return the kind that is one of some strings."""
    return Kind(f"one of {', '.join(map(str, values))}", lambda value: isinstance(value, str) and value in values)


def parse_json(text: str | bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: If it is none, or nested deeper than any of our formats.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    check_depth(content)
    return content


def check_depth(content: Any, level: int = 0) -> None:
    """Check that nothing is nested deeper than any of our formats."""
    if level > DEEPEST:
        raise ValueError("lists or objects are nested too deeply")
    items = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for item in items:
        check_depth(item, level + 1)


def check_fields(content: Any, fields: Mapping[str, Kind], within: str = "") -> None:
    """Check that an object has every field, each of its kind.

    Raises:
        ValueError: If not, with the name of the first field that is wrong.

    Example:
        >>> check_fields({"steps": "3"}, {"steps": COUNT}, within="run ")
        Traceback (most recent call last):
        ValueError: run steps must be a whole number of at least 0
    """
    if not isinstance(content, dict):
        raise ValueError(f"{within.strip() or 'the whole'} must be an object")
    for name, kind in fields.items():
        if name not in content or not kind.holds(content[name]):
            raise ValueError(f"{within}{name} must be {kind.words}")

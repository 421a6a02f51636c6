"""The fields of an example: which of them are meant, and whether they can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LEARNED = "learned_characters"
"""The key beside a ``text`` under which it stands which of its characters are learned; of a plain text, all are."""
WANTED = 'a line needs "text", a string, or "input_ids", a list of token ids'
OTHERS = '(or "prompt" with "completion", or "messages")'


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return which texts an example has: ``text``, ``completion`` (behind a prompt) or ``messages``.

    Raises:
        ValueError: If it has none, more than one, or one that is no string.

    Example:
        >>> kind_of({"prompt": "1+1=", "completion": "2", "id": 7})
        'completion'
    """
    kinds = [kind for kind in ("text", "completion", "messages") if kind in fields]
    if not kinds:
        content = '"prompt" comes without "completion"' if "prompt" in fields else f"its fields are {sorted(fields)}"
        raise ValueError(f"{WANTED}; {content} {OTHERS}")
    if len(kinds) > 1:
        raise ValueError(f'there are "{kinds[0]}" and "{kinds[1]}": which is meant? Leave one of them out')
    kind = kinds[0]
    if kind == "completion" and "prompt" not in fields:
        raise ValueError(f'{WANTED}; "completion" comes without "prompt" {OTHERS}')
    strings = {"text": ("text",), "completion": ("prompt", "completion"), "messages": ()}
    for name in strings[kind]:
        if not isinstance(fields[name], str):
            raise ValueError(f'{WANTED}; "{name}" is {json_excerpt(fields[name])}')
    return kind


def check_encodable(name: str, text: str) -> None:
    """Check that no character is half of a surrogate pair, which is none.

    Raises:
        ValueError: If one is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{name}" holds half of a surrogate pair at character {error.start}: mend it') from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for `json.loads`, in which no key stands twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json_excerpt(twice)} stands twice in one object: which is meant?")
    return fields


def json_excerpt(value: Any, length: int = 60) -> str:
    """Return the beginning of a value's JSON."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= length else text[:length] + "…"

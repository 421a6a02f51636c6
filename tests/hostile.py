"""Hostile files: what a stranger, a bad disk or an editor makes of a sound one, drawn by a generator with a seed."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE: list[Any] = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "\x1b[2J", "../..", [], [[]], {}, {"a": []}]


def mutated_json(text: str, chance: random.Random) -> str:
    """A document with one value replaced or removed, or bytes of it changed, or nested without end."""
    kind = chance.randrange(8)
    if kind == 0:
        return text[: chance.randrange(len(text))]
    if kind == 1:
        place = chance.randrange(len(text))
        return text[:place] + chance.choice('{}[]",:0x\0') + text[place + 1 :]
    if kind == 2:
        return '{"format": ' + "[" * 10**5
    content = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(content)
    owner, key = chance.choice(places)
    if chance.random() < 0.3:
        del owner[key]
    else:
        owner[key] = chance.choice(HOSTILE)
    return json.dumps(content)


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """A file cut, or with bytes of its header or its data changed."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(min(len(data), 1500))] = chance.randrange(256)
    return bytes(changed)


def survives(read: Callable[[], object]) -> None:
    """Reads a hostile file: our error or none, in bounded time."""
    since = time.monotonic()
    said = "damaged"
    try:
        read()
    except ValueError as error:
        said = str(error)
    assert re.search("damaged|not a saved|says|different runs|newer|not finite|written for another", said), said
    assert time.monotonic() - since < 10


def mutated_text(text: str, chance: random.Random) -> str:
    """A text cut, or with a few characters replaced, removed or repeated."""
    if chance.random() < 0.1:
        return text[: chance.randrange(len(text))]
    changed = list(text)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(changed))
        changed[place] = chance.choice(["", changed[place] * 3, *"\"\\',;\t\r\n\0{}[]:", "\ufeff", "\x1b", "9" * 400])
    return "".join(changed)


def mutated_anywhere(data: bytes, chance: random.Random) -> bytes:
    """A file cut, or with bytes changed at its beginning, its end or anywhere."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    start = chance.choice([0, max(0, len(data) - 1500), chance.randrange(len(data))])
    for _ in range(chance.randrange(1, 4)):
        changed[min(start + chance.randrange(1500), len(data) - 1)] = chance.randrange(256)
    return bytes(changed)


def is_refused(read: Callable[[], object], file: Path) -> bool:
    """Whether a hostile file is refused: by an error that names it or its folder; any answer comes in bounded time."""
    since = time.monotonic()
    said = None
    try:
        read()
    except (ValueError, OSError) as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} {error} of {file.read_bytes()[:500]!r}") from error
    assert time.monotonic() - since < 10
    assert said is None or file.name in said or str(file.parent) in said, (said, file.read_bytes()[:500])
    return said is not None

"""What an index is of: everything its rows depend on, as JSON that a person can read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from captum_sdi.schema import COUNT, NUMBER, OBJECT, TEXT, Kind, check_fields, list_of, one_of, optional, parse_json
from captum_sdi.whole_file import write_whole

NAME, RATE = "manifest.json", "learning rate"
_FORMAT = {"format": "captum_sdi.SketchIndex", "format_version": 2}


class ParameterColumns(NamedTuple):
    """Which columns of a row belong to a parameter."""

    name: str
    """The parameter's, or that of the row which all parameters share."""
    width: int
    """How many columns; they follow those of the parameter before."""
    variance: float
    """As `captum_sdi.features.Noise.variance`."""
    parts: int
    """As `captum_sdi.features.Noise.parts`."""


@dataclass
class Manifest:
    """The content of ``manifest.json``."""

    settings: dict[str, Any]
    """What the rows of every checkpoint depend on, by the words of an error message."""
    dtype: str
    """In which rows are stored."""
    rows: list[ParameterColumns]
    """The columns, in order."""
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: a hash of the weights, one of the hash tables, the learning rate."""
    examples: int | None = None
    """How many train examples there are, once a pass has counted them."""
    fingerprint: str | None = None
    """A hash of their content."""

    def __post_init__(self) -> None:
        self.rows = [ParameterColumns(*columns) for columns in self.rows]  # JSON has lists

    @property
    def width(self) -> int:
        """Numbers per example and checkpoint, D."""
        return sum(columns.width for columns in self.rows)

    def owner(self, checkpoint: str) -> str:
        """Return a digest of everything a checkpoint's rows depend on; each of its shards carries it.

        Args:
            checkpoint: Its name.
        """
        identity = dict(self.checkpoints[checkpoint])
        identity.pop(RATE, None)  # no row depends on it
        text = json.dumps([self.settings, self.dtype, checkpoint, identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        text = json.dumps({**_FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        write_whole(folder / NAME, lambda unfinished: unfinished.write_text(f"{text}\n", encoding="utf-8"))

    @staticmethod
    def load(folder: Path) -> Manifest | None:
        """Read it.

        Args:
            folder: The index's.

        Returns:
            The manifest, or None when there is none.

        Raises:
            ValueError: If it is damaged, or that of another format.
        """
        file = folder / NAME
        if not file.is_file():
            return None
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
            check_fields(content, {"format": TEXT, "format_version": COUNT})
            stored_format = {key: content.pop(key) for key in _FORMAT}
            if stored_format == _FORMAT:
                check_content(content)
                return Manifest(**content)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Remove it: the next build writes it anew and keeps every shard that "
                "belongs to the model, checkpoints and settings it is given."
            ) from error
        raise ValueError(
            f"{file} says {stored_format}, this version of captum_sdi reads {_FORMAT}. Pass another folder."
        )


def check_content(content: dict[str, Any]) -> None:
    """Check every field of a manifest that is read."""
    check_fields(content, _FIELDS)
    if not sum(width for _, width, _, _ in content["rows"]):
        raise ValueError("rows must have columns")
    check_fields(content["settings"], _SETTINGS, within="settings ")
    check_fields(content["settings"]["sketch"], {"kind": TEXT}, within="settings sketch ")
    check_fields(content["settings"]["loop"], {"modules": list_of(TEXT)}, within="settings loop ")
    for name, checkpoint in content["checkpoints"].items():
        check_fields({"name": name}, {"name": TEXT}, within="checkpoint ")
        check_fields(checkpoint, {RATE: NUMBER}, within=f"checkpoint {name!r} ")


def differences(
    stored: Any,
    live: Any,
    name: str = "",
    places: tuple[str, str] = ("in the index", "here"),
) -> list[str]:
    """Say in words where an index and a model differ.

    Args:
        stored: The index's part of the manifest.
        live: What it would be now.
        name: What the two are called.
        places: Where each is.

    Returns:
        One line for each difference.

    Example:
        >>> differences({"dim": 64, "seed": 0}, {"dim": 32, "seed": 0}, "sketch")
        ['sketch dim: 64 in the index, 32 here']
    """
    if isinstance(stored, dict) and isinstance(live, dict):
        lines = []
        for key in dict.fromkeys([*stored, *live]):
            key_name = f"{name} {key}".strip()
            lines += differences(stored.get(key), live.get(key), key_name, places)
        return lines
    if stored == live:
        return []
    return [f"{name}: {shortened(stored)} {places[0]}, {shortened(live)} {places[1]}"]


def shortened(value: Any) -> str:
    """Write a value in at most 80 characters, and of a hash the first eight digits."""
    text = "none" if value is None else str(value)
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        return f"{text[:8]}..."
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_columns(value: Any) -> bool:
    kinds = (TEXT, COUNT, NUMBER, COUNT)
    return isinstance(value, list) and len(value) == 4 and all(map(lambda kind, each: kind.holds(each), kinds, value))


_FIELDS = {
    "settings": OBJECT,
    "dtype": one_of(("float64", "float32", "float16", "bfloat16")),
    "rows": list_of(Kind("a name, a width, a variance and a number of parts", _is_columns)),
    "checkpoints": OBJECT,
    "examples": optional(COUNT),
    "fingerprint": optional(TEXT),
}
_SETTINGS = {"captum_sdi": TEXT, "sketch": OBJECT, "parameters": OBJECT, "loop": OBJECT, "loss": TEXT}

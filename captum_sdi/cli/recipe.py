"""What an index was made of: ``command.json`` in its folder, so that it can be scored without saying it all again."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from captum_sdi.cli.options import DTYPES
from captum_sdi.schema import (
    COUNT,
    FLAG,
    INTEGER,
    NUMBER,
    TEXT,
    Kind,
    check_fields,
    is_count,
    list_of,
    one_of,
    optional,
    parse_json,
)
from captum_sdi.whole_file import write_whole

NAME = "command.json"
HEADER = {"format": "captum_sdi.command", "format_version": 1}

PATHS = ("model", "checkpoints", "train", "tokenizer")
"""Options that say where something is; it may move."""
COSTS = ("batch_size", "activation_checkpointing")
"""Options that change no number."""
NOT_COMPARED = {*PATHS, *COSTS, "trust_remote_code", "train_digest"}


@dataclass(frozen=True)
class Recipe:
    """The options of ``captum-sdi index`` that scoring needs to know."""

    model: str
    train: tuple[str, ...]
    checkpoints: tuple[str, ...] | None
    tokenizer: str | None
    max_length: int | None
    special_tokens: bool
    loop: tuple[str, ...] | None
    loop_layers: tuple[int, int, int] | None
    damping: float
    n_loops: int | None
    dtype: str
    trust_remote_code: bool
    layers: tuple[str, ...]
    dim: int
    seed: int
    pool: bool
    index_dtype: str | None
    batch_size: int | Literal["auto"] | None
    activation_checkpointing: bool
    train_digest: str | None = None
    split: str | None = None
    text_column: str | None = None
    loop_mode: str = "block"
    anchor: float = 0.0

    @staticmethod
    def from_options(options: Namespace) -> Recipe:
        """Return the recipe that was typed, its local paths absolute."""
        settings = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Recipe)}
        for name in PATHS:
            settings[name] = map_paths(absolute_path, settings[name])
        return Recipe.from_settings(settings)

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe of settings that argparse or JSON gave, which have lists for tuples."""
        frozen = dict(settings)
        for name, value in settings.items():
            if isinstance(value, list):
                frozen[name] = tuple(value)
        if isinstance(frozen["train"], str):  # one file, as indexes were written before there could be more
            frozen["train"] = (frozen["train"],)
        return Recipe(**frozen)

    @staticmethod
    def read(folder: Path, **moved: Any) -> Recipe | None:
        """Read the recipe in an index's folder, if there is one.

        Paths in `moved` that are not None say where things are now. The others are found beside the index, if they
        moved together with it, or where they were.

        Returns:
            The recipe; None when the folder has none.

        Raises:
            ValueError: If it is damaged, or of another version.
        """
        file = folder / NAME
        if not file.is_file():
            return None
        try:
            settings = parse_json(file.read_text(encoding="utf-8"))
            check_fields(settings, HEADER_FIELDS)
            settings = {**LATER, **settings}
            header = {key: settings.pop(key, None) for key in HEADER}
            if header != HEADER:
                raise ValueError(f"{header} instead of {HEADER}")
            check_fields(settings, FIELDS)
            locate = partial(located_path, folder)
            for name in PATHS:
                settings[name] = map_paths(locate, settings[name])
            for name, path in moved.items():
                if path is not None:
                    settings[name] = map_paths(absolute_path, path)
            return Recipe.from_settings(settings)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged, or of another version of captum_sdi: {error}. Remove it and run captum-sdi index "
                "again, as it was run, which writes it anew and keeps the index."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the recipe into an index's folder, whole or not at all."""
        settings = {**HEADER, **dataclasses.asdict(self)}
        store = partial(stored_path, folder)
        for name in PATHS:
            settings[name] = map_paths(store, settings[name])
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / NAME, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    def differences(self, other: Recipe) -> list[str]:
        """Return every difference that changes a number, in the words of the command line."""
        differences = []
        for field in dataclasses.fields(self):
            name = field.name
            own_value, other_value = getattr(self, name), getattr(other, name)
            if name not in NOT_COMPARED and own_value != other_value:
                differences.append(f"{as_typed(name, own_value)}, not {as_typed(name, other_value)}")
        return differences


def is_place(value: Any) -> bool:
    """Return whether a value of JSON says where something is."""
    is_pair = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("from here", "absolute"))
    texts = value.values() if is_pair else [value]
    return all(isinstance(text, str) and "\0" not in text for text in texts)


PLACE = Kind("a path", is_place)
HEADER_FIELDS = {"format": TEXT, "format_version": COUNT}
LATER = {"split": None, "text_column": None, "loop_mode": "block", "anchor": 0.0}
"""What an index says that was written before these options were."""
FIELDS = {
    "model": PLACE,
    "train": Kind("a path, or a list of paths", lambda value: is_place(value) or list_of(PLACE).holds(value)),
    "checkpoints": optional(list_of(PLACE)),
    "tokenizer": optional(PLACE),
    "max_length": optional(COUNT),
    "special_tokens": FLAG,
    "split": optional(TEXT),
    "text_column": optional(TEXT),
    "loop": optional(list_of(TEXT)),
    "loop_layers": optional(list_of(INTEGER, 3)),
    "damping": NUMBER,
    "loop_mode": one_of(("block", "layer")),
    "anchor": NUMBER,
    "n_loops": optional(COUNT),
    "dtype": one_of(("auto", *DTYPES)),
    "trust_remote_code": FLAG,
    "layers": list_of(TEXT),
    "dim": COUNT,
    "seed": INTEGER,
    "pool": FLAG,
    "index_dtype": optional(one_of(DTYPES)),
    "batch_size": Kind(
        "a whole number, auto or null", lambda value: value is None or value == "auto" or is_count(value)
    ),
    "activation_checkpointing": FLAG,
}
"""What JSON holds of each option."""


def map_paths(change: Callable[[Any], Any], paths: Any) -> Any:
    """Change one path, or each path of a list; None, where no path was given, stays."""
    if paths is None:
        return None
    if isinstance(paths, list | tuple):
        return [change(path) for path in paths]
    return change(paths)


def absolute_path(path: Any) -> str:
    """Return a local path as an absolute one; anything else may be a name on the Hub."""
    return os.path.abspath(path) if os.path.exists(path) else str(path)


def seen_from_here(path: Path) -> Path:
    """Return an absolute path as messages should name it: from the working folder, where it lies in it."""
    working_folder = Path.cwd()
    return path.relative_to(working_folder) if path.is_relative_to(working_folder) else path


def stored_path(folder: Path, path: str) -> Any:
    """Return a path both from the index's folder and from the root; a name on the Hub as it is."""
    if not os.path.isabs(path):
        return path
    return {"from here": os.path.relpath(path, folder.absolute()), "absolute": path}


def located_path(folder: Path, stored: Any) -> str:
    """Return where a stored path leads: beside the index, if it moved with it, or where it was."""
    if isinstance(stored, str):
        return stored
    moved_path = os.path.normpath(folder.absolute() / stored["from here"])
    return moved_path if os.path.exists(moved_path) else stored["absolute"]


def as_typed(name: str, value: Any) -> str:
    """Return an option as it is typed."""
    if name == "special_tokens":
        return "special tokens" if value else "--no-special-tokens"
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {option}"
    if value is True:
        return option
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([option, *map(str, values)])

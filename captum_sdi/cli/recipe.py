"""What an index was made of: ``command.json`` in its folder, so that it can be scored without saying it all again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAME = "command.json"
_FORMAT = {"format": "captum_sdi.command", "format_version": 1}

_PLACES = ("model", "checkpoints", "train", "tokenizer")
"""Where things are; they may move."""
_COSTS = ("batch_size", "activation_checkpointing")
"""What changes no number."""


@dataclass(frozen=True)
class Recipe:
    """The options of ``captum-sdi index`` that scoring needs to know."""

    model: str
    train: str
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

    @staticmethod
    def of(options: argparse.Namespace) -> Recipe:
        """The recipe that was typed.

        Args:
            options: Of ``captum-sdi index``.

        Returns:
            The recipe, its local paths absolute.
        """
        given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Recipe)}
        given |= {name: _each(given[name], _absolute) for name in _PLACES}
        return Recipe(**{name: _frozen(value) for name, value in given.items()})

    @staticmethod
    def read(folder: Path, **moved: Any) -> Recipe | None:
        """The recipe of an index.

        Args:
            folder: The index's.
            **moved: Where things are now, if not None; anything else is found beside the index as it was then, or
                where it was.

        Returns:
            The recipe; None when the folder has none.

        Raises:
            ValueError: It is damaged, or of another version.
        """
        file = folder / NAME
        if not file.is_file():
            return None
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            found = {key: said.pop(key, None) for key in _FORMAT}
            if found != _FORMAT:
                raise ValueError(f"{found} instead of {_FORMAT}")
            places = {name: said.pop(name) for name in _PLACES}
            here = {name: _each(place, lambda one: _found(one, folder)) for name, place in places.items()}
            here |= {name: _each(place, _absolute) for name, place in moved.items() if place is not None}
            return Recipe(**{name: _frozen(value) for name, value in {**said, **here}.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged, or of another version of captum_sdi: {error}. Remove it and run captum-sdi index "
                "again, as it was run, which writes it anew and keeps the index."
            ) from error

    def write(self, folder: Path) -> None:
        """Writes the recipe into an index's folder, whole or not at all.

        Args:
            folder: The index's.
        """
        said = {**_FORMAT, **dataclasses.asdict(self)}
        said |= {name: _each(said[name], lambda one: _place(one, folder)) for name in _PLACES}
        unfinished = folder / f"{NAME}.unfinished"
        unfinished.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / NAME)

    def differences(self, other: Recipe) -> list[str]:
        """What another recipe says otherwise, in the words of the command line.

        Args:
            other: The other one.

        Returns:
            One entry per option that changes a number.
        """
        free = {*_PLACES, *_COSTS, "trust_remote_code", "train_digest"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in free]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{_typed(name, ours)}, not {_typed(name, theirs)}" for name, ours, theirs in pairs if ours != theirs]


def _frozen(value: Any) -> Any:
    """An option as a recipe holds it: a list as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else value


def _absolute(place: Any) -> str:
    """A path that exists as an absolute one; anything else may be a name on the Hub."""
    return os.path.abspath(place) if isinstance(place, Path) or os.path.exists(place) else place


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(one) for one in value] if isinstance(value, list | tuple) else value and change(value)


def _place(path: str, folder: Path) -> Any:
    """A path from the index's folder and from the root; a name on the Hub as it is."""
    if not os.path.isabs(path):
        return path
    return {"from here": os.path.relpath(path, folder.absolute()), "absolute": path}


def _found(place: Any, folder: Path) -> str:
    """Where it is now, or was: things that moved together with the index are found beside it."""
    if isinstance(place, str):
        return place
    beside = os.path.normpath(folder.absolute() / place["from here"])
    return beside if os.path.exists(beside) else place["absolute"]


def _typed(name: str, value: Any) -> str:
    """An option as it is typed."""
    if name == "special_tokens":
        return "special tokens" if value else "--no-special-tokens"
    option = f"--{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return option if value else f"no {option}"
    return f"{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

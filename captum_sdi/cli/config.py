"""Runs that can be repeated: ``run.json`` beside what a command wrote, and ``--config``, which reads it again.

Imports nothing that takes time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import captum_sdi
from captum_sdi.cli.parser import COMMANDS
from captum_sdi.schema import COUNT, FLAG, OBJECT, TEXT, Kind, check_fields, is_finite, is_text, list_of, parse_json
from captum_sdi.whole_file import check_regular, write_whole

RUN = "run.json"
HEADER = {"format": "captum_sdi.run", "format_version": 1}
FIELDS = {"format": TEXT, "format_version": COUNT, "command": TEXT, "options": OBJECT}
REPEATABLE = ("index", "score")
SAID_ANEW = {"command", "config", "debug", "dry_run", "out", "overwrite", "quiet", "trust_remote_code"}
"""What no file says for its reader: where results go, what may be replaced, whose code is run."""
INSTEAD_OF = {
    "query": {"prompt", "completion"},
    "prompt": {"query", "completion"},
    "completion": {"generate"},
    "generate": {"completion"},
    "opponents": {"both"},
    "both": {"opponents"},
}
"""Which options of a file are forgotten where another one is typed."""
MAY_BE_PATHS = {"model", "checkpoints", "tokenizer"}
"""Options that name a folder, or something on the Hub."""
PACKAGES = ("captum-sdi", "captum", "numpy", "torch", "transformers")
LARGEST = 10_000_000
"""Bytes of a file with options."""


def with_config(words: Sequence[str]) -> list[str]:
    """Return a command line with the options of its ``--config`` before those that were typed, which overrule them.

    Args:
        words: The command and what follows it.

    Returns:
        The same words where none is ``--config``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything but the options of this command.
    """
    file = config_file(words)
    if file is None or words[0] not in REPEATABLE:
        return list(words)
    command, *typed = words
    actions = actions_of(command)
    options = read_options(file, command)
    check_names(file, options, actions)
    forgotten = set()
    for name in typed_names(actions, typed):
        forgotten |= {name, *INSTEAD_OF.get(name, ())}
    replayed = []
    for name, value in options.items():
        if name not in forgotten:
            replayed += option_words(file, actions[name], value)
    return [command, *replayed, *typed]


def config_file(words: Sequence[str]) -> Path | None:
    """Return the file that ``--config`` names."""
    for word, following in pairwise([*words, ""]):
        option, _, file = word.partition("=")
        if option == "--config" and (file or following):
            return Path(file or following)
    return None


def actions_of(command: str) -> dict[str, Action]:
    """Return the options of a command, by their names in a file."""
    parser = ArgumentParser(add_help=False)
    for known in COMMANDS:
        if known.name == command:
            known.add_options(parser)
    return {action.dest: action for action in parser._actions}


def read_options(file: Path, command: str) -> dict[str, Any]:
    """Return the options in a file, which must be of the command."""
    if check_regular(file).st_size > LARGEST:
        raise ValueError(f"--config {file} is larger than any file of options.")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        check_fields(content, FIELDS)
    except ValueError as error:
        raise ValueError(f"--config {file} is damaged, or no {RUN} of captum-sdi: {error}.") from error
    header = {key: content[key] for key in HEADER}
    if header != HEADER:
        raise ValueError(f"--config {file} is of another version of captum-sdi: {header} instead of {HEADER}.")
    if content["command"] != command:
        raise ValueError(f"--config {file} is of captum-sdi {content['command']}, not of captum-sdi {command}.")
    options: dict[str, Any] = content["options"]
    return options


def check_names(file: Path, options: Mapping[str, Any], actions: Mapping[str, Action]) -> None:
    """Check that a file names options of the command, and none that only its reader may say."""
    for name in options:
        if name in SAID_ANEW:
            raise ValueError(f"--config {file} says {name}, which is said on the command line alone.")
        if name not in actions:
            raise ValueError(f"--config {file} names no option of this command: {name}.")


def typed_names(actions: Mapping[str, Action], words: Sequence[str]) -> set[str]:
    """Return the names of the options that were typed."""
    typed = set()
    for word in words:
        if word.startswith("-") and " " not in word:
            typed |= {word.partition("=")[0], word[:2]}
    return {name for name, action in actions.items() if typed.intersection(action.option_strings)}


def option_words(file: Path, action: Action, value: Any) -> list[str]:
    """Return an option as it is typed; nothing where it has its default.

    Raises:
        ValueError: If the value is of a kind that cannot be typed.
    """
    kind = FLAG if action.nargs == 0 else WORD if action.nargs is None else WORDS
    if value is None:
        return []
    if not kind.holds(value):
        raise ValueError(f"--config {file} is damaged: {action.dest} must be {kind.words}, or null.")
    option = action.option_strings[0]
    if value == action.default:
        return []
    if kind is FLAG:
        return [option]
    return [option, *map(str, value)] if kind is WORDS else [f"{option}={value}"]


def is_word(value: Any) -> bool:
    """Return whether a value of JSON can be typed."""
    return is_finite(value) or (is_text(value) and "\0" not in value)


def is_listed_word(value: Any) -> bool:
    """Return whether a value of JSON can be typed among others, where an option would end their list."""
    return is_word(value) and not str(value).startswith("-")


WORD = Kind("a string or a number", is_word)
WORDS = list_of(Kind("a number, or a string that does not begin with a dash,", is_listed_word))


def write_run(options: Namespace, folder: Path) -> None:
    """Write what was asked for into a folder, with the versions and the revision it was asked of.

    A file of that name that holds anything else is left alone.
    """
    file = folder / RUN
    if file.exists():
        try:
            read_options(file, options.command)
        except (OSError, ValueError):
            return
    said = {}
    for name, value in vars(options).items():
        if name not in SAID_ANEW:
            said[name] = as_json(name, value)
    run = {
        **HEADER,
        "command": options.command,
        "options": said,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "revision": revision(Path.cwd()),
        "library_revision": library_revision(),
    }
    text = json.dumps(run, indent=2) + "\n"
    write_whole(file, lambda unfinished: unfinished.write_text(text, encoding="ascii"))


def as_json(name: str, value: Any) -> Any:
    """Return the value of an option as JSON has it, what lies here by its absolute path."""
    if isinstance(value, list | tuple):
        return [as_json(name, item) for item in value]
    if isinstance(value, Path) or name in MAY_BE_PATHS:
        return os.path.abspath(value) if value is not None and os.path.exists(value) else as_text(value)
    return value


def as_text(value: Any) -> str | None:
    """Return a path as text; None stays."""
    return None if value is None else str(value)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that a number may depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def revision(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder; None where git knows of none."""
    command = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def library_revision() -> str | None:
    """Return the commit of this library, where it runs from a checkout of its own."""
    root = Path(captum_sdi.__file__).parents[1]
    return revision(root) if (root / ".git").exists() else None

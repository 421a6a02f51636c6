"""The command line: ``captum-sdi index``, ``score``, ``plot`` and the others, or ``python -m captum_sdi``."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tqdm import tqdm

from captum_sdi import __version__
from captum_sdi.cli.config import with_config
from captum_sdi.cli.parser import build_parser
from captum_sdi.cli.places import check_places
from captum_sdi.cli.shell_words import in_shell_words

ERROR, INTERRUPTED = 1, 130  # what shells expect; argparse itself exits with 2
RESUMED = ("index", "merge")
MODULES = {"view": "viewing", "merge": "merging"}
"""Commands that are not in `captum_sdi.cli.commands`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words behind ``captum-sdi``; None takes those this process was started with.

    Returns:
        0, 1 after an error of one line, or 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with one_line_warnings():
            options = build_parser(__version__).parse_args(with_config(words))
            check_places(options)
            # Imports torch, which --help, wrong usage and a page that is there need not wait for.
            module = import_module(f"captum_sdi.cli.{MODULES.get(options.command, 'commands')}")
            run_command = getattr(module, options.command)
            run_command(options)
    except KeyboardInterrupt:
        advice = ": the same command goes on from here" if words and words[0] in RESUMED else ""
        print_message(f"interrupted{advice}")
        return INTERRUPTED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        print_message(f"error: {one_line(error)}")
        return ERROR
    return 0


def one_line(error: Exception) -> str:
    """Return what went wrong as one line, with advice where memory ran out."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    message = without_line_breaks(error)
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return f"{message} Try a smaller --batch-size, --activation-checkpointing or --dtype bfloat16."
    # The library's own errors are sentences; the class of any other error says more than its message.
    if isinstance(error, ValueError | OSError | ImportError):
        return in_shell_words(message)
    return f"this was not foreseen ({kind}: {message}). --debug shows where it happened."


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings without the line of code that they come from, each once: both signs are two passes."""
    shown: set[str] = set()

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        sentence = in_shell_words(without_line_breaks(message))
        if sentence not in shown:
            shown.add(sentence)
            print_message(f"warning: {sentence}")

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        yield


def without_line_breaks(message: object) -> str:
    """Return a message with every run of white space as one blank."""
    return " ".join(str(message).split())


def print_message(message: str) -> None:
    """Print a line to standard error, above a progress bar if there is one."""
    printable = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)  # no escape sequences
    tqdm.write(f"captum-sdi: {printable}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

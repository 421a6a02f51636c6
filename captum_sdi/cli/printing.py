"""What a command prints: its result, a summary of what it read, and both only once per launch."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captum_sdi.cli.tables import AnyExamples


def is_first_process() -> bool:
    """Return whether this process prints and writes for all of its launch."""
    return os.environ.get("RANK", "0") == "0"  # set by `accelerate launch` and `torchrun`


def shows_progress(options: Namespace) -> bool:
    """Return whether this process draws progress bars and prints summaries."""
    return not options.quiet and is_first_process()


def print_line(text: object) -> None:
    """Print a command's result to standard output."""
    printable = encodable(escaped(str(text)), sys.stdout.encoding)
    sys.stdout.write(f"{printable}\n")


def print_unless_quiet(text: object, options: Namespace) -> None:
    """Print a result that ``--quiet`` leaves out."""
    if shows_progress(options):
        print_line(text)


def print_summary(examples: AnyExamples, options: Namespace) -> None:
    """Print what was read to standard error, so that a pipe takes the result alone."""
    if shows_progress(options):
        summary = escaped(examples.summary())
        printable = encodable(summary, sys.stderr.encoding)
        sys.stderr.write(f"{printable}\n")


def escaped(text: str) -> str:
    """Return a text with control characters as escape sequences, which no terminal obeys; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def encodable(text: str, encoding: str | None) -> str:
    """Return a text with what a console cannot show as escape sequences."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)

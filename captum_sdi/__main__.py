"""The command line: ``captum-sdi index``, ``score``, ``plot``, ``show`` and ``demo``, or ``python -m captum_sdi``."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from captum_sdi import __version__
from captum_sdi.cli.options import parser

ERROR, INTERRUPTED = 1, 130  # what shells expect; argparse itself exits with 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: As given to the shell; None: those of this process.

    Returns:
        The exit code: 0, 1 after a one-line error, 130 after an interruption.
    """
    options = parser(__version__).parse_args(arguments)
    try:
        with _one_line_warnings():
            from captum_sdi.cli import commands  # after --help, which need not wait for torch

            getattr(commands, options.command)(options)
    except KeyboardInterrupt:
        goes_on = ": the same command goes on from here" if options.command == "index" else ""
        _complain("interrupted" + goes_on)
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        _complain(f"error: {_described(error)}")
        return ERROR
    return 0


def _described(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} Try a smaller --batch-size, --activation-checkpointing or --dtype bfloat16."
    # Those of the library are sentences; of anything else the kind says more than the words.
    return text if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {text}"


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {' '.join(str(message).split())}")
        yield


def _complain(text: str) -> None:
    tqdm.write(f"captum-sdi: {text}", file=sys.stderr)  # does not tear a progress bar apart


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m captum_sdi demo`` or ``captum-sdi demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from captum_sdi import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: As given to the shell; None: those of this process.

    Returns:
        The exit code: 0, or 1 after a one-line error.
    """
    parser = argparse.ArgumentParser(
        prog="captum-sdi", description="Which training examples shaped this answer, and at which loop step?"
    )
    parser.add_argument("--version", action="version", version=f"captum-sdi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a looped GPT on parity, attribute its answers, write scores, pictures and a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, data and sketch")
    demo.add_argument("--steps", type=int, default=500, help="training steps")
    options = parser.parse_args(arguments)
    try:
        from captum_sdi.demo import run  # imports transformers.Trainer, which needs the extra `train`

        run(options.out, options.seed, options.steps)
    except ImportError as error:
        return _failed(f"{error} - install what the demo trains with: pip install 'captum-sdi[train]'")
    except (OSError, ValueError) as error:
        return _failed(str(error))
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(f"captum-sdi: error: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The parser of the whole command line: its commands, and the help of each. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import textwrap
from argparse import ArgumentParser
from collections.abc import Callable
from typing import NamedTuple

from captum_sdi.cli import options, score_options

JSONL_HELP = """\
A jsonl file has one example per line: {"text": "..."}, which the model's tokenizer reads; {"prompt": "...",
"completion": "..."}, of which the completion is predicted; {"messages": [...]}, of which the assistant's turns are, as
the tokenizer's chat template writes them; or {"input_ids": [...]}, optionally with "labels" (-100 where nothing is
predicted) and "attention_mask". Labels are the tokens themselves unless they are given. Results carry whatever else
stands in a line, such as an "id". Blank lines do not count. An example is a row: texts are cut where the model ends,
never packed together."""

EXAMPLE = """\
example:
  captum-sdi index --model run/checkpoint-900 --checkpoints run \\
                   --train train.jsonl --index index --dry-run
  captum-sdi index --model run/checkpoint-900 --checkpoints run \\
                   --train train.jsonl --index index
  captum-sdi score --index index --query queries.jsonl -k 10 --both --html
  captum-sdi view scores"""

EXIT_CODES = "exit codes: 0 done, 1 an error (in one line), 2 wrong usage, 130 interrupted"


class Command(NamedTuple):
    """What the parser knows of a command."""

    name: str
    add_options: Callable[[ArgumentParser], None]
    summary: str
    description: str
    has_quiet: bool = True


COMMANDS = (
    Command(
        name="index",
        add_options=options.add_index_options,
        summary="sketch the training examples once, into a folder",
        description="Sketches the gradients of every training example at every checkpoint into a folder, which "
        "captum-sdi score then reads as often as you like. Interrupt it whenever you want: the same command goes on."
        f"\n\n{JSONL_HELP}",
    ),
    Command(
        name="score",
        add_options=score_options.add_score_options,
        summary="which training examples shaped these answers, and at which loop step",
        description="Finds the training examples that most influenced the loss on each query, and at which loop step. "
        "Writes scores.jsonl (one line per query), scores.csv (one row per pair), scores.npz (arrays), "
        f"scores.safetensors (StepInfluence.load) and pictures.\n\n{JSONL_HELP}",
    ),
    Command(
        name="plot",
        add_options=options.add_plot_options,
        summary="draw the pictures of scores again",
        description="Draws the pictures of saved scores again.",
    ),
    Command(
        name="view",
        add_options=options.add_view_options,
        summary="explore scores in a browser",
        description="Opens the page of saved scores in the browser; writes it first where score ran without --html. "
        "The page is one file, page.html, which needs no network and can be sent to others.",
        has_quiet=False,
    ),
    Command(
        name="merge",
        add_options=options.add_merge_options,
        summary="join the indexes of several machines to one",
        description="Joins indexes of parts of the training examples, as the tasks of an array job write them, to the "
        "index of all, in the order in which they are named. They stay as they are. Run it again after a kill.",
    ),
    Command(
        name="show",
        add_options=options.add_show_options,
        summary="what is in an index",
        description="Says what an index is of, and how much of it is there.",
        has_quiet=False,
    ),
    Command(
        name="demo",
        add_options=options.add_demo_options,
        summary="train a looped GPT on single facts, ask it chains",
        description="Trains a looped GPT on single facts, asks it chains of five, and writes which document acts at "
        "which loop step: scores, pictures, a page and a report. It takes a minute.",
        has_quiet=False,
    ),
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of options that have one, and paragraphs as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(default)})"
        return super()._get_help_string(action)


def build_parser(version: str) -> ArgumentParser:
    """Build the parser; its result names the command in ``command``."""
    parser = ArgumentParser(
        prog="captum-sdi",
        description="Which training examples shaped this answer, and at which loop step?",
        epilog=f"{EXAMPLE}\n\n{EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captum-sdi {version}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=fold_paragraphs(command.description),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(subparser)
        options.add_running_options(subparser, has_quiet=command.has_quiet)
    return parser


def fold_paragraphs(text: str, width: int = 78) -> str:
    """Fold every paragraph of a text into lines of at most `width` characters."""
    folded = [textwrap.fill(paragraph, width) for paragraph in text.split("\n\n")]
    return "\n\n".join(folded)

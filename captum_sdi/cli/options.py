"""The options of the commands, a function for each group of them; those of ``score`` are in `score_options`.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from pathlib import Path

FORMATS = ("png", "pdf", "svg")
DTYPES = ("float64", "float32", "float16", "bfloat16")
COSTS = "time and memory; these change no number"


# --- captum-sdi index ---


def add_index_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi index``."""
    add_config_option(command)
    add_index_paths(command)
    add_data_options(command)
    add_model_options(command)
    add_influence_options(command)
    add_index_costs(command)


def add_index_paths(command: ArgumentParser) -> None:
    """Add what is indexed and where the index goes."""
    group = command.add_argument_group("what to index")
    group.add_argument(
        "--model",
        required=True,
        help="folder of the model, as save_pretrained or Trainer writes it, or its name on the Hugging Face Hub",
    )
    group.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="PATH",
        help="a folder with the checkpoint-<step> folders of Trainer, or several checkpoints; without it, the model's "
        "own weights, with learning rate 1",
    )
    group.add_argument(
        "--train",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="training examples: jsonl, txt (a text in each line), csv, tsv, json, parquet, a folder that datasets "
        "saved, or the name of a data set on the Hugging Face Hub; one or more",
    )
    group.add_argument(
        "--index",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write; what an interrupted run left there is kept and completed",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="measure one batch, say how much time, memory and disk the index will take, write nothing",
    )


def add_data_options(command: ArgumentParser) -> None:
    """Add how a line of text becomes tokens."""
    group = command.add_argument_group("data")
    add_table_options(group)
    group.add_argument(
        "--tokenizer", metavar="PATH", help="folder or Hub name of the tokenizer; without it, the model's"
    )
    group.add_argument(
        "--max-length",
        type=positive_integer,
        metavar="TOKENS",
        help="cut longer examples; without it, to the longest the model takes",
    )
    group.add_argument(
        "--no-special-tokens",
        dest="special_tokens",
        action="store_false",
        help="texts without the tokenizer's special tokens (beginning of sequence, ...)",
    )


def add_model_options(command: ArgumentParser) -> None:
    """Add how the model is loaded and looped."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--loop", nargs="+", metavar="MODULE", help="names of the modules that repeat; without it, they are found"
    )
    group.add_argument(
        "--loop-layers",
        nargs=3,
        type=int,
        metavar=("START", "STOP", "N"),
        help="apply the layers START to STOP - 1 of a model that has no loop N times",
    )
    group.add_argument(
        "--damping",
        type=float,
        default=1.0,
        metavar="X",
        help="with --loop-layers: how much of their update each repetition takes; 1/N keeps a model trained without a "
        "loop close to itself",
    )
    group.add_argument(
        "--loop-mode",
        choices=("block", "layer"),
        default="block",
        help="with --loop-layers: repeat the layers together, or each by itself",
    )
    group.add_argument(
        "--anchor",
        type=float,
        default=0.0,
        metavar="X",
        help="with --loop-layers: the weight of a single pass in what comes out; 0.5 beside --damping 1/N is the "
        "recipe of training-free looping",
    )
    group.add_argument(
        "--n-loops",
        type=positive_integer,
        metavar="N",
        help="loop steps for the training examples, where the model's forward takes n_loops; without it, the model's "
        "own",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="numbers the model computes with; auto: those it was saved with",
    )
    add_trust_option(group)


def add_influence_options(command: ArgumentParser) -> None:
    """Add what the numbers of the index depend on: layers and sketch."""
    group = command.add_argument_group("influence")
    group.add_argument(
        "--layers",
        nargs="+",
        default=["loop"],
        metavar="NAME",
        help="whose parameters count: loop, all, or names of modules; all adds what acts before and after the loop",
    )
    group.add_argument(
        "--dim",
        type=positive_integer,
        default=2048,
        help="numbers kept per parameter; the error falls like 1/sqrt(DIM), the index grows like DIM",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the sketch")
    group.add_argument(
        "--pool",
        action="store_true",
        help="one row of DIM numbers for all parameters: a much smaller index, an error 1.4 to 1.7 times as large",
    )
    group.add_argument(
        "--index-dtype",
        choices=DTYPES,
        help="numbers of the index; without it, float32, or float64 for a float64 model; float16 halves the index",
    )


def add_index_costs(command: ArgumentParser) -> None:
    """Add what changes the time and the memory that an index takes."""
    group = command.add_argument_group(COSTS)
    add_device_option(group)
    group.add_argument(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="N",
        help="examples at a time; auto: on a GPU the most that fit, on a CPU 16",
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute the loop's activations instead of keeping them: less memory, more time",
    )


# --- the other commands ---


def add_plot_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi plot``."""
    group = command.add_argument_group("what to draw")
    group.add_argument("results", type=Path, metavar="DIR", help="folder that captum-sdi score wrote")
    group.add_argument(
        "--query",
        nargs="+",
        type=natural_number,
        metavar="N",
        help="positions of the queries, from 0; without it, the first --pictures",
    )
    group.add_argument(
        "--pictures",
        type=positive_integer,
        default=10,
        metavar="N",
        help="draw the first N queries",
    )
    group.add_argument(
        "-k", type=positive_integer, default=5, metavar="K", help="lines of proponents and of opponents in a picture"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="folder to write; without it, the one of the results")
    group.add_argument("--overwrite", action="store_true", help="replace pictures in DIR, whoever drew them")
    add_format_option(group)


def add_view_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi view``."""
    command.add_argument("results", type=Path, metavar="DIR", help="folder that captum-sdi score wrote")
    command.add_argument("--no-open", action="store_true", help="write the page and say where it is, open nothing")


def add_merge_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi merge``."""
    group = command.add_argument_group("what to merge")
    group.add_argument(
        "parts",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders that captum-sdi index wrote, each of its own training examples",
    )
    group.add_argument("--index", required=True, type=Path, metavar="DIR", help="folder to write")


def add_show_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi show``."""
    command.add_argument("index", type=Path, metavar="DIR", help="folder that captum-sdi index wrote")


def add_demo_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi demo``."""
    command.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder to write",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of facts, weights and sketch")
    command.add_argument("--steps", type=int, default=60, help="training steps")


# --- options of several commands ---


def add_trust_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--trust-remote-code``."""
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only where you trust its author",
    )


def add_table_options(group: argparse._ArgumentGroup) -> None:
    """Add which part of a table is meant."""
    group.add_argument("--split", metavar="NAME", help="which split, of a data set that has several")
    group.add_argument("--text-column", metavar="NAME", help="the field that is the text, if it is not called text")


def add_config_option(command: ArgumentParser) -> None:
    """Add ``--config``."""
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="run.json of an earlier run: its options hold where no others are typed",
    )


def add_device_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--device``."""
    group.add_argument(
        "--device", default="auto", help="where to compute: cpu, cuda, cuda:1, ...; auto: the GPU if there is one"
    )


def add_format_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--format`` and ``--width``."""
    group.add_argument("--format", choices=FORMATS, default="png", help="of the pictures")
    group.add_argument(
        "--width", type=inches, default=3.4, metavar="INCHES", help="of the pictures: a wider one shows more of a text"
    )


def add_running_options(command: ArgumentParser, *, has_quiet: bool) -> None:
    """Add what every command has."""
    group = command.add_argument_group("running")
    if has_quiet:
        group.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


# --- numbers that are typed ---


def positive_integer(text: str) -> int:
    """Return the number that was typed, of at least 1."""
    return integer_from(1, text)


def natural_number(text: str) -> int:
    """Return the number that was typed, of at least 0."""
    return integer_from(0, text)


def positive_number(text: str) -> float:
    """Return the number that was typed, above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def batch_size(text: str) -> int | str:
    """Return ``auto``, or the number that was typed, of at least 1."""
    return text if text == "auto" else positive_integer(text)


def inches(text: str) -> float:
    """Return the width that was typed, from 1 to 100 inches, or raise argparse's error."""
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 1 <= width <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no width from 1 to 100 inches")
    return width


def integer_from(minimum: int, text: str) -> int:
    """Return the number that was typed, or raise argparse's error."""
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}")
    return number

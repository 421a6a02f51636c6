"""The options of ``captum-sdi score``, a function for each group of them. Imports nothing that takes time."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from captum_sdi.cli.options import (
    COSTS,
    add_config_option,
    add_device_option,
    add_format_option,
    add_table_options,
    add_trust_option,
    natural_number,
    positive_integer,
    positive_number,
)

PRECONDITIONERS = ("fisher", "hessian", "adam")


def add_score_options(command: ArgumentParser) -> None:
    """Add the options of ``captum-sdi score``."""
    add_config_option(command)
    add_query_options(command)
    add_preconditioner_options(command)
    add_result_options(command)
    add_moved_paths(command)
    add_trust_option(command.add_argument_group("model"))
    costs = command.add_argument_group(COSTS)
    add_device_option(costs)
    costs.add_argument(
        "--batch-size", type=positive_integer, metavar="N", help="queries at a time; without it, that of the index"
    )


def add_query_options(command: ArgumentParser) -> None:
    """Add which queries are scored, and which training examples are sought."""
    group = command.add_argument_group("what to score")
    group.add_argument(
        "--index",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder that captum-sdi index wrote; what is missing in it is built first",
    )
    asked = group.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--query",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="test examples, in files as of --train",
    )
    asked.add_argument("--prompt", metavar="TEXT", help="one question, instead of a file")
    answer = group.add_mutually_exclusive_group()
    answer.add_argument("--completion", metavar="TEXT", help="the answer to --prompt that is explained")
    answer.add_argument(
        "--generate",
        type=positive_integer,
        default=32,
        metavar="TOKENS",
        help="without --completion, the model answers, with at most so many tokens, the likeliest each time",
    )
    add_table_options(group)
    group.add_argument(
        "-k", type=positive_integer, default=10, metavar="K", help="how many training examples for each query"
    )
    sign = group.add_mutually_exclusive_group()
    sign.add_argument(
        "--opponents",
        action="store_true",
        help="the K lowest scores, whose training raised the query's loss, instead of the K highest",
    )
    sign.add_argument("--both", action="store_true", help="the K highest and the K lowest scores")
    group.add_argument(
        "--rank-by",
        type=positive_integer,
        metavar="STEP",
        help="rank by what acts at this loop step, from 1; without it, by the total",
    )
    group.add_argument(
        "--rerank",
        type=positive_integer,
        metavar="N",
        help="let the index choose N candidates, at least K, and exact gradients decide among them; their scores are "
        "exact",
    )
    group.add_argument(
        "--n-loops",
        type=positive_integer,
        metavar="N",
        help="loop steps for the queries, where the model's forward takes n_loops; without it, those of the index",
    )


def add_preconditioner_options(command: ArgumentParser) -> None:
    """Add what is done to the queries' gradients before they meet those of the training examples."""
    group = command.add_argument_group("what a score is")
    group.add_argument(
        "--preconditioner",
        choices=PRECONDITIONERS,
        help="fisher, hessian: the rise of the query's loss to be expected without a training example; adam: gradients "
        "divided by Adam's second moments beside the checkpoints; without it, gradients as they are",
    )
    group.add_argument(
        "--preconditioner-damping",
        type=positive_number,
        metavar="X",
        help="with fisher or hessian: relative to the mean or the largest curvature; without it, 0.1 or 0.003",
    )
    group.add_argument(
        "--preconditioner-rank",
        type=positive_integer,
        metavar="N",
        help="with hessian: how many curvatures are found, each by a pass over the training examples; without it, 80",
    )
    group.add_argument(
        "--normalize",
        choices=("train", "both"),
        help="divide the training examples' gradients, or those of the queries too, by their norms",
    )


def add_result_options(command: ArgumentParser) -> None:
    """Add where scores and pictures go."""
    group = command.add_argument_group("results")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("scores"),
        metavar="DIR",
        help="folder to write",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in DIR")
    group.add_argument(
        "--html", action="store_true", help="write page.html, too: a page to explore the scores in, without a network"
    )
    group.add_argument(
        "--columns",
        type=positive_integer,
        metavar="CHARS",
        help="characters in a line of the summary; without it, as many as the terminal has, at most 120",
    )
    group.add_argument(
        "--pictures", type=natural_number, default=10, metavar="N", help="draw the first N queries; 0: no pictures"
    )
    add_format_option(group)


def add_moved_paths(command: ArgumentParser) -> None:
    """Add where the things are now that an index was made of."""
    group = command.add_argument_group("where things are now, if they have moved")
    group.add_argument("--model", metavar="MODEL", help="where the model is now")
    group.add_argument("--checkpoints", nargs="+", metavar="PATH", help="where the checkpoints are now")
    group.add_argument(
        "--train",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="where the training examples are now",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is now")

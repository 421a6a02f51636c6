"""What can be typed: the commands, their options, and the help of each. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("png", "pdf", "svg")
DTYPES = ("float64", "float32", "float16", "bfloat16")

_LINES = """\
A jsonl file has one example per line: {"text": "..."}, which the model's tokenizer reads, or {"input_ids": [...]},
optionally with "labels" (-100 where nothing is predicted) and "attention_mask". Labels are the tokens themselves unless
they are given. Results carry whatever else stands in a line, such as an "id". Blank lines do not count."""

_EXAMPLE = """\
example:
  captum-sdi index --model run/checkpoint-900 --checkpoints run \\
                   --train train.jsonl --index index --dry-run
  captum-sdi index --model run/checkpoint-900 --checkpoints run \\
                   --train train.jsonl --index index
  captum-sdi score --index index --query queries.jsonl -k 10 --out scores"""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of options that have one, and paragraphs as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(default)})"
        return super()._get_help_string(action)


def parser(version: str) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        version: Of the library.

    Returns:
        A parser whose result has ``command``, the name of one.
    """
    top = argparse.ArgumentParser(
        prog="captum-sdi",
        description="Which training examples shaped this answer, and at which loop step?",
        epilog=_EXAMPLE + "\n\nexit codes: 0 done, 1 an error (in one line), 2 wrong usage, 130 interrupted",
        formatter_class=Formatter,
    )
    top.add_argument("--version", action="version", version=f"captum-sdi {version}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, summary, description) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=_folded(description), formatter_class=Formatter, allow_abbrev=False
        )
        add_options(command)
        running = command.add_argument_group("running")
        if name not in ("show", "demo"):
            running.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
        running.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _index(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what to index")
    what.add_argument(
        "--model",
        required=True,
        help="folder of the model, as save_pretrained or Trainer writes it, or its name on the Hugging Face Hub",
    )
    what.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="PATH",
        help="a folder with the checkpoint-<step> folders of "
        "Trainer, or several checkpoints; without it, the model's own weights, with learning rate "
        "1",
    )
    what.add_argument("--train", required=True, type=Path, metavar="FILE", help="training examples, jsonl")
    what.add_argument(
        "--index",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write; what an interrupted run left there is kept and completed",
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="measure one batch, say how much time, memory and disk the index will take, write nothing",
    )

    data = command.add_argument_group("data")
    data.add_argument(
        "--tokenizer", metavar="PATH", help="folder or Hub name of the tokenizer; without it, the model's"
    )
    data.add_argument(
        "--max-length",
        type=_positive,
        metavar="TOKENS",
        help="cut longer examples; without it, to the longest the model takes",
    )
    data.add_argument(
        "--no-special-tokens",
        dest="special_tokens",
        action="store_false",
        help="texts without the tokenizer's special tokens (beginning of sequence, ...)",
    )

    model = command.add_argument_group("model")
    model.add_argument(
        "--loop", nargs="+", metavar="MODULE", help="names of the modules that repeat; without it, they are found"
    )
    model.add_argument(
        "--loop-layers",
        nargs=3,
        type=int,
        metavar=("START", "STOP", "N"),
        help="apply the layers START to STOP - 1 of a model that has no loop N times",
    )
    model.add_argument(
        "--damping",
        type=float,
        default=1.0,
        metavar="X",
        help="with --loop-layers: how much of their "
        "update each repetition takes; 1/N keeps a model trained without a loop close to itself",
    )
    model.add_argument(
        "--n-loops",
        type=_positive,
        metavar="N",
        help="loop steps for the training examples, where the "
        "model's forward takes n_loops; without it, the model's own",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="numbers the model computes with; auto: those it was saved with",
    )
    _add_trust(model)

    influence = command.add_argument_group("influence")
    influence.add_argument(
        "--layers",
        nargs="+",
        default=["loop"],
        metavar="NAME",
        help="whose parameters count: loop, all, or names of modules; all adds what acts before and after the loop",
    )
    influence.add_argument(
        "--dim",
        type=_positive,
        default=2048,
        help="numbers kept per parameter; the error falls like 1/sqrt(DIM), the index grows like DIM",
    )
    influence.add_argument("--seed", type=int, default=0, help="seed of the sketch")
    influence.add_argument(
        "--pool",
        action="store_true",
        help="one row of DIM numbers for all parameters: a much smaller index, an error 1.4 to 1.7 times as large",
    )
    influence.add_argument(
        "--index-dtype",
        choices=DTYPES,
        help="numbers of the index; without it, float32, or float64 for a float64 model; float16 halves the index",
    )

    cost = command.add_argument_group("time and memory; these change no number")
    cost.add_argument(
        "--device", default="auto", help="where to compute: cpu, cuda, cuda:1, ...; auto: the GPU if there is one"
    )
    cost.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="examples at a time; auto: on a GPU the most that fit, on a CPU 16",
    )
    cost.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute the loop's activations instead of keeping them: less memory, more time",
    )


def _score(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what to score")
    what.add_argument(
        "--index",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder that captum-sdi index wrote; what is missing in it is built first",
    )
    what.add_argument("--query", required=True, type=Path, metavar="FILE", help="test examples, jsonl")
    what.add_argument("-k", type=_positive, default=10, metavar="K", help="how many training examples for each query")
    what.add_argument(
        "--opponents",
        action="store_true",
        help="the K lowest scores, whose training raised the query's loss, instead of the K highest",
    )
    what.add_argument(
        "--rank-by",
        type=_positive,
        metavar="STEP",
        help="rank by what acts at this loop step, from 1; without it, by the total",
    )
    what.add_argument(
        "--rerank",
        type=_positive,
        metavar="N",
        help="let the index choose N candidates, at least K, and exact gradients decide among them; their scores are "
        "exact",
    )
    what.add_argument(
        "--n-loops",
        type=_positive,
        metavar="N",
        help="loop steps for the queries, where the model's forward takes n_loops; without it, those of the index",
    )

    results = command.add_argument_group("results")
    results.add_argument("--out", type=Path, default=Path("scores"), metavar="DIR", help="folder to write")
    results.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in DIR")
    results.add_argument(
        "--pictures", type=_count, default=10, metavar="N", help="draw the first N queries; 0: no pictures"
    )
    results.add_argument("--format", choices=FORMATS, default="png", help="of the pictures")

    moved = command.add_argument_group("where things are now, if they have moved")
    moved.add_argument("--model", metavar="MODEL", help="where the model is now")
    moved.add_argument("--checkpoints", nargs="+", metavar="PATH", help="where the checkpoints are now")
    moved.add_argument("--train", type=Path, metavar="FILE", help="where the training examples are now")
    moved.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is now")
    _add_trust(command.add_argument_group("model"))

    cost = command.add_argument_group("time and memory; these change no number")
    cost.add_argument(
        "--device", default="auto", help="where to compute: cpu, cuda, cuda:1, ...; auto: the GPU if there is one"
    )
    cost.add_argument(
        "--batch-size", type=_positive, metavar="N", help="queries at a time; without it, that of the index"
    )


def _add_trust(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only where you trust its author",
    )


def _plot(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what to draw")
    what.add_argument("results", type=Path, metavar="DIR", help="folder that captum-sdi score wrote")
    what.add_argument(
        "--query",
        nargs="+",
        type=_count,
        metavar="N",
        help="positions of the queries, from 0; without it, the first --pictures",
    )
    what.add_argument("--pictures", type=_positive, default=10, metavar="N", help="draw the first N queries")
    what.add_argument(
        "-k", type=_positive, default=5, metavar="K", help="lines of proponents and of opponents in a picture"
    )
    what.add_argument("--out", type=Path, metavar="DIR", help="folder to write; without it, the one of the results")
    what.add_argument("--format", choices=FORMATS, default="png", help="of the pictures")


def _show(command: argparse.ArgumentParser) -> None:
    command.add_argument("index", type=Path, metavar="DIR", help="folder that captum-sdi index wrote")


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write")
    command.add_argument("--seed", type=int, default=0, help="seed of weights, data and sketch")
    command.add_argument("--steps", type=int, default=500, help="training steps")


_COMMANDS = {
    "index": (
        _index,
        "sketch the training examples once, into a folder",
        "Sketches the gradients of every training example at every checkpoint into a folder, which captum-sdi score "
        f"then reads as often as you like. Interrupt it whenever you want: the same command goes on.\n\n{_LINES}",
    ),
    "score": (
        _score,
        "which training examples shaped these answers, and at which loop step",
        "Finds the training examples that most influenced the loss on each query, and at which loop step. Writes "
        "scores.jsonl (one line per query), scores.npz (arrays), scores.safetensors (StepInfluence.load) and pictures."
        f"\n\n{_LINES}",
    ),
    "plot": (_plot, "draw the pictures of scores again", "Draws the pictures of saved scores again."),
    "show": (_show, "what is in an index", "Says what an index is of, and how much of it is there."),
    "demo": (
        _demo,
        "train a looped GPT on parity, attribute its answers",
        "Trains a looped GPT on parity, attributes its answers, and writes scores, pictures and a report. It takes "
        "minutes on two cores.",
    ),
}


def _folded(text: str, width: int = 78) -> str:
    import textwrap

    return "\n\n".join(textwrap.fill(part, width) for part in text.split("\n\n"))


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return number


def _positive(text: str) -> int:
    return _integer(text, 1)


def _count(text: str) -> int:
    return _integer(text, 0)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _integer(text, 1)

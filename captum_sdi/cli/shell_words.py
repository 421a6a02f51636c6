"""Messages of the library in the words of the shell: its arguments are options there."""

from __future__ import annotations

import re

OPTIONS = {
    "activation_checkpointing": "--activation-checkpointing",
    "batch_size": "--batch-size",
    "checkpoints": "--checkpoints",
    "dim": "--dim",
    "index": "--index",
    "index_dtype": "--index-dtype",
    "k": "-k",
    "layers": "--layers",
    "loop": "--loop",
    "n_loops": "--n-loops",
    "pool": "--pool",
    "rank_by": "--rank-by",
    "rerank": "--rerank",
    "seed": "--seed",
}
NOUNS = {
    "train_dataset": "training set",
    "inputs": "queries",
    "The result's field checkpoints": "scores.safetensors",
}
VALUE = r"\[[^\]]*\]|'[^']*'|\w+(?:\.\w+)*"
ARGUMENT = re.compile(rf"\b({'|'.join(OPTIONS)})=({VALUE})?")
CALL = re.compile(r"(?:SDIInfluence|TensorSketch)\((?:\.\.\., )?((?:-|no -)[^()]*?)(?:, \.\.\.|=\.\.\.|\.\.\.)?\)")


def in_shell_words(message: str) -> str:
    """Return a message with options in place of Python's arguments.

    Example:
        >>> in_shell_words("Leave it out with layers=['core.fc', 'core.norm'], or pass batch_size=1.")
        'Leave it out with --layers core.fc core.norm, or pass --batch-size 1.'
        >>> in_shell_words("layers= names 'core.9'; SDIInfluence(..., index='idx') writes one.")
        "--layers names 'core.9'; --index idx writes one."
    """
    message = ARGUMENT.sub(as_option, message)
    message = CALL.sub(r"\1", message)
    for noun, words in NOUNS.items():
        message = re.sub(rf"\b{noun}\b", words, message)
    return message


def as_option(argument: re.Match[str]) -> str:
    """Return an argument and its value as they are typed."""
    option, typed = OPTIONS[argument[1]], argument[2]
    if typed in (None, "[...]", "True"):
        return option
    if typed == "None":
        return f"no {option}"
    words = typed.strip("[]").replace("'", "").replace(", ", " ").removeprefix("torch.")
    return f"{option} {words}"

"""Programs as text, as instructions, and run by plain Python: no tensors here, and no gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

WRITING = ("copy", "add", "subtract")
OPERATIONS = (*WRITING, "branch", "halt")

OPERANDS = {
    "copy": ("left", "target"),
    "add": ("left", "right", "target"),
    "subtract": ("left", "right", "target"),
    "branch": ("left", "jump"),
    "halt": (),
}
"""What follows an operation's name in a line of text."""


class Instruction(NamedTuple):
    """One line of a program: cells of the memory by their number, and a line of the table."""

    operation: str
    left: int = 0
    """The cell that is read, and for "branch" compared with zero."""
    right: int = 0
    """The cell that "add" adds to it and "subtract" takes away."""
    target: int = 0
    """The cell that is written."""
    jump: int = 0
    """The line where "branch" goes on if the left cell is above zero."""


class Run(NamedTuple):
    """What a program did."""

    lines: list[int]
    """The line that each loop step read, the one with "halt" again and again once it is reached."""
    memory: list[float]
    """The cells at the end."""
    n_executed: int
    """How many instructions ran before "halt"."""


def assemble(text: str, cells: Sequence[str]) -> tuple[list[Instruction], dict[str, int]]:
    r"""Turn the text of programs into one table of instructions.

    A line is ``label: operation operands``, its label optional, and ``#`` begins a comment. The operations:
    ``copy a b`` (b = a), ``add a b c`` (c = a + b), ``subtract a b c`` (c = a - b), ``branch a label`` (go on at the
    label if a > 0), ``halt``.

    Args:
        text: The lines of one program or of several: programs may go on in each other's lines.
        cells: Names of the memory's cells, in order.

    Returns:
        The instructions, and the line of each label.

    Raises:
        ValueError: If a line has no such operation, cell or label.

    Example:
        >>> instructions, labels = assemble("twice: add a a a\nhalt", cells=["a"])
        >>> instructions[labels["twice"]].operation
        'add'
    """
    statements: list[list[str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        statement, _, _ = line.partition("#")
        *label, words = statement.split(":")
        if label:
            labels[label[0].strip()] = len(statements)
        if words.strip():
            statements.append(words.split())
    cell_numbers = {name: number for number, name in enumerate(cells)}
    return [parse_statement(statement, cell_numbers, labels) for statement in statements], labels


def parse_statement(
    words: Sequence[str],
    cells: Mapping[str, int],
    labels: Mapping[str, int],
) -> Instruction:
    """Return the instruction that the words of a line stand for.

    Raises:
        ValueError: If they stand for none.
    """
    statement = " ".join(words)
    operation, *names = words
    if operation not in OPERATIONS:
        raise ValueError(f"{statement!r}: there is no operation {operation!r}; use one of {OPERATIONS}.")
    operands = OPERANDS[operation]
    if len(names) != len(operands):
        raise ValueError(f"{statement!r}: {operation!r} takes {len(operands)} operands: {', '.join(operands)}.")
    numbers: dict[str, int] = {}
    for operand, name in zip(operands, names, strict=True):
        known = labels if operand == "jump" else cells
        if name not in known:
            kind = "label" if operand == "jump" else "cell"
            raise ValueError(f"{statement!r}: there is no {kind} {name!r}; use one of {list(known)}.")
        numbers[operand] = known[name]
    return Instruction(operation, **numbers)


def interpret(
    instructions: Sequence[Instruction],
    start: int,
    memory: Sequence[float],
    n_steps: int,
) -> Run:
    r"""Run a program by plain Python, as the truth about `ProgramComputer`.

    Args:
        instructions: The table.
        start: The line that is read first.
        memory: The cells before.
        n_steps: How many lines are read.

    Returns:
        The lines that were read and the memory after them.

    Example:
        >>> instructions, labels = assemble("more: add a b a\nbranch b more\nhalt", cells=["a", "b"])
        >>> interpret(instructions, labels["more"], memory=[5, -2], n_steps=4).lines
        [0, 1, 2, 2]
    """
    cells = list(memory)
    lines = []
    line, n_executed = start, 0
    for _ in range(n_steps):
        lines.append(line)
        operation, left, right, target, jump = instructions[line]
        if operation == "halt":
            continue
        n_executed += 1
        if operation == "branch":
            line = jump if cells[left] > 0 else line + 1
            continue
        second = {"copy": 0, "add": cells[right], "subtract": -cells[right]}[operation]
        cells[target] = cells[left] + second
        line += 1
    return Run(lines, cells, n_executed)

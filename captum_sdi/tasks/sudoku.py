"""Sudoku: fill in the blanks of a grid so that every row, column and box holds each digit once."""

import random
from collections.abc import Mapping
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from captum_sdi.tasks.dataset import Example, TaskDataset, check_integer, check_range, draw_examples
from captum_sdi.tasks.sudoku_solver import rounds_to_solve, solutions

BLANK = "."
DIGITS = "123456789"

# The fewest givens with one solution; of 9x9: McGuire, Tugemann & Civario, arXiv 1201.0749.
FEWEST_GIVENS = {2: 4, 3: 17}
USUAL_GIVENS = {2: (4, 8), 3: (26, 36)}

# A puzzle is made from the number that seeds its generator: more numbers than anybody draws.
_NUMBERS = 2**62


def sudoku(
    size: int, box: int = 2, min_givens: int | None = None, max_givens: int | None = None, seed: int = 0
) -> TaskDataset:
    """Draw different Sudoku puzzles with exactly one solution each.

    The text is the grid row by row, "." at blanks; the targets are the digits at the blanks, for a
    model with `is_causal=False`. A digit is its own token id, so that `permute_digits` can relabel.

    Numbers of givens are drawn equally often until new puzzles with one of them are hardly found.
    `difficulty` is the number of rounds of `rounds_to_solve`: 1 to 4 of 4x4, about 3 to 20 of 9x9.

    No two puzzles become equal by relabelling digits: a held-out puzzle was not trained on, with
    `permute_digits` neither. Its *solution* may have been: there are 288 solved grids of 4x4, 12 up to
    relabelling, which a model can learn by heart. Two puzzles of 9x9 practically never share one.

    Args:
        size: Number of puzzles.
        box: Width of a box: 2 for grids of 4x4, 3 for 9x9.
        min_givens: Fewest digits given; None is 4 of 4x4 and 26 of 9x9, where fewer than 24 take long.
        max_givens: Most digits given; None is 8 of 4x4 and 36 of 9x9.
        seed: The same seed gives the same puzzles.

    Returns:
        Rows of 16 or 81 positions.

    Raises:
        ValueError: If an argument is impossible, or too few such puzzles are found.

    Example:
        >>> data = sudoku(40)
        >>> data.examples[0]
        Example(text='....2......4.31.', targets='3421 143123 4  2', difficulty=3)
    """
    check_integer("box", box, minimum=2, maximum=3)
    fewest, most = USUAL_GIVENS[box]
    min_givens = fewest if min_givens is None else min_givens
    max_givens = most if max_givens is None else max_givens
    check_range("givens", min_givens, max_givens, minimum=FEWEST_GIVENS[box], maximum=box**4 - 1)
    spaces = dict.fromkeys(range(min_givens, max_givens + 1), _NUMBERS)
    examples = draw_examples(size, seed, spaces, partial(_example, box, set()), "numbers of givens")
    return TaskDataset(examples, characters=DIGITS[: box * box] + BLANK, length=box**4)


def permute_digits(
    batch: Mapping[str, Tensor], digits: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Relabel the digits of every puzzle, each in its own random way: data augmentation.

    Args:
        batch: Rows of a `sudoku` dataset, (n, p) each.
        digits: How many digits there are: 4 or 9.
        generator: Where the relabellings are drawn from; None is torch's global one.

    Returns:
        The batch with digits of `input_ids` and `labels` relabelled alike, everything else as it was.

    Example:
        >>> puzzles = sudoku(3)
        >>> batch = permute_digits(torch.utils.data.default_collate(list(puzzles)), digits=4)
        >>> bool(((batch["input_ids"] <= 4) == (puzzles.input_ids <= 4)).all())  # same givens, other digits
        True
    """
    n = len(batch["input_ids"])
    orders = torch.rand(n, digits, generator=generator).argsort(dim=1).to(batch["input_ids"].device) + 1

    def relabelled(tokens: Tensor) -> Tensor:
        is_digit = (tokens >= 1) & (tokens <= digits)
        return torch.where(is_digit, orders.gather(1, (tokens - 1).clamp(0, digits - 1)), tokens)

    return {name: relabelled(tokens) if name in ("input_ids", "labels") else tokens for name, tokens in batch.items()}


def _example(box: int, seen: set[tuple[int, ...]], givens: int, number: int) -> Example | None:
    """Return the puzzle of a number; None if it has too many givens, or is a relabelled one of `seen`."""
    rng = random.Random(number)
    solution = next(solutions([0] * box**4, box, rng))
    puzzle = _blanked(solution, box, givens, rng)
    pattern = _relabelled(puzzle)
    if puzzle.count(0) != box**4 - givens or pattern in seen:
        return None
    seen.add(pattern)
    text = "".join(DIGITS[digit - 1] if digit else BLANK for digit in puzzle)
    targets = "".join(" " if digit else DIGITS[right - 1] for digit, right in zip(puzzle, solution, strict=True))
    return Example(text, targets, rounds_to_solve(puzzle, solution, box))


def _blanked(solution: list[int], box: int, givens: int, rng: random.Random) -> list[int]:
    """Blank cells in random order, where that leaves one solution, until so many digits are given."""
    puzzle = list(solution)
    for cell in rng.sample(range(len(puzzle)), len(puzzle)):
        if len(puzzle) - puzzle.count(0) == givens:
            break
        puzzle[cell] = 0
        if len(list(islice(solutions(puzzle, box), 2))) > 1:
            puzzle[cell] = solution[cell]
    return puzzle


def _relabelled(puzzle: list[int]) -> tuple[int, ...]:
    """Number the digits in the order in which they appear: equal for puzzles that differ by names only."""
    names = {0: 0}
    return tuple(names.setdefault(digit, len(names)) for digit in puzzle)

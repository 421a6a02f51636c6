"""Sudoku: fill in a grid so that every row, column and box holds each digit once."""

import random
from collections.abc import Mapping
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from captum_sdi.tasks.arguments import check_integer, check_range
from captum_sdi.tasks.dataset import NO_TARGET, Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples
from captum_sdi.tasks.sudoku_solver import rounds_to_solve, solutions

BLANK = "."
DIGITS = "123456789"

FEWEST_GIVENS = {2: 4, 3: 17}
"""The fewest givens with one solution, by width of a box; of 9x9: McGuire, Tugemann & Civario, arXiv 1201.0749."""
USUAL_GIVENS = {2: (4, 8), 3: (26, 36)}

N_SEEDS = 2**62
"""A puzzle is made from the seed of its random numbers; there are more seeds than anybody draws."""


def sudoku(
    size: int,
    box: int = 2,
    min_givens: int | None = None,
    max_givens: int | None = None,
    seed: int = 0,
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
    usual_min_givens, usual_max_givens = USUAL_GIVENS[box]
    if min_givens is None:
        min_givens = usual_min_givens
    if max_givens is None:
        max_givens = usual_max_givens
    n_cells = box**4
    check_range(
        "givens",
        min_givens,
        max_givens,
        minimum=FEWEST_GIVENS[box],
        maximum=n_cells - 1,
    )
    spaces = dict.fromkeys(range(min_givens, max_givens + 1), N_SEEDS)
    make = partial(puzzle_example, box=box, known_patterns=set())
    examples = draw_examples(size, seed, spaces, make, kinds="numbers of givens")
    digits = DIGITS[: box * box]
    return TaskDataset(examples, characters=digits + BLANK, length=n_cells)


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
    input_ids = batch["input_ids"]
    random_numbers = torch.rand(len(input_ids), digits, generator=generator)
    new_digits = random_numbers.argsort(dim=1).to(input_ids.device) + 1  # (n, digits)
    relabelled = {}
    for name, tokens in batch.items():
        relabelled[name] = tokens
        if name in ("input_ids", "labels"):
            is_digit = (tokens >= 1) & (tokens <= digits)
            digit_indices = (tokens - 1).clamp(0, digits - 1)
            relabelled[name] = torch.where(is_digit, new_digits.gather(1, digit_indices), tokens)
    return relabelled


def puzzle_example(
    givens: int,
    seed: int,
    *,
    box: int,
    known_patterns: set[tuple[int, ...]],
) -> Example | None:
    """Return the puzzle of a seed; None if it has too many givens, or only relabels a known one."""
    rng = random.Random(seed)
    empty_grid = [0] * box**4
    solution = next(solutions(empty_grid, box, rng))
    puzzle = blank_cells(solution, box, givens, rng)
    pattern = label_pattern(puzzle)
    n_givens = len(puzzle) - puzzle.count(0)
    if n_givens != givens or pattern in known_patterns:
        return None
    known_patterns.add(pattern)
    symbols = BLANK + DIGITS
    text = "".join(symbols[given] for given in puzzle)
    targets = ""
    for given, digit in zip(puzzle, solution, strict=True):
        targets += NO_TARGET if given else symbols[digit]
    return Example(text, targets, difficulty=rounds_to_solve(puzzle, solution, box))


def blank_cells(
    solution: list[int],
    box: int,
    givens: int,
    rng: random.Random,
) -> list[int]:
    """Blank cells in random order, where one solution stays, until `givens` digits are left."""
    puzzle = list(solution)
    n_givens = n_cells = len(puzzle)
    for cell in rng.sample(range(n_cells), n_cells):
        if n_givens == givens:
            break
        puzzle[cell] = 0
        first_two = list(islice(solutions(puzzle, box), 2))
        if len(first_two) == 1:
            n_givens -= 1
        else:
            puzzle[cell] = solution[cell]
    return puzzle


def label_pattern(puzzle: list[int]) -> tuple[int, ...]:
    """Return the digits numbered in order of appearance: equal for relabelled puzzles."""
    labels = {0: 0}
    return tuple(labels.setdefault(digit, len(labels)) for digit in puzzle)

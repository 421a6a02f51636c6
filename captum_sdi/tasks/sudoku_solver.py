"""Solving Sudoku: every solution of a puzzle, and how hard it is to reason out.

A grid is a list of cells, row by row: the digits 1 to N, or 0 at a blank, N = 4 or 9. What a cell may
still hold is a bit mask, bit d - 1 for digit d.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple


class Units(NamedTuple):
    """Which cells of a grid must differ."""

    groups: tuple[tuple[int, ...], ...]
    """The cells of every row, column and box."""
    peers: tuple[tuple[int, ...], ...]
    """For each cell all the others in its row, column or box."""


@cache
def units(box: int) -> Units:
    """Return the units of grids whose boxes are `box` wide and high."""
    size = box * box
    line, blocks = range(size), [range(start, start + box) for start in range(0, size, box)]
    rows = [tuple(size * r + c for c in line) for r in line]
    columns = [tuple(size * r + c for r in line) for c in line]
    boxes = [tuple(size * r + c for r in rows_ for c in columns_) for rows_ in blocks for columns_ in blocks]
    groups = (*rows, *columns, *boxes)
    peers = [set().union(*(group for group in groups if cell in group)) - {cell} for cell in range(size * size)]
    return Units(groups, tuple(tuple(sorted(cells)) for cells in peers))


def solutions(grid: Sequence[int], box: int, rng: random.Random | None = None) -> Iterator[list[int]]:
    """Yield every solution once: singles are filled in, then the cell with the fewest candidates is tried.

    Args:
        grid: The cells, 0 at blanks.
        box: Width of a box.
        rng: Tries digits in random order; the first solution of the empty grid is then a random grid.

    Yields:
        Solved grids, none if the puzzle contradicts itself.

    Example:
        >>> len(list(solutions([0] * 16, box=2)))
        288
    """
    everything = (1 << box * box) - 1
    stack = [[1 << digit - 1 if digit else everything for digit in grid]]
    while stack:
        masks = stack.pop()
        if not _propagate(masks, box):
            continue
        open_cells = [cell for cell, mask in enumerate(masks) if mask & mask - 1]
        if not open_cells:
            yield [mask.bit_length() for mask in masks]
            continue
        cell = min(open_cells, key=lambda c: masks[c].bit_count())
        tried = _bits(masks[cell])
        if rng is not None:
            rng.shuffle(tried)
        stack += [[*masks[:cell], bit, *masks[cell + 1 :]] for bit in tried]


def rounds_to_solve(grid: Sequence[int], solution: Sequence[int], box: int) -> int:
    """Return how many rounds of parallel reasoning solve a puzzle.

    A round fills in every single at once: cells with one candidate left (naked singles), and cells
    that alone can hold some digit in a row, column or box (hidden singles). Where there is none, a
    guess takes a round of its own: it reveals the first cell with the fewest candidates.

    Args:
        grid: The cells, 0 at blanks.
        solution: Its only solution.
        box: Width of a box.

    Returns:
        Rounds until no cell is blank; 0 for a solved grid.

    Example:
        >>> solution = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
        >>> rounds_to_solve([0, *solution[1:]], solution, box=2)
        1
    """
    groups, peers = units(box)
    everything = (1 << box * box) - 1
    cells, rounds = list(grid), 0
    while 0 in cells:
        masks = []
        for cell, digit in enumerate(cells):
            seen = 0 if digit else sum({1 << cells[peer] - 1 for peer in peers[cell] if cells[peer]})
            masks.append(1 << digit - 1 if digit else everything & ~seen)
        singles = {cell for cell, mask in enumerate(masks) if mask.bit_count() == 1}
        for group in groups:
            lone = _held_once(masks, group)
            singles.update(cell for cell in group if masks[cell] & lone)
        found = [cell for cell in singles if not cells[cell]]
        if not found:
            blanks = (cell for cell, digit in enumerate(cells) if not digit)
            found = [min(blanks, key=lambda cell: masks[cell].bit_count())]
        for cell in found:
            cells[cell] = solution[cell]
        rounds += 1
    return rounds


def _propagate(masks: list[int], box: int) -> bool:
    """Fill in singles until there is none; False when some cell, or some digit, has no place left."""
    groups, peers = units(box)
    everything = (1 << box * box) - 1
    settled = [cell for cell, mask in enumerate(masks) if mask & mask - 1 == 0]
    while settled:
        for cell in settled:  # grows while it is read
            bit = masks[cell]
            for peer in peers[cell]:
                if masks[peer] & bit:
                    masks[peer] ^= bit
                    left = masks[peer]
                    if not left:
                        return False
                    if left & left - 1 == 0:
                        settled.append(peer)
        settled = []
        for group in groups:
            held = 0
            for cell in group:
                held |= masks[cell]
            if held != everything:
                return False
            lone = _held_once(masks, group)
            for cell in group:
                bit = masks[cell] & lone
                if bit and masks[cell] != bit:
                    if bit & bit - 1:
                        return False  # the only place of two digits
                    masks[cell] = bit
                    settled.append(cell)
    return True


def _held_once(masks: Sequence[int], group: Sequence[int]) -> int:
    """The digits that exactly one cell of the group may hold."""
    once = twice = 0
    for cell in group:
        twice |= once & masks[cell]
        once |= masks[cell]
    return once & ~twice


def _bits(mask: int) -> list[int]:
    return [1 << place for place in range(mask.bit_length()) if mask >> place & 1]

"""Solving Sudoku: every solution of a puzzle, and how hard it is to reason out.

A grid is a list of cells, row by row: the digits 1 to N, or 0 at a blank, N = 4 or 9. The candidates of
a cell, the digits that it may still hold, are a bit mask: bit d - 1 for digit d.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

Group = tuple[int, ...]
"""Cells that must differ."""


class Units(NamedTuple):
    """The cells of a grid that must differ."""

    groups: tuple[Group, ...]
    """The cells of every row, column and box."""
    peers: tuple[Group, ...]
    """For each cell all the others in its row, column or box."""


@cache
def units(box: int) -> Units:
    """Return the units of grids whose boxes are `box` wide and high."""
    size = box * box
    n_cells = size * size
    first_cells = range(0, n_cells, size)
    rows = [tuple(range(first, first + size)) for first in first_cells]
    columns = list(zip(*rows, strict=True))
    boxes = []
    for top in range(0, size, box):
        for left in range(0, size, box):
            lines = [row[left : left + box] for row in rows[top : top + box]]
            boxes.append(tuple(chain.from_iterable(lines)))
    groups = (*rows, *columns, *boxes)
    peers = []
    for cell in range(n_cells):
        groups_of_cell = [group for group in groups if cell in group]
        peers_of_cell = set(chain.from_iterable(groups_of_cell)) - {cell}
        peers.append(tuple(sorted(peers_of_cell)))
    return Units(groups, tuple(peers))


def solutions(
    grid: Sequence[int],
    box: int,
    rng: random.Random | None = None,
) -> Iterator[list[int]]:
    """Yield every solution of a puzzle once.

    Singles are filled in; then the digits of the cell with the fewest candidates are tried, with `rng`
    in random order: the first solution of the empty grid is then a random grid.

    Yields:
        Solved grids, none if the puzzle contradicts itself.

    Example:
        >>> len(list(solutions([0] * 16, box=2)))
        288
    """
    any_digit = all_digits(box)
    masks = []
    for digit in grid:
        masks.append(digit_mask(digit) if digit else any_digit)
    stack = [masks]
    while stack:
        masks = stack.pop()
        if not fill_in_singles(masks, box):
            continue
        open_cells = [cell for cell, mask in enumerate(masks) if mask.bit_count() > 1]
        if not open_cells:
            yield [mask.bit_length() for mask in masks]
            continue
        guessed_cell = cell_with_fewest(masks, open_cells)
        guesses = split_mask(masks[guessed_cell])
        if rng is not None:
            rng.shuffle(guesses)
        for guess in guesses:
            branch = list(masks)
            branch[guessed_cell] = guess
            stack.append(branch)


def rounds_to_solve(grid: Sequence[int], solution: Sequence[int], box: int) -> int:
    """Return how many rounds of parallel reasoning lead from a puzzle to its only solution.

    A round fills in every single at once: cells with one candidate left (naked singles), and cells
    that alone can hold some digit in a row, column or box (hidden singles). Where there is none, a
    guess takes a round of its own: it reveals the first cell with the fewest candidates.

    Returns:
        Rounds until no cell is blank; 0 for a solved grid.

    Example:
        >>> solution = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
        >>> rounds_to_solve([0, *solution[1:]], solution, box=2)
        1
    """
    cells = list(grid)
    rounds = 0
    while 0 in cells:
        masks = [candidates(cells, cell, box) for cell in range(len(cells))]
        blanks = [cell for cell, digit in enumerate(cells) if not digit]
        singles = find_singles(masks, box)
        revealed = [cell for cell in blanks if cell in singles]
        if not revealed:
            revealed = [cell_with_fewest(masks, blanks)]
        for cell in revealed:
            cells[cell] = solution[cell]
        rounds += 1
    return rounds


def candidates(cells: Sequence[int], cell: int, box: int) -> int:
    """Return the mask of a cell's own digit, or at a blank of the digits that no peer has."""
    if cells[cell]:
        return digit_mask(cells[cell])
    mask = all_digits(box)
    for peer in units(box).peers[cell]:
        if cells[peer]:
            mask &= ~digit_mask(cells[peer])
    return mask


def find_singles(masks: Sequence[int], box: int) -> set[int]:
    """Return the cells with one candidate, and those that alone can hold some digit in a group."""
    singles = set(settled_cells(masks))
    for group in units(box).groups:
        lone_digits = digits_with_one_place(masks, group)
        singles.update(cell for cell in group if masks[cell] & lone_digits)
    return singles


def fill_in_singles(masks: list[int], box: int) -> bool:
    """Fill in singles until there is none; return False if the puzzle contradicts itself."""
    groups, peers = units(box)
    settled = settled_cells(masks)
    while settled:
        if not remove_from_peers(masks, settled, peers):
            return False
        settled = []
        for group in groups:
            hidden_singles = settle_hidden_singles(masks, group, box)
            if hidden_singles is None:
                return False
            settled += hidden_singles
    return True


def remove_from_peers(
    masks: list[int],
    settled: list[int],
    peers: Sequence[Group],
) -> bool:
    """Remove settled digits from all peers; return False if one has no candidate left."""
    for cell in settled:  # the list grows while it is read, by the cells that this settles
        digit = masks[cell]
        for peer in peers[cell]:
            if masks[peer] & digit:
                masks[peer] ^= digit
                if not masks[peer]:
                    return False
                if masks[peer].bit_count() == 1:
                    settled.append(peer)
    return True


def settle_hidden_singles(
    masks: list[int],
    group: Group,
    box: int,
) -> list[int] | None:
    """Settle the cells that alone can hold some digit; return them, None at a contradiction."""
    possible_digits = 0
    for cell in group:
        possible_digits |= masks[cell]
    if possible_digits != all_digits(box):
        return None  # a digit has no place
    lone_digits = digits_with_one_place(masks, group)
    settled = []
    for cell in group:
        lone_digits_here = masks[cell] & lone_digits
        if lone_digits_here and masks[cell] != lone_digits_here:
            if lone_digits_here.bit_count() > 1:
                return None  # the only place of two digits
            masks[cell] = lone_digits_here
            settled.append(cell)
    return settled


def settled_cells(masks: Sequence[int]) -> list[int]:
    """Return the cells with one candidate."""
    return [cell for cell, mask in enumerate(masks) if mask.bit_count() == 1]


def cell_with_fewest(masks: Sequence[int], cells: Sequence[int]) -> int:
    """Return the first of `cells` with the fewest candidates."""
    return min(cells, key=lambda cell: masks[cell].bit_count())


def digits_with_one_place(masks: Sequence[int], group: Group) -> int:
    """Return the mask of the digits that exactly one cell of the group may hold."""
    in_some_cell = 0
    in_two_cells = 0
    for cell in group:
        in_two_cells |= in_some_cell & masks[cell]
        in_some_cell |= masks[cell]
    return in_some_cell & ~in_two_cells


def digit_mask(digit: int) -> int:
    """Return the mask of one digit."""
    return 1 << digit - 1


def all_digits(box: int) -> int:
    """Return the mask of all digits."""
    return (1 << box * box) - 1


def split_mask(mask: int) -> list[int]:
    """Return the masks of the single digits in a mask, the lowest first."""
    bits = [1 << position for position in range(mask.bit_length())]
    return [bit for bit in bits if mask & bit]

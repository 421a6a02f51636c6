"""Sorting: the same numbers, smallest first."""

from functools import partial
from itertools import combinations

from captum_sdi.tasks.arguments import check_integer, check_range
from captum_sdi.tasks.dataset import Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def sorting(
    size: int,
    min_length: int = 2,
    max_length: int = 8,
    numbers: int = 10,
    seed: int = 0,
) -> TaskDataset:
    """Draw different lists of numbers, each followed by the same numbers sorted: "31041=01134".

    Lengths are drawn equally often until the lists of one run out: there are numbers^l of length l.
    There are 2 to 36 different `numbers`: after 9 come the letters a to z. `difficulty` is the number of
    inversions: pairs in the wrong order, as many as bubble sort swaps.

    Returns:
        Rows of `2 * max_length + 1` positions.

    Raises:
        ValueError: If an argument is impossible, or there are fewer than `size` such lists.

    Example:
        >>> data = sorting(100)
        >>> data.text(0), int(data.difficulty[0])
        ('591=159', 2)
    """
    check_range("length", min_length, max_length)
    check_integer("numbers", numbers, minimum=2, maximum=len(DIGITS))
    lengths = range(min_length, max_length + 1)
    spaces = {length: numbers**length for length in lengths}
    examples = draw_examples(size, seed, spaces, partial(sorting_example, numbers=numbers))
    digits = DIGITS[:numbers]
    return TaskDataset(examples, characters=digits + "=", length=2 * max_length + 1)


def sorting_example(length: int, number: int, *, numbers: int) -> Example:
    """Return the list of the digits of `number` in base `numbers`, the lowest first."""
    items = ""
    for _ in range(length):
        number, digit = divmod(number, numbers)
        items += DIGITS[digit]
    answer = "".join(sorted(items))  # in ASCII too letters come after digits
    return Example.question(f"{items}=", answer, difficulty=count_inversions(items))


def count_inversions(items: str) -> int:
    """Return how many pairs of items are in the wrong order."""
    return sum(left > right for left, right in combinations(items, 2))

"""Sorting: the same numbers, smallest first."""

from functools import partial

from captum_sdi.tasks.dataset import Example, TaskDataset, check_integer, check_range, draw_examples

NUMBERS = "0123456789abcdefghijklmnopqrstuvwxyz"


def sorting(size: int, min_length: int = 2, max_length: int = 8, numbers: int = 10, seed: int = 0) -> TaskDataset:
    """Draw different lists of numbers, each followed by the same numbers sorted: "31041=01134".

    Lengths are drawn equally often until the lists of one run out: there are numbers^l of length l.
    `difficulty` is the number of inversions: pairs in the wrong order, as many as bubble sort swaps.

    Args:
        size: Number of lists.
        min_length: Length of the shortest.
        max_length: Length of the longest.
        numbers: How many different numbers there are, 2 to 36; after 9 come the letters a to z.
        seed: The same seed gives the same lists.

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
    check_integer("numbers", numbers, minimum=2, maximum=len(NUMBERS))
    spaces = {length: numbers**length for length in range(min_length, max_length + 1)}
    examples = draw_examples(size, seed, spaces, partial(_example, numbers))
    return TaskDataset(examples, characters=f"{NUMBERS[:numbers]}=", length=2 * max_length + 1)


def _example(numbers: int, length: int, number: int) -> Example:
    items = [number // numbers**place % numbers for place in range(length)]
    inversions = sum(left > right for place, right in enumerate(items) for left in items[:place])
    texts = ("".join(NUMBERS[item] for item in some) for some in (items, sorted(items)))
    return Example.question(f"{next(texts)}=", next(texts), difficulty=inversions)

"""Drawing the examples of a task: all different, and as many of each length."""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from captum_sdi.tasks.arguments import check_integer
from captum_sdi.tasks.dataset import Example

Make = Callable[[int, int], Example | None]
"""`make(length, number)`: the example of a length with that number, None if there is none."""

MISSES = 1000
"""The search for more examples ends after this many numbers in a row without one."""


def draw_examples(
    size: int,
    seed: int,
    spaces: Mapping[int, int],
    make: Make,
    kinds: str = "lengths",
) -> list[Example]:
    """Draw different examples, equally many of each length (or other kind) until one runs out.

    A length has run out when all its numbers were drawn, or `MISSES` in a row were of no example.

    Args:
        size: Number of examples.
        seed: The same seed gives the same examples, on every machine and in every process.
        spaces: For each length, how many examples of it exist, or how many numbers to try.
        make: `make(length, number)` is the example with that number, 0 <= number < spaces[length]; None
            if there is none, or it is too much like another one.
        kinds: What the lengths are called in error messages.

    Returns:
        The examples, in random order.

    Raises:
        ValueError: If `size` or `seed` is no proper number, if fewer examples exist or are found, or
            none of some length.
    """
    check_integer("size", size, minimum=1)
    check_integer("seed", seed)
    rng = random.Random(str(seed))  # of a number it would take the absolute value: -1 and 1 alike
    streams = []
    for length, space in spaces.items():
        numbers = shuffled_range(space, rng)
        streams.append(examples_of_length(length, numbers, make, kinds))
    examples = list(islice(take_turns(streams), size))
    if len(examples) < size:
        raise ValueError(
            f"size={size}: only {len(examples)} different examples of these {kinds} exist or can be found; "
            f"ask for fewer or allow more {kinds}."
        )
    rng.shuffle(examples)
    return examples


def examples_of_length(
    length: int,
    numbers: Iterator[int],
    make: Make,
    kinds: str,
) -> Iterator[Example]:
    """Yield the examples of one length until none, or hardly any, are left."""
    n_examples = 0
    misses = 0
    for number in numbers:
        example = make(length, number)
        if example is not None:
            n_examples += 1
            misses = 0
            yield example
        else:
            misses += 1
            if misses == MISSES:
                break
    if n_examples == 0:
        raise ValueError(f"{misses} attempts gave no example for {length}, one of the {kinds}; leave it out.")


def take_turns(streams: list[Iterator[Example]]) -> Iterator[Example]:
    """Yield one example of each stream, again and again, until all have run out."""
    while streams:
        for stream in list(streams):
            example = next(stream, None)
            if example is None:
                streams.remove(stream)
            else:
                yield example


def shuffled_range(space: int, rng: random.Random) -> Iterator[int]:
    """Yield every number below `space` once, in random order.

    Fisher-Yates, with only the moved entries in memory: `space` may be astronomically large.
    """
    moved: dict[int, int] = {}
    for position in range(space):
        chosen = rng.randrange(position, space)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.get(position, position)

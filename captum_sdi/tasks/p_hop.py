"""p-hop induction: look a letter up in what came before, p times over."""

from functools import partial
from string import ascii_lowercase

from captum_sdi.tasks.dataset import Example, TaskDataset, check_integer, check_range, draw_examples


def p_hop(
    size: int,
    min_hops: int = 1,
    max_hops: int = 4,
    length: int = 32,
    letters: int = 4,
    running: bool = False,
    seed: int = 0,
) -> TaskDataset:
    """Draw different strings, each with the letter to which p hops from its last one lead: "2:acdbcb=d".

    A hop goes from a letter to the one after its most recent earlier occurrence: above from the last "b"
    to the second "c", and from there to "d" (Sanford, Hsu & Telgarsky, arXiv 2402.09268). One hop is
    what an induction head does. About log2(p) layers suffice, which made the task a benchmark of
    looped transformers (Saunshi et al., arXiv 2502.17416).

    As in Sanford et al. letters are random, neighbours differ, and the number of hops stands in front; it
    is the `difficulty`. The last letter's hops all exist. Numbers of hops are drawn equally often until
    new strings for one are hardly found.

    Args:
        size: Number of strings.
        min_hops: Fewest hops.
        max_hops: Most hops.
        length: Letters of a string. A hop leads about `letters - 1` of them to the left.
        letters: Number of different letters, 3 to 26.
        running: Whether the letter p hops from every letter so far is predicted after it too, where
            there is one. The texts stay the same.
        seed: The same seed gives the same strings.

    Returns:
        Rows of `length + 3` positions, one more when `max_hops` has two digits.

    Raises:
        ValueError: If an argument is impossible, or too few such strings are found.

    Example:
        >>> data = p_hop(100, length=12)
        >>> data.text(0), int(data.difficulty[0])
        ('2:bcdbacbcdbab=c', 2)
    """
    check_range("hops", min_hops, max_hops)
    check_integer("letters", letters, minimum=3, maximum=len(ascii_lowercase))
    check_integer("length", length, minimum=max_hops + 2)
    strings = letters * (letters - 1) ** (length - 1)
    spaces = dict.fromkeys(range(min_hops, max_hops + 1), strings)
    examples = draw_examples(size, seed, spaces, partial(_example, length, letters, running), "numbers of hops")
    used = "".join(sorted({digit for hops in spaces for digit in str(hops)}))
    return TaskDataset(examples, f"{ascii_lowercase[:letters]}{used}:=", length + len(f"{max_hops}:=?"))


def _example(length: int, letters: int, running: bool, hops: int, number: int) -> Example | None:
    """Return the question about the string with that number; None if its hops lead out of the string."""
    string = _string(number, length, letters)
    ends = _hop(string, hops)
    if ends[-1] is None:
        return None
    answer = string[ends[-1]]
    question = Example.question(f"{hops}:{string}=", answer, difficulty=hops)
    if not running:
        return question
    # What is predicted after a letter is the target of the next position.
    found = "".join(" " if end is None else string[end] for end in ends)
    return question._replace(targets=f"{' ' * len(f'{hops}:')} {found}{answer}")


def _string(number: int, length: int, letters: int) -> str:
    """Write a number as a string whose neighbours differ: `letters` firsts, `letters - 1` choices after."""
    places = []
    for _ in range(length - 1):
        number, choice = divmod(number, letters - 1)
        places.append(choice)
    string = ascii_lowercase[number]
    for choice in places:
        string += ascii_lowercase[:letters].replace(string[-1], "")[choice]
    return string


def _hop(string: str, hops: int) -> list[int | None]:
    """Return for each place where `hops` hops from it lead, None where one of them finds nothing."""
    once: list[int | None] = []
    last: dict[str, int] = {}
    for place, letter in enumerate(string):
        once.append(last[letter] + 1 if letter in last else None)
        last[letter] = place
    ends: list[int | None] = list(range(len(string)))
    for _ in range(hops):
        ends = [None if end is None else once[end] for end in ends]
    return ends

"""p-hop induction: look a letter up in what came before, p times over."""

from functools import partial
from string import ascii_lowercase

from captum_sdi.tasks.arguments import check_integer, check_range
from captum_sdi.tasks.dataset import NO_TARGET, Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples


def p_hop(
    size: int,
    min_hops: int = 1,
    max_hops: int = 4,
    length: int = 32,
    letters: int = 4,
    running: bool = False,
    seed: int = 0,
) -> TaskDataset:
    """Draw different strings, each with the letter p hops before its last one: "2:acdbcb=d".

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
    n_strings = letters * (letters - 1) ** (length - 1)
    spaces = dict.fromkeys(range(min_hops, max_hops + 1), n_strings)
    make = partial(hop_example, length=length, letters=letters, running=running)
    examples = draw_examples(size, seed, spaces, make, kinds="numbers of hops")
    all_hops = "".join(str(hops) for hops in spaces)
    digits = sorted(set(all_hops))
    characters = ascii_lowercase[:letters] + "".join(digits) + ":="
    return TaskDataset(examples, characters, length + len(f"{max_hops}:=?"))


def hop_example(
    hops: int,
    number: int,
    *,
    length: int,
    letters: int,
    running: bool,
) -> Example | None:
    """Return the question about the string with that number; None if its hops lead nowhere."""
    prefix = f"{hops}:"
    string = number_to_string(number, length, letters)
    reached = reached_letters(string, hops)
    answer = reached[-1]
    if answer is None:
        return None
    example = Example.question(f"{prefix}{string}=", answer, difficulty=hops)
    if running:
        # A causal model predicts after a letter the target of the next position.
        before_letters = NO_TARGET * (len(prefix) + 1)
        after_letters = "".join(letter or NO_TARGET for letter in reached)
        return example._replace(targets=before_letters + after_letters + answer)
    return example


def number_to_string(number: int, length: int, letters: int) -> str:
    """Write a number as a string of `letters` different letters whose neighbours differ."""
    choices = []  # of the letters after the first, which differ from the one before
    for _ in range(length - 1):
        number, choice = divmod(number, letters - 1)
        choices.append(choice)
    alphabet = ascii_lowercase[:letters]
    string = alphabet[number]
    for choice in choices:
        other_letters = alphabet.replace(string[-1], "")
        string += other_letters[choice]
    return string


def reached_letters(string: str, hops: int) -> list[str | None]:
    """Return the letter `hops` hops from each position, None where a hop finds no earlier one."""
    hop_targets: dict[int | None, int] = {}
    latest_positions: dict[str, int] = {}
    for position, letter in enumerate(string):
        if letter in latest_positions:
            hop_targets[position] = latest_positions[letter] + 1
        latest_positions[letter] = position
    reached: list[int | None] = list(range(len(string)))
    for _ in range(hops):
        reached = [hop_targets.get(position) for position in reached]
    letter_at: dict[int | None, str] = dict(enumerate(string))
    return [letter_at.get(position) for position in reached]

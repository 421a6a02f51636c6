"""Parity: is the number of ones in a bit string odd?"""

from functools import partial

from captum_sdi.tasks.dataset import Example, TaskDataset, check_range, draw_examples


def parity(size: int, min_bits: int = 1, max_bits: int = 8, running: bool = False, seed: int = 0) -> TaskDataset:
    """Draw different bit strings, each followed by its parity: "10110=1".

    Lengths are drawn equally often until the strings of one run out: there are only 2^b of b bits,
    510 of 1 to 8 bits.

    Args:
        size: Number of strings.
        min_bits: Length of the shortest.
        max_bits: Length of the longest.
        running: Whether the parity of the bits so far is predicted after every bit too. From 400
            strings of up to 8 bits a small looped GPT then learns several times faster, and the
            rule rather than the strings. The texts stay the same.
        seed: The same seed gives the same strings.

    Returns:
        Rows of `max_bits + 2` positions.

    Raises:
        ValueError: If an argument is impossible, or there are fewer than `size` such strings.

    Example:
        >>> data = parity(100)
        >>> data.text(0)
        '00110010=1'
        >>> train, held_out = data.split(held_out=20)
        >>> len(train), len(held_out)
        (80, 20)
        >>> data.examples[0].targets, parity(100, running=True).examples[0].targets
        ('         1', ' 001000111')
    """
    check_range("bits", min_bits, max_bits)
    spaces = {bits: 2**bits for bits in range(min_bits, max_bits + 1)}
    examples = draw_examples(size, seed, spaces, partial(_example, running))
    return TaskDataset(examples, characters="01=", length=max_bits + 2)


def _example(running: bool, bits: int, number: int) -> Example:
    string = f"{number:0{bits}b}"
    so_far = [str(string[:end].count("1") % 2) for end in range(1, bits + 1)]
    if not running:
        return Example.question(f"{string}=", so_far[-1])
    # What is predicted after a bit is the target of the next position.
    return Example(f"{string}={so_far[-1]}", f" {''.join(so_far)}{so_far[-1]}")

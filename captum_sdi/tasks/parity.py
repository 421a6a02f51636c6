"""Parity: is the number of ones in a bit string odd?"""

from functools import partial

from captum_sdi.tasks.arguments import check_range
from captum_sdi.tasks.dataset import Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples


def parity(
    size: int,
    min_bits: int = 1,
    max_bits: int = 8,
    running: bool = False,
    seed: int = 0,
) -> TaskDataset:
    """Draw different bit strings, each followed by its parity: "10110=1".

    Lengths are drawn equally often until the strings of one run out: there are only 2^b of b bits,
    510 of 1 to 8 bits.

    With `running` the parity of the bits so far is predicted after every bit too. From 400 strings of
    up to 8 bits a small looped GPT then learns several times faster, and the rule rather than the
    strings. The texts stay the same.

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
    lengths = range(min_bits, max_bits + 1)
    spaces = {bits: 2**bits for bits in lengths}
    examples = draw_examples(size, seed, spaces, partial(parity_example, running=running))
    return TaskDataset(examples, characters="01=", length=max_bits + 2)


def parity_example(bits: int, number: int, *, running: bool) -> Example:
    """Return the bit string that writes `number`, followed by its parity."""
    string = f"{number:0{bits}b}"
    parity_so_far = 0
    running_parity = ""
    for bit in string:
        parity_so_far ^= int(bit)
        running_parity += str(parity_so_far)
    answer = str(parity_so_far)
    example = Example.question(f"{string}=", answer)
    if running:
        # A causal model predicts after a bit the target of the next position.
        return example._replace(targets=f" {running_parity}{answer}")
    return example

"""Addition of two binary numbers."""

from captum_sdi.tasks.arguments import check_range
from captum_sdi.tasks.dataset import Example, TaskDataset
from captum_sdi.tasks.drawing import draw_examples


def addition(
    size: int,
    min_bits: int = 1,
    max_bits: int = 4,
    seed: int = 0,
) -> TaskDataset:
    """Draw different sums of two numbers of equally many bits: "110+011=1001" is 6 + 3 = 9.

    The operands start with their highest bit. The answer, one bit longer, starts with its lowest:
    each bit then follows from two bits of the operands and one carry.

    Lengths are drawn equally often until the sums of one run out: there are 4^b of b bits.

    Returns:
        Rows of `3 * max_bits + 3` positions.

    Raises:
        ValueError: If an argument is impossible, or there are fewer than `size` such sums.

    Example:
        >>> data = addition(300, max_bits=4)
        >>> data.text(0)
        '0000+0111=11100'
    """
    check_range("bits", min_bits, max_bits)
    lengths = range(min_bits, max_bits + 1)
    spaces = {bits: 4**bits for bits in lengths}
    examples = draw_examples(size, seed, spaces, addition_example)
    return TaskDataset(examples, characters="01+=", length=3 * max_bits + 3)


def addition_example(bits: int, number: int) -> Example:
    """Return the sum with that number: its digits in base 2^bits are the operands."""
    left, right = divmod(number, 2**bits)
    left_bits = binary(left, bits)
    right_bits = binary(right, bits)
    answer = binary(left + right, bits + 1)[::-1]
    return Example.question(f"{left_bits}+{right_bits}=", answer)


def binary(number: int, bits: int) -> str:
    """Write a number in `bits` bits, the highest first."""
    return f"{number:0{bits}b}"

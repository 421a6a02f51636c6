"""Addition of two binary numbers."""

from captum_sdi.tasks.dataset import Example, TaskDataset, check_range, draw_examples


def addition(size: int, min_bits: int = 1, max_bits: int = 4, seed: int = 0) -> TaskDataset:
    """Draw different sums of two numbers of equally many bits: "110+011=1001" is 6 + 3 = 9.

    The operands start with their highest bit. The answer, one bit longer, starts with its lowest:
    each bit then follows from two bits of the operands and one carry.

    Lengths are drawn equally often until the sums of one run out: there are 4^b of b bits.

    Args:
        size: Number of sums.
        min_bits: Length of the shortest operands.
        max_bits: Length of the longest operands.
        seed: The same seed gives the same sums.

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
    spaces = {bits: 4**bits for bits in range(min_bits, max_bits + 1)}
    examples = draw_examples(size, seed, spaces, _example)
    return TaskDataset(examples, characters="01+=", length=3 * max_bits + 3)


def _example(bits: int, number: int) -> Example:
    left, right = divmod(number, 2**bits)
    answer = f"{left + right:0{bits + 1}b}"[::-1]
    return Example.question(f"{left:0{bits}b}+{right:0{bits}b}=", answer)

"""The arguments of the judges, checked: scores, truths and flags as float64 numbers on the CPU."""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.words import is_integer

Numbers: TypeAlias = ArrayLike | Tensor
SCORES = "(q, n) or (q, n, t)"


def as_numbers(
    name: str,
    values: Numbers,
    shape: str,
    ndims: tuple[int, ...],
) -> Tensor:
    """Return an argument as finite float64 numbers on the CPU; ``shape`` is ``ndims`` in words."""
    if not isinstance(values, Tensor):
        values = torch.as_tensor(np.asarray(values))
    if values.is_complex():
        raise ValueError(f"{name} holds complex numbers; it must hold real ones.")
    numbers = values.detach().to("cpu", torch.float64)
    if numbers.ndim not in ndims or 0 in numbers.shape:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; it must be {shape}.")
    not_finite = ~numbers.isfinite()
    if not_finite.any():
        count = int(not_finite.sum())
        raise ValueError(f"{name} has {count} values that are NaN or infinite; leave those examples out.")
    return numbers


def as_pair(scores: Numbers, truth: Numbers, truth_name: str) -> tuple[Tensor, Tensor]:
    """Return scores and truth as tensors of one shape; a truth of totals is that of every step."""
    predicted = as_numbers("scores", scores, SCORES, (2, 3))
    expected = as_numbers(truth_name, truth, SCORES, (2, 3))
    shape = tuple(predicted.shape)
    totals_shape = shape[:2]
    received = tuple(expected.shape)
    if received not in (shape, totals_shape):
        raise ValueError(f"{truth_name} has shape {received}; it must be that of scores, {shape}, or {totals_shape}.")
    if expected.ndim < predicted.ndim:
        expected = expected[..., None].expand_as(predicted)
    return predicted, expected


def generator_of(seed: int) -> torch.Generator:
    """Return a generator of random numbers.

    Raises:
        TypeError: If the seed is no int.
    """
    if not is_integer(seed):
        raise TypeError(f"seed must be an int, got {seed!r}.")
    return torch.Generator().manual_seed(seed)


def are_flags(numbers: Tensor) -> bool:
    """Tell whether all numbers are 0 or 1."""
    zero_or_one = (numbers == 0) | (numbers == 1)
    return bool(zero_or_one.all())

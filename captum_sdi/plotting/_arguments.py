"""Arguments of the plots, checked before there is a figure: numbers, positions, texts, limits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.float64]
Positions: TypeAlias = NDArray[np.int64]


def finite_array(name: str, values: Any) -> Array:
    """Return any tensor, array or nested list as finite float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers: a tensor or array, got {type(values).__name__}.") from error
    not_finite = np.argwhere(~np.isfinite(numbers))
    count = len(not_finite)
    if count:
        first = tuple(not_finite[0].tolist())
        raise ValueError(
            f"{name} has {count} of {numbers.size} values that are not finite, the first ({numbers[first]}) "
            f"at {first}. Leave those examples out, or look for the loss that overflowed."
        )
    return numbers


def check_integer(name: str, value: int) -> int:
    """Check that a value is an integer, of Python, NumPy or PyTorch."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} takes integers that count from 0, got {value!r}.") from error


def check_integers(name: str, values: Sequence[int]) -> list[int]:
    """Check that values are a sequence of integers, and not an empty one."""
    if isinstance(values, (str, int)) or not len(values):
        raise ValueError(f"{name} must be a sequence of integers with at least one entry, got {values!r}.")
    return [check_integer(name, value) for value in values]


def check_position(name: str, value: int, size: int) -> int:
    """Check that a position lies in a result of ``size`` examples."""
    if not 0 <= check_integer(name, value) < size:
        raise ValueError(f"{name}={value} is out of range: the result has {size}, so pass 0 to {size - 1}.")
    return int(value)


def check_positions(name: str, values: Sequence[int] | None, size: int) -> Positions:
    """Check that positions lie in a result of ``size`` examples; None = all of them."""
    if values is None:
        return np.arange(size)
    integers = check_integers(name, values)
    return np.array([check_position(name, integer, size) for integer in integers])


def check_texts(
    name: str,
    texts: Sequence[str] | None,
    size: int,
    *,
    exact: bool = True,
) -> None:
    """Check that there is one string for each of ``size`` examples, or at least as many."""
    if texts is None:
        return
    if isinstance(texts, str):
        received = "one string"
    elif len(texts) == size or (len(texts) > size and not exact):
        return
    else:
        received = str(len(texts))
    expected = str(size) if exact else f"at least {size}"
    raise ValueError(f"{name} must be one string per example, in order: expected {expected}, got {received}.")


def check_limit(limit: float | None) -> None:
    """Check that the value at which colours saturate is positive."""
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"limit must be a positive number or None, got {limit!r}.")

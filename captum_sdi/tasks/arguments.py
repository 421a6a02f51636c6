"""Checks of the arguments of a task: integers within bounds."""

from typing import Any

from captum_sdi.words import is_integer


def check_integer(
    name: str,
    value: Any,
    minimum: int | None = None,
    maximum: int | None = None,
) -> None:
    """Raise ValueError naming the argument unless it is an integer within the bounds."""
    is_valid = is_integer(value)
    bounds = []
    if minimum is not None:
        bounds.append(f"at least {minimum}")
        is_valid = is_valid and value >= minimum
    if maximum is not None:
        bounds.append(f"at most {maximum}")
        is_valid = is_valid and value <= maximum
    if not is_valid:
        within_bounds = f" of {' and '.join(bounds)}" if bounds else ""
        raise ValueError(f"{name}={value!r} must be an integer{within_bounds}.")


def check_range(
    name: str,
    fewest: int,
    most: int,
    minimum: int = 1,
    maximum: int | None = None,
) -> None:
    """Raise ValueError unless `min_NAME` to `max_NAME` is a range of integers within the bounds."""
    check_integer(f"min_{name}", fewest, minimum, maximum)
    check_integer(f"max_{name}", most, minimum, maximum)
    if fewest > most:
        raise ValueError(f"min_{name}={fewest} is more than max_{name}={most}; swap or change them.")

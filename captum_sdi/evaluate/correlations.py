"""Correlations over training examples, or over subsets: one for each test example and step."""

import torch
from torch import Tensor

KINDS = ("spearman", "pearson")


def check_kind(kind: str) -> None:
    """Check that a correlation is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {KINDS}.")


def row_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return correlations ``(q, ...)`` along the second axis of two `unit_deviations`."""
    return (first * second).sum(1).clamp(-1, 1)


def unit_deviations(name: str, values: Tensor, *, ranks: bool) -> Tensor:
    """Return deviations from the mean of the second axis, of norm 1; of values or their ranks."""
    _check_varied(name, values)
    if ranks:
        values = average_ranks(values)
    deviations = values - values.mean(1, keepdim=True)
    # Scaled first: squares of tiny influences would be lost.
    deviations = deviations / deviations.abs().amax(1, keepdim=True)
    squared_norm = deviations.square().sum(1, keepdim=True)
    return deviations / squared_norm.sqrt()


def average_ranks(values: Tensor) -> Tensor:
    """Return ranks from 1 along the second axis of ``(q, m, ...)``; ties share their average.

    Returns:
        As ``values``, float64.

    Example:
        >>> average_ranks(torch.tensor([[30.0, 10.0, 30.0]]))
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    rows = values.movedim(1, -1).contiguous()
    in_order = rows.sort(-1).values
    n_below = torch.searchsorted(in_order, rows)
    n_up_to = torch.searchsorted(in_order, rows, right=True)
    ranks = (n_below + 1 + n_up_to).double() / 2
    return ranks.movedim(-1, 1)


def _check_varied(name: str, values: Tensor) -> None:
    """Check that no test example's values are all equal."""
    equal = (values == values[:, :1]).all(1)
    places = equal.nonzero().tolist()
    if places:
        test, *steps = places[0]
        example = f"test example {test}"
        if steps:
            example += f" at step {steps[0]}"
        raise ValueError(f"{name}: all values of {example} are equal: no correlation is defined; leave it out.")

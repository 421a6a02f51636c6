"""The slopes of a function in each of its scales at zero: all by one call, where torch can, or one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacfwd

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps scales ``(b,)`` to what depends on them, twice."""


def slopes_at_zero(function: Function, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a function at zero and its slopes there, by forward-mode differentiation.

    One call computes the function once and carries the slopes in all scales beside it. What cannot be done for all at
    once (in place, or by an operation of the user's that knows one tangent only) is done for one scale at a time.

    Args:
        function: Maps scales to an output, and to the same once more.
        zeros: ``(b,)``.

    Returns:
        The output, and its slopes with an axis ``b`` behind.

    Example:
        >>> def function(scales):
        ...     output = torch.outer(torch.tensor([1.0, 2.0]), scales).sum(1) + 5
        ...     return output, output
        >>> slopes_at_zero(function, torch.zeros(3))
        (tensor([5., 5.]), tensor([[1., 1., 1.],
                [2., 2., 2.]]))
    """
    if len(zeros) == 0:
        output, _ = function(zeros)
        return output, output.new_zeros(*output.shape, 0)
    try:
        slopes, output = jacfwd(function, has_aux=True)(zeros)
    except RuntimeError:
        return slopes_one_by_one(function, zeros)
    return output, slopes


def slopes_one_by_one(function: Function, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a function at zero and its slopes there, by a call for each scale."""
    columns = []
    for direction in torch.eye(len(zeros)).to(zeros):
        with forward_ad.dual_level():
            dual_output, _ = function(forward_ad.make_dual(zeros, direction))
            output, slope = forward_ad.unpack_dual(dual_output)
        columns.append(torch.zeros_like(output) if slope is None else slope)
    return output, torch.stack(columns, dim=-1)

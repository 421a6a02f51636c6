"""Clipping a gradient's norm, as `torch.nn.utils.clip_grad_norm_` does, and its adjoint.

With s = min(1, κ / (‖h‖ + 1e-6)) the clipped gradient is g = s h.
"""

from __future__ import annotations

from torch import Tensor

_SMALL = 1e-6
"""What torch adds to the norm."""


def clipped(gradient: Tensor, max_norm: float | None) -> Tensor:
    """Return a gradient ``(size,)`` of at most this norm; None clips nothing.

    Example:
        >>> import torch
        >>> clipped(torch.tensor([3.0, 4.0]), max_norm=1.0)
        tensor([0.6000, 0.8000])
    """
    return gradient if max_norm is None else gradient * clip_scale(gradient, max_norm)


def clip_scale(gradient: Tensor, max_norm: float) -> Tensor:
    """Return s, what a gradient is multiplied by."""
    scale = max_norm / (gradient.norm() + _SMALL)
    return scale.clamp(max=1)


def clip_pullback(
    gradient: Tensor,
    directions: Tensor,
    max_norm: float | None,
) -> Tensor:
    """Return the adjoint of `clipped`: where it clips, s (c - h ⟨c, h⟩ / (‖h‖ (‖h‖ + 1e-6))).

    Args:
        gradient: ``(size,)`` h, before it was clipped.
        directions: ``(seeds, size)`` c, how much the seeds change with the clipped gradient.
        max_norm: κ.

    Returns:
        ``(seeds, size)`` how much they change with the gradient before.
    """
    if max_norm is None:
        return directions
    scale = clip_scale(gradient, max_norm)
    if scale == 1:
        return directions
    norm = gradient.norm()
    projection = directions @ gradient / (norm * (norm + _SMALL))
    return scale * (directions - projection.unsqueeze(-1) * gradient)

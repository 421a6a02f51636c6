"""Is a trajectory's *shape* right, and not only its total?"""

from __future__ import annotations

from torch import Tensor

from captum_sdi.evaluate.arguments import Numbers, as_numbers


def deviation_from_step_mean(trajectories: Numbers) -> Tensor:
    """Take each example's mean over loop steps away from its trajectory.

    A score that gets totals right and spreads them evenly agrees with every step's truth, and says nothing about
    steps. What is left here is what only a score by step can know; judge it by ``two_way_correlation(...,
    pool_steps=True)`` against the deviations of the measured effects.

    Args:
        trajectories: ``(q, n, t)`` influences or measured effects by step.

    Returns:
        ``(q, n, t)`` float64 on the CPU, of sum 0 over steps.

    Raises:
        ValueError: If the shape is another one, there is one step alone, or a value is NaN.

    Example:
        >>> deviation_from_step_mean([[[1.0, 2.0, 6.0]]])
        tensor([[[-2., -1.,  3.]]], dtype=torch.float64)
    """
    by_step = as_numbers("trajectories", trajectories, "(q, n, t)", (3,))
    if by_step.shape[2] == 1:
        raise ValueError("trajectories has one loop step: there is nothing that deviates from its mean.")
    return by_step - by_step.mean(2, keepdim=True)

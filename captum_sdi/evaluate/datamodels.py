"""The linear datamodeling score: do summed influences predict models trained on random subsets?"""

import torch
from torch import Tensor

from captum_sdi.evaluate.arguments import SCORES, Numbers, are_flags, as_numbers, generator_of
from captum_sdi.evaluate.correlations import row_correlations, unit_deviations
from captum_sdi.evaluate.intervals import LEVEL, Estimate, mean_estimate


def draw_subsets(
    n: int,
    m: int,
    fraction: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Draw random subsets of the training set, all equally large.

    Args:
        n: Number of training examples.
        m: Number of subsets. Park et al. take 100.
        fraction: Share of the examples in a subset.
        seed: The same seed gives the same subsets.

    Returns:
        ``(m, n)`` booleans: which examples a subset keeps.

    Raises:
        ValueError: If a subset would be empty or complete, or ``m`` is below 1.

    Example:
        >>> draw_subsets(n=10, m=3, fraction=0.3).sum(1)
        tensor([3, 3, 3])
    """
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(f"fraction={fraction!r} of n={n} examples keeps {size}; keep some and leave some out.")
    if m < 1:
        raise ValueError(f"m={m!r} must be an integer of at least 1.")
    generator = generator_of(seed)
    permutations = torch.rand(m, n, generator=generator).argsort(dim=1)
    return permutations < size


def predicted_outputs(scores: Numbers, subsets: Numbers) -> Tensor:
    """Sum the influences of each subset's examples: the outputs, minus the losses, that scores predict for it.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` by step.
        subsets: ``(m, n)`` booleans: which training examples each subset keeps.

    Returns:
        ``(q, m)`` or ``(q, m, t)``, float64 on the CPU.

    Raises:
        ValueError: If shapes do not fit or a value is NaN.

    Example:
        >>> predicted_outputs([[2.0, -1.0, 0.5]], [[True, False, True], [False, True, True]])
        tensor([[ 2.5000, -0.5000]], dtype=torch.float64)
    """
    influence = as_numbers("scores", scores, SCORES, (2, 3))
    kept = as_numbers("subsets", subsets, "booleans (m, n)", (2,))
    n = influence.shape[1]
    if kept.shape[1] != n or not are_flags(kept):
        raise ValueError(
            f"subsets has shape {tuple(kept.shape)}; it must be booleans (m, n) with n = {n}, as in scores."
        )
    return torch.einsum("mn,qn...->qm...", kept, influence)


def linear_datamodeling_score(
    scores: Numbers,
    subsets: Numbers,
    losses: Numbers,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Measure the linear datamodeling score (Park et al., "TRAK", arXiv 2303.14186).

    A subset's predicted output is the sum of the influences of its examples; the score is the mean over test examples
    of Spearman's correlation, over subsets, between predicted and measured outputs. The measured output is minus the
    loss: proponents lower it, so good influences score towards +1, and random ones 0.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        subsets: ``(m, n)`` booleans: which training examples each subset keeps, from `draw_subsets`.
        losses: ``(q, m)`` the test losses of a model trained on each subset, from `retrained_losses`.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap over test examples.

    Returns:
        The mean over test examples.

    Raises:
        ValueError: If shapes do not fit, a value is NaN, or a test example's predictions or losses are all equal.

    Example:
        >>> subsets = [[True, False], [False, True]]
        >>> print(linear_datamodeling_score([[2.0, -1.0], [1.0, 0.0]], subsets, losses=[[0.1, 0.9], [0.2, 0.3]]))
        1.000 [1.000, 1.000], n = 2
    """
    predicted = predicted_outputs(scores, subsets)
    measured = as_numbers("losses", losses, "(q, m)", (2,))
    q, m, *steps = predicted.shape
    if measured.shape != (q, m):
        raise ValueError(f"losses has shape {tuple(measured.shape)}; it must be (q, m) = {(q, m)}.")
    outputs = -measured
    if steps:
        outputs = outputs[..., None].expand_as(predicted)
    first = unit_deviations("predictions from scores", predicted, ranks=True)
    second = unit_deviations("losses", outputs, ranks=True)
    return mean_estimate(row_correlations(first, second), level, seed)

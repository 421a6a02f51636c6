"""The truth about removal: models trained again on other subsets of the training set."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

Retrain = Callable[[Tensor, int], Tensor]
"""``retrain(kept, seed) -> (q, ...)``: trains on the examples at the positions ``kept`` and returns the test losses."""


def retrained_losses(
    retrain: Retrain, subsets: Tensor, seeds: Sequence[int] = (0,), show_progress: bool = False
) -> Tensor:
    """Train on each subset and return the test losses, averaged over seeds.

    Args:
        retrain: Trains on a subset; see `captum_sdi.evaluate`.
        subsets: ``(m, n)`` booleans: which training examples each subset keeps.
        seeds: One training run for each; averaging takes the noise of training out of the losses.
        show_progress: Shows a progress bar over training runs.

    Returns:
        ``(q, m, ...)`` float64, on the CPU.

    Raises:
        ValueError: ``subsets`` or ``seeds`` is impossible, or ``retrain`` returned something else than finite losses.

    Example:
        >>> def retrain(kept, seed):  # a "model" of two test examples whose losses fall with the examples it saw
        ...     return torch.stack([1 - kept.eq(0).sum(), 1 - kept.eq(1).sum()])
        >>> retrained_losses(retrain, torch.tensor([[True, False, True], [True, True, False]]))
        tensor([[0., 0.],
                [1., 0.]], dtype=torch.float64)
    """
    if subsets.dtype != torch.bool or subsets.ndim != 2:
        raise ValueError(f"subsets is {subsets.dtype} {tuple(subsets.shape)}; it must be torch.bool (m, n).")
    if not subsets.any(1).all():
        raise ValueError(f"subset {int((~subsets.any(1)).nonzero()[0])} is empty; keep something to train on.")
    if not seeds:
        raise ValueError("seeds is empty; pass at least one.")
    losses: list[Tensor] = []
    with tqdm(total=len(subsets) * len(seeds), desc="retraining", disable=not show_progress) as bar:
        for subset in subsets:
            runs: list[Tensor] = []
            for seed in seeds:
                runs.append(_checked(retrain(subset.nonzero()[:, 0], seed), [*losses, *runs]))
                bar.update()
            losses.append(torch.stack(runs).mean(0))
    return torch.stack(losses, dim=1)


def removal_effects(
    retrain: Retrain, n: int, removed: Iterable[Tensor], seeds: Sequence[int] = (0,), show_progress: bool = False
) -> Tensor:
    """How much higher the test losses are without some training examples than with all.

    The runs with and without start from the same seeds, so that their noise partly cancels.

    Args:
        retrain: Trains on a subset; see `captum_sdi.evaluate`.
        n: Number of training examples.
        removed: For each effect, the positions of the training examples to do without.
        seeds: One training run for each.
        show_progress: Shows a progress bar over training runs.

    Returns:
        ``(q, m, ...)`` for m sets of removed examples: positive where the removed ones were proponents together.

    Raises:
        ValueError: A position is out of range, nothing is left to train on, or what `retrained_losses` raises.

    Example:
        >>> removal_effects(lambda kept, seed: -kept.sum().view(1), n=4, removed=[torch.tensor([1, 3])])
        tensor([[4.]], dtype=torch.float64)
    """
    subsets = [torch.ones(n, dtype=torch.bool)]
    for positions in removed:
        positions = torch.as_tensor(positions).reshape(-1)
        if positions.is_floating_point() or not ((positions >= 0) & (positions < n)).all():
            raise ValueError(f"removed={positions.tolist()} must be positions from 0 to n - 1 = {n - 1}.")
        subsets.append(torch.ones(n, dtype=torch.bool).index_fill(0, positions.cpu().long(), False))
    if len(subsets) == 1:
        raise ValueError("removed is empty; pass at least one set of positions.")
    losses = retrained_losses(retrain, torch.stack(subsets), seeds, show_progress)
    return losses[:, 1:] - losses[:, :1]


def leave_one_out(
    retrain: Retrain,
    n: int,
    indices: Iterable[int] | None = None,
    seeds: Sequence[int] = (0,),
    show_progress: bool = False,
) -> Tensor:
    """How much higher the test losses are without one training example: the definition that influence approximates.

    Cook & Weisberg, Residuals and Influence in Regression, 1982; compare with scores by `correlation`.

    Args:
        retrain: Trains on a subset; see `captum_sdi.evaluate`.
        n: Number of training examples.
        indices: Which of them to leave out, one at a time; None is all.
        seeds: One training run for each.
        show_progress: Shows a progress bar over training runs.

    Returns:
        ``(q, len(indices), ...)``: positive for proponents.

    Raises:
        ValueError: As `removal_effects`.

    Example:
        >>> leave_one_out(lambda kept, seed: -kept.sum().view(1), n=4, indices=[3, 1])
        tensor([[3., 1.]], dtype=torch.float64)
    """
    chosen = range(n) if indices is None else indices
    return removal_effects(retrain, n, [torch.tensor([i]) for i in chosen], seeds, show_progress)


def _checked(losses: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Losses as float64 on the CPU; an error unless they are finite and shaped like the earlier ones."""
    if not isinstance(losses, Tensor) or losses.ndim == 0 or 0 in losses.shape:
        shown = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"retrain returned {shown}; it must return a tensor (q,) or (q, ...) of test losses.")
    if earlier and losses.shape != earlier[0].shape:
        raise ValueError(f"retrain returned shape {tuple(losses.shape)}, before {tuple(earlier[0].shape)}.")
    if not losses.isfinite().all():
        raise ValueError("retrain returned losses that are NaN or infinite: that training run diverged.")
    return losses.detach().to("cpu", torch.float64)

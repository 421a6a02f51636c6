"""The truth about removal: models trained again, on subsets of the training set."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

Retrain = Callable[[Tensor, int], Tensor]
"""``retrain(kept, seed) -> (q, ...)``: train on the examples at the positions ``kept`` and return the test losses."""


def retrained_losses(
    retrain: Retrain,
    subsets: Tensor,
    seeds: Sequence[int] = (0,),
    show_progress: bool = False,
) -> Tensor:
    """Train on each subset and return the test losses, averaged over seeds.

    Args:
        retrain: Trains on a subset; see `captum_sdi.evaluate`.
        subsets: ``(m, n)`` booleans: which training examples each subset keeps.
        seeds: One training run for each; their average takes the noise of training out of the losses.
        show_progress: Shows a progress bar over training runs.

    Returns:
        ``(q, m, ...)`` float64, on the CPU.

    Raises:
        ValueError: If ``subsets`` or ``seeds`` is impossible, or ``retrain`` returned anything but finite losses.

    Example:
        >>> def retrain(kept, seed):  # a "model" of two test examples whose losses fall with the examples it saw
        ...     return torch.stack([1 - kept.eq(0).sum(), 1 - kept.eq(1).sum()])
        >>> retrained_losses(retrain, torch.tensor([[True, False, True], [True, True, False]]))
        tensor([[0., 0.],
                [1., 0.]], dtype=torch.float64)
    """
    if subsets.dtype != torch.bool or subsets.ndim != 2:
        raise ValueError(f"subsets is {subsets.dtype} {tuple(subsets.shape)}; it must be torch.bool (m, n).")
    if len(subsets) == 0:
        raise ValueError("subsets is empty; pass at least one.")
    empty = (~subsets.any(1)).nonzero()
    if len(empty):
        raise ValueError(f"subset {int(empty[0])} is empty; keep something to train on.")
    if not seeds:
        raise ValueError("seeds is empty; pass at least one.")
    subset_losses = []
    shape: torch.Size | None = None
    n_runs = len(subsets) * len(seeds)
    with tqdm(total=n_runs, desc="retraining", disable=not show_progress) as progress:
        for subset in subsets:
            kept = subset.nonzero()[:, 0]
            runs = []
            for seed in seeds:
                losses = _check_losses(retrain(kept, seed), shape)
                shape = losses.shape
                runs.append(losses)
                progress.update()
            subset_losses.append(torch.stack(runs).mean(0))
    return torch.stack(subset_losses, dim=1)


def removal_effects(
    retrain: Retrain,
    n: int,
    removed: Iterable[Tensor],
    seeds: Sequence[int] = (0,),
    show_progress: bool = False,
) -> Tensor:
    """Measure how much higher the test losses are without some training examples than with all.

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
        ValueError: If a position is out of range, nothing is left to train on, or `retrained_losses` raises it.

    Example:
        >>> removal_effects(lambda kept, seed: -kept.sum().view(1), n=4, removed=[torch.tensor([1, 3])])
        tensor([[4.]], dtype=torch.float64)
    """
    all_examples = torch.ones(n, dtype=torch.bool)
    subsets = [all_examples]
    for positions in removed:
        positions = torch.as_tensor(positions).reshape(-1)
        in_range = (positions >= 0) & (positions < n)
        is_wrong = positions.is_floating_point() or positions.dtype == torch.bool
        if is_wrong or not in_range.all():
            raise ValueError(f"removed={positions.tolist()} must be positions from 0 to n - 1 = {n - 1}.")
        subset = all_examples.clone()
        subset[positions.cpu().long()] = False
        subsets.append(subset)
    if len(subsets) == 1:
        raise ValueError("removed is empty; pass at least one set of positions.")
    losses = retrained_losses(retrain, torch.stack(subsets), seeds, show_progress=show_progress)
    complete_losses = losses[:, :1]
    without_removed = losses[:, 1:]
    return without_removed - complete_losses


def leave_one_out(
    retrain: Retrain,
    n: int,
    indices: Iterable[int] | None = None,
    seeds: Sequence[int] = (0,),
    show_progress: bool = False,
) -> Tensor:
    """Measure how much higher the test losses are without one training example.

    This is the definition that influence approximates (Cook & Weisberg, Residuals and Influence in Regression, 1982);
    compare it with scores by `correlation`.

    Args:
        retrain: Trains on a subset; see `captum_sdi.evaluate`.
        n: Number of training examples.
        indices: Which of them to leave out, one at a time; None is all.
        seeds: One training run for each.
        show_progress: Shows a progress bar over training runs.

    Returns:
        ``(q, len(indices), ...)``: positive for proponents.

    Raises:
        ValueError: If `removal_effects` raises it.

    Example:
        >>> leave_one_out(lambda kept, seed: -kept.sum().view(1), n=4, indices=[3, 1])
        tensor([[3., 1.]], dtype=torch.float64)
    """
    chosen = range(n) if indices is None else indices
    removed = [torch.tensor([index]) for index in chosen]
    return removal_effects(retrain, n, removed, seeds, show_progress=show_progress)


def _check_losses(losses: Tensor, shape: torch.Size | None) -> Tensor:
    """Return losses as float64 on the CPU, checked to be finite and of the earlier runs' shape."""
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"retrain returned {type(losses).__name__}; it must return a tensor (q,) or (q, ...) of test losses."
        )
    received = tuple(losses.shape)
    if losses.ndim == 0 or 0 in received:
        raise ValueError(f"retrain returned shape {received}; it must return a tensor (q,) or (q, ...) of test losses.")
    if shape is not None and losses.shape != shape:
        raise ValueError(f"retrain returned shape {received}, before {tuple(shape)}.")
    if not losses.isfinite().all():
        raise ValueError("retrain returned losses that are NaN or infinite: that training run diverged.")
    return losses.detach().to("cpu", torch.float64)

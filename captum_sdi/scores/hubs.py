"""Hubs: train examples that are among the strongest of very many test examples, whatever these ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_sdi.words import is_integer

_SHOWN = 5
"""Of hubs, when they are printed."""
DEFAULT_LENGTH = 10
"""Of a top list, where the result holds all train examples."""


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Hubs:
    """The train examples that fill the top lists."""

    indices: Tensor
    """``(m,)`` those in at least one list, by falling number of lists."""
    counts: Tensor
    """``(m,)`` in how many lists each of them is."""
    n_lists: int
    """One for each test example."""
    length: int
    """Of each list."""
    n_train: int | None = None
    """How many train examples there are; None where the result holds only some of them."""

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        known = "" if self.n_train is None else f" of {self.n_train}"
        ranked = zip(self.indices.tolist()[:_SHOWN], self.counts.tolist(), strict=False)
        counted = [f"#{index} in {count}" for index, count in ranked]
        first, *others = counted
        named = ", ".join([first.replace(" in ", " is in ") + " lists", *others])
        return (
            f"{len(self)}{known} training examples fill the top {self.length} of {self.n_lists} test examples: {named}"
        )


def find_hubs(totals: Tensor, indices: Tensor | None, k: int | None) -> Hubs:
    """Count in how many top lists each train example is; see `StepInfluence.hubs`.

    Args:
        totals: ``(q, n)``, or ``(q, k)`` best first.
        indices: ``(q, k)`` the train examples; None when all are given in order.
        k: The length of the lists; None: that of the result, and at most 10 where it holds all train examples.

    Returns:
        The train examples in any list.

    Raises:
        ValueError: If k is less than 1 or more than there are, or the totals are not of pairs.
    """
    if totals.dim() != 2 or not totals.numel():
        raise ValueError(f"hubs() needs top lists of test examples, (q, n), got totals of shape {tuple(totals.shape)}.")
    n_held = totals.shape[1]
    if k is None:
        k = n_held if indices is not None else min(DEFAULT_LENGTH, n_held)
    if not (is_integer(k) and 1 <= k <= n_held):
        raise ValueError(
            f"k={k!r} must be an int from 1 to the {n_held} training examples that the result holds of each test."
        )
    top = totals.topk(k).indices if indices is None else indices[:, :k]
    hub_examples, counts = top.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    n_train = n_held if indices is None else None
    return Hubs(hub_examples[order], counts[order], len(totals), k, n_train)

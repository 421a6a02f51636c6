"""When an example is run alone beside its batch: where a batch shows something that none has shown before.

Two runs alone are all that is spent on the examples of a manner. The first one goes to the first batch. Where this
shows all that a batch can, the second one goes there as well; else it waits for the first batch that shows more, since
what depends on what the examples are, such as sorting them by length, need not show in the first one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

N_ALONE = 2

NEIGHBOURS, PADDING = "neighbours", "padding"
ORDERS = frozenset({"not ascending", "not descending"})
"""Of lengths: a model that sorts its examples leaves a batch in order as it is."""


@dataclass
class Turns:
    """What the batches of one manner have shown so far."""

    n_alone: int = 0
    """How many examples have been run alone."""
    seen: set[str] = field(default_factory=set)
    """What batches have shown that an example was compared in."""
    padding_comes: bool = False
    """Whether a batch that was read, for something else than features, has padding."""
    largest: tuple[int, int] = (0, 0)
    """Loop steps and examples of the largest batch whose example waits."""

    def grows(self, n_examples: int, n_steps: Tensor) -> bool:
        """Say whether the example that waits is to be one of this batch: what is felt in it is felt the most.

        Room for so many tokens, or a loop that halts when all examples have settled, shows in a larger or deeper batch.

        Returns:
            Whether it is.
        """
        size = int(n_steps.max()), n_examples
        if self.n_alone >= N_ALONE or size <= self.largest:
            return False
        self.largest = size
        return True

    def begin(self, shown: Collection[str]) -> bool:
        """Note what the first batch has shown; say whether the second example is to be compared there, too."""
        self.seen |= set(shown)
        return self.n_alone < N_ALONE and {PADDING, *ORDERS} <= self.seen

    def take(self, shown: Collection[str]) -> bool:
        """Say whether an example of a later batch is to be compared, and note what it has shown.

        Padding, and a layer that is called once for a batch, are never left unseen: they cost a third run where the
        second one went to another of them.

        Returns:
            Whether it is.
        """
        news = set(shown) - self.seen
        if not news or (self.n_alone >= N_ALONE and news <= ORDERS):
            return False
        is_awaited = self.padding_comes and PADDING not in self.seen
        if is_awaited and news <= {NEIGHBOURS, *ORDERS}:  # else a third run would go to the batch that has it
            return False
        self.seen |= news
        return True


def shown_by(lengths: Sequence[int], called_once: Collection[str]) -> set[str]:
    """Return what a batch of several examples shows.

    Args:
        lengths: Of its examples.
        called_once: Names of the layers that the model called once for the whole batch, or for one example of it.

    Returns:
        Names of what it shows.

    Example:
        >>> sorted(shown_by([3, 5], called_once=[]))
        ['neighbours', 'not descending', 'padding']
    """
    shown = {NEIGHBOURS, *(f"once {name}" for name in called_once)}
    if len(set(lengths)) > 1:
        shown.add(PADDING)
    if list(lengths) != sorted(lengths):
        shown.add("not ascending")
    if list(lengths) != sorted(lengths, reverse=True):
        shown.add("not descending")
    return shown

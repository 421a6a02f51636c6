"""Per-token gradients, from rules that know per-example ones only.

The gradient of an example is a sum over its token positions p, as each row g_p of the backprop contributes on its own.
A rule whose positions do not look at each other (`Rule.positionwise`) is handed each position as an example; any other
one is called once for each position, with the backprop of all others set to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from captum_sdi.capture import refusals
from captum_sdi.capture.owners import Owner
from captum_sdi.capture.rules.base import PerExample, Rule, positions_as_examples

Unit = Literal["example", "token"]
"""What one row of features is of."""


class TokenAxes:
    """The second axes of what layers read and returned: are they the token positions?"""

    def __init__(self) -> None:
        self._first_uses: dict[int | None, tuple[Owner, torch.Size, torch.Size]] = {}

    def note(self, owner: Owner, activation: Tensor, output: Tensor) -> None:
        """Note a layer's call."""
        n_tokens = token_count(activation, output)
        self._first_uses.setdefault(n_tokens, (owner, activation.shape, output.shape))

    def length(self, layers_without: Callable[[Collection[str]], str]) -> int:
        """Return the number of token positions p that every layer read.

        Args:
            layers_without: From targets to be left out to the words that say how.

        Raises:
            ValueError: If some layer's second axis is not the token positions, or not as long as the others'.
        """
        if None in self._first_uses:
            owner, activation, output = self._first_uses[None]
            remedy = layers_without(owner.targets.values())
            raise ValueError(refusals.no_token_axis(str(owner), activation, output, remedy))
        counts = [count for count in self._first_uses if count is not None]
        if len(counts) > 1:
            owner, *_ = self._first_uses[counts[0]]
            other_owner, *_ = self._first_uses[counts[1]]
            remedy = layers_without(other_owner.targets.values())
            raise ValueError(refusals.unequal_token_axes(str(owner), counts[0], str(other_owner), counts[1], remedy))
        return counts[0]


def token_count(activation: Tensor, output: Tensor) -> int | None:
    """Return how many token positions p a layer read: the second axis of input and output.

    Returns:
        None where the second axis cannot be the positions: of an input ``(n, i)``, or of another length than in the
        output.
    """
    has_features = activation.ndim >= 3 or not activation.is_floating_point()
    if has_features and output.ndim >= 3 and activation.shape[:2] == output.shape[:2]:
        return activation.shape[1]
    return None


def token_gradients(
    rule: Rule,
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield a rule's gradients for n * p rows: the first example's positions, then the second's."""
    n, p = activation.shape[:2]
    if p and rule.is_positionwise(module, activation):
        activation = positions_as_examples(activation)
        backprop = positions_as_examples(backprop)
        yield from rule.gradients(module, activation, backprop, wanted)
        return
    for position in range(p):
        at_position = torch.zeros_like(backprop)
        at_position[:, position] = backprop[:, position]
        for name, examples, gradient in rule.gradients(module, activation, at_position, wanted):
            start, stop, _ = examples.indices(n)
            rows = slice(start * p + position, stop * p, p)
            yield name, rows, gradient

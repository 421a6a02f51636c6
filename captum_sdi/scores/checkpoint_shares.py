"""Which checkpoint speaks: each one's share of the scores, its training loss, and the test gradients' norms there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from captum_sdi.words import warn_user

MOST_OF_ALL = 0.8
"""The share of one checkpoint among several beyond which the user is warned."""
_PREFIX = "checkpoints."  # of the names of tensors in a file


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class CheckpointShares:
    """What each checkpoint contributed to a result.

    A sum over checkpoints is about the model at those of them that contribute most, often the first, whose gradients
    are the largest. The share of checkpoint c, over the pairs of the result (with ``rerank=``: over all that were
    scored exactly), is

        share_c = Σ_pairs |η_c ⟨g_c, φ_c⟩| / Σ_c' Σ_pairs |η_c' ⟨g_c', φ_c'⟩|

    Example:
        >>> import torch
        >>> shares = CheckpointShares(("early", "late"), torch.tensor([0.9, 0.1]), torch.tensor([2.5, torch.nan]))
        >>> print(shares)
        early: 90% of the absolute scores, training loss 2.5
        late: 10% of the absolute scores
    """

    names: tuple[str, ...]
    """Of the checkpoints, in order."""
    shares: Tensor
    """``(c,)`` of the sum of absolute totals; they sum to 1, or are all 0 where every score is."""
    losses: Tensor
    """``(c,)`` the training loss that a Trainer logged last; NaN where none is known."""
    test_norms: Tensor | None = None
    """``(q, c, 2 + t)`` norms of each test example's features, over all parameters, through each of `Bins`: prelude,
    coda, loop steps; what the sketch estimates them to be. None of self-influence and of reranked results."""

    def __str__(self) -> str:
        lines = []
        shares, losses = self.shares.tolist(), self.losses.tolist()
        for name, share, loss in zip(self.names, shares, losses, strict=True):
            known = "" if loss != loss else f", training loss {loss:.4g}"
            lines.append(f"{name}: {share:.0%} of the absolute scores{known}")
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn the user where nearly all of the scores come from one checkpoint of several."""
        if len(self.names) < 2 or not float(self.shares.max()) > MOST_OF_ALL:
            return
        largest = int(self.shares.argmax())
        loss = float(self.losses[largest])
        known = "" if loss != loss else f" (training loss {loss:.4g})"
        warn_user(
            f"{float(self.shares[largest]):.0%} of these scores come from {self.names[largest]}{known}, one of "
            f"{len(self.names)} checkpoints: they are about the model at that time. The result's field checkpoints has "
            "every checkpoint's share; leave that one out to hear the others."
        )

    def to(self, *args: object, **kwargs: object) -> CheckpointShares:
        """Return the shares on another device or in another dtype, as `torch.Tensor.to`."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}  # type: ignore[call-overload]
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        fields = {"shares": self.shares, "losses": self.losses, "test_norms": self.test_norms}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def as_saved(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what a file keeps: tensors by prefixed names, and metadata."""
        tensors = {_PREFIX + name: tensor for name, tensor in self.tensors().items()}
        return tensors, {"checkpoints": json.dumps(self.names)}

    @classmethod
    def from_saved(
        cls,
        tensors: dict[str, Tensor],
        metadata: Mapping[str, str],
        name: str,
    ) -> CheckpointShares | None:
        """Take out of a file's tensors what `as_saved` put there.

        Args:
            tensors: The file's; those that are taken are removed.
            metadata: The file's.
            name: The file's.

        Returns:
            The shares; None of a file without any, such as those of earlier versions.

        Raises:
            ValueError: If they do not belong together.
        """
        prefixed = [key for key in tensors if key.startswith(_PREFIX)]
        fields = {key.removeprefix(_PREFIX): tensors.pop(key) for key in prefixed}
        if not fields and "checkpoints" not in metadata:
            return None
        try:
            names = tuple(json.loads(metadata["checkpoints"]))
            shares = cls(names, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is damaged: its checkpoints' shares cannot be read ({error}).") from None
        shares.check(name)
        return shares

    def check(self, name: str) -> None:
        """Check that the fields of a file belong together.

        Raises:
            ValueError: If they do not.
        """
        n_checkpoints = len(self.names)
        is_complete = self.shares.shape == self.losses.shape == (n_checkpoints,)
        norms = self.test_norms
        has_norms = norms is None or (norms.dim() == 3 and norms.shape[1] == n_checkpoints)
        numbers = all(tensor.is_floating_point() for tensor in self.tensors().values())
        if not (is_complete and has_norms and numbers and all(isinstance(entry, str) for entry in self.names)):
            raise ValueError(f"{name} is damaged: its checkpoints' shares do not fit {n_checkpoints} names.")

"""Groups of training examples, and how much each example counts in them: what the user of a direction names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.rehearsal.arguments import checked_positions


@dataclass(frozen=True)
class Groups:
    """Some groups of training examples; one example may be in several.

    Raises:
        ValueError: If there is none, or one is neither a list of positions nor finite weights.

    Example:
        >>> groups = Groups.of({"first": [0, 1], "weighed": torch.tensor([0.0, 0.5, 0.25])})
        >>> groups.names, groups.weights_of(torch.tensor([1, 2]))
        (('first', 'weighed'), tensor([[1.0000, 0.0000],
                [0.5000, 0.2500]], dtype=torch.float64))
    """

    names: tuple[str, ...]
    positions: tuple[Tensor, ...]
    """Of each group's examples, ``(m,)``."""
    weights: tuple[Tensor, ...]
    """Of each group's examples, ``(m,)``, float64."""
    n_weighed: int | None
    """How many training examples the weights are of; None where groups are lists of positions."""

    @classmethod
    def of(cls, groups: Any) -> Groups:
        """Read what the user passed: positions, weights of all training examples, or a mapping of names to either.

        Returns:
            The groups, an unnamed one under the name "group".

        Raises:
            ValueError: If there is none, or weights are of different training sets.
        """
        named = groups if isinstance(groups, Mapping) else named_rows(groups)
        if not named:
            raise ValueError("groups is empty: name at least one group of training examples.")
        positions, weights, lengths = [], [], set()
        for name, members in named.items():
            examples = as_tensor(name, members)
            if is_list_of_positions(examples):
                chosen = checked_positions(examples)
                assert chosen is not None, "positions were given"
                check_distinct(name, chosen)
                positions.append(chosen)
                weights.append(torch.ones(len(chosen), dtype=torch.float64))
                continue
            own_weights = checked_weights(name, examples)
            lengths.add(len(own_weights))
            chosen = own_weights.nonzero().flatten()
            positions.append(chosen)
            weights.append(own_weights[chosen])
        if len(lengths) > 1:
            raise ValueError(f"groups has weights of {sorted(lengths)} training examples: pass one for each example.")
        names = tuple(map(str, named))
        return cls(names, tuple(positions), tuple(weights), next(iter(lengths), None))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def members(self) -> Tensor:
        """The positions of all examples that are in a group, each once, ``(m,)``."""
        return torch.cat(self.positions).unique()

    def weights_of(self, positions: Tensor) -> Tensor:
        """Return what examples ``(n,)`` count in each group, ``(g, n)``, float64; zero outside it."""
        rows = []
        for own_positions, own_weights in zip(self.positions, self.weights, strict=True):
            is_member = positions.unsqueeze(1) == own_positions
            rows.append(is_member.double() @ own_weights)
        return torch.stack(rows)

    def check_size(self, n_examples: int) -> None:
        """Refuse groups of another training set.

        Raises:
            ValueError: If there is a weight too many or too few, or a position beyond the last example.
        """
        if self.n_weighed not in (None, n_examples):
            raise ValueError(
                f"groups has weights of {self.n_weighed} training examples, and train_dataset has {n_examples}. "
                "Integers are positions; floats are weights, one for each example."
            )
        unknown = self.members[self.members >= n_examples].tolist()
        if unknown:
            raise ValueError(f"groups names training examples {unknown}, and train_dataset has {n_examples}.")


def named_rows(groups: Any) -> dict[str, Any]:
    """Name the one group that was passed, or each row of weights ``(g, n)``."""
    if isinstance(groups, Tensor) and groups.ndim == 2:
        return {f"group {number}": row for number, row in enumerate(groups)}
    return {"group": groups}


def as_tensor(name: str, members: Any) -> Tensor:
    """Return a group as a tensor on the CPU.

    Raises:
        ValueError: If it is no row of numbers.
    """
    try:
        examples = torch.as_tensor(members).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        examples = torch.empty(0)
    if examples.ndim != 1 or len(examples) == 0:
        raise ValueError(
            f"The group {name!r} must be positions in train_dataset, or a weight for each of its examples; got "
            f"{members!r}."
        )
    return examples


def is_list_of_positions(examples: Tensor) -> bool:
    """Say whether a group names its examples; else it weighs all of them."""
    return not examples.is_floating_point() and examples.dtype != torch.bool


def check_distinct(name: str, positions: Tensor) -> None:
    """Refuse a position that is named twice, as all are in a mask of the integers 0 and 1.

    Raises:
        ValueError: If one is.
    """
    named, counts = positions.unique(return_counts=True)
    repeated = named[counts > 1].tolist()
    if repeated:
        raise ValueError(
            f"The group {name!r} names training examples {repeated[:5]} more than once. Integers are positions: pass "
            "each once, or a mask of booleans, or floats as weights, one for each training example."
        )


def checked_weights(name: str, weights: Tensor) -> Tensor:
    """Return weights in float64.

    Raises:
        ValueError: If one is not finite, or all are zero.
    """
    if not weights.isfinite().all() or not weights.any():
        raise ValueError(f"The weights of the group {name!r} must be finite, and not all zero.")
    return weights.double()

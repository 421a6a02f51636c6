"""The axes of a map: what each splits, and what a side must keep apart for it.

"step", "train_step"
    The loop step of the test side, or of the train side, with the prelude and the coda beside them.
"layer", "parameter"
    The module that owns the parameter, or each tensor.
"token", "train_token"
    The target token of the test text, or of the train text, whose loss it is; by the token's position in the text.
"position", "train_position"
    Where in the text the layers read what the gradient arises from.
"checkpoint"
    Each one, times its learning rate.
"update"
    Of `UnrolledInfluence.influence_map` alone, with "step" or without: each update of a run of training.

In every combination the parts sum to the influence of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captum_sdi.capture.tokens import Unit

AXES = (
    "token",
    "train_token",
    "position",
    "step",
    "train_position",
    "train_step",
    "layer",
    "parameter",
    "checkpoint",
)
"""Every axis that can be asked for, in the order in which a map is computed."""


@dataclass(frozen=True)
class SideAxes:
    """What one side's rows keep apart."""

    token: bool
    """Target tokens, each with a backward pass of its own."""
    position: bool
    """Positions at which the gradient arises."""
    step: bool
    """Loop steps, prelude and coda."""

    @property
    def unit(self) -> Unit:
        """What a row of features is of."""
        return "token" if self.position else "example"


@dataclass(frozen=True)
class MapAxes:
    """The axes that were asked for, in the order of the result.

    Raises:
        TypeError: If they are no names.
        ValueError: If there is no such axis, or one comes twice.

    Example:
        >>> MapAxes(("layer", "step")).test.step
        True
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in AXES]
        if "update" in unknown:
            raise ValueError(
                "The axis 'update' splits training into its updates: UnrolledInfluence follows them, by influence_map."
            )
        if unknown:
            raise ValueError(f"axes= names {unknown}, of which nothing is known. Choose among {', '.join(AXES)}.")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"axes={self.names} names an axis twice.")
        if "layer" in self.names and "parameter" in self.names:
            raise ValueError("axes= has both 'layer' and 'parameter': a layer is the sum of its parameters. Take one.")

    @classmethod
    def of(cls, axes: Any) -> MapAxes:
        """Check what the user passed.

        Returns:
            The axes.

        Raises:
            TypeError: If it is no sequence of names.
        """
        if isinstance(axes, str) or not isinstance(axes, Sequence) or not all(isinstance(name, str) for name in axes):
            raise TypeError(f'axes= must be a tuple of names, such as ("layer", "step"); got {axes!r}.')
        return cls(tuple(axes))

    @property
    def test(self) -> SideAxes:
        """What the test side's rows keep apart."""
        return SideAxes("token" in self.names, "position" in self.names, "step" in self.names)

    @property
    def train(self) -> SideAxes:
        """What the train side's rows keep apart."""
        return SideAxes("train_token" in self.names, "train_position" in self.names, "train_step" in self.names)

    def groups(self, parameters: Sequence[str]) -> dict[str, list[str]]:
        """Return the parameters of each place along "layer" or "parameter"; all in one where neither was asked for.

        Example:
            >>> MapAxes(("layer",)).groups(["fc.weight", "fc.bias", "scale"])
            {'fc': ['fc.weight', 'fc.bias'], '': ['scale']}
        """
        if "parameter" in self.names:
            return {name: [name] for name in parameters}
        if "layer" not in self.names:
            return {"all": list(parameters)}
        layers: dict[str, list[str]] = {}
        for name in parameters:
            owner, _, _ = name.rpartition(".")
            layers.setdefault(owner, []).append(name)
        return layers

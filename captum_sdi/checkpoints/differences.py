"""How a checkpoint differs from the model it is meant for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_sdi.checkpoints.files import abbreviated
from captum_sdi.checkpoints.reading import StateDict


@dataclass(frozen=True)
class Differences:
    """Names in which a checkpoint and a model differ; the mismatched ones with both values."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def error(self, file: Path, model: nn.Module) -> ValueError:
        """Return the error that lists every difference, to be raised before ``model`` is changed."""
        kinds = {
            "missing from the checkpoint": self.missing,
            "in the checkpoint but not in the model": self.unexpected,
            "different in the two": self.mismatched,
        }
        listed = ""
        for kind, names in kinds.items():
            if names:
                listed += f"\n    {len(names)} {kind}: {abbreviated(names)}"
        return ValueError(
            f"{file} does not fit the model ({type(model).__name__}):{listed}\n"
            "Nothing was loaded. Build the model from the same config as the checkpoint."
        )


def compared(state: StateDict, targets: StateDict) -> Differences:
    """Compare a state dict with the model's tensors of the same names."""
    missing = [name for name in targets if name not in state]
    unexpected = [name for name in state if name not in targets]
    mismatched = []
    for name, target in targets.items():
        if name in state:
            mismatched += mismatch(name, state[name], target)
    return Differences(missing, unexpected, mismatched)


def mismatch(name: str, stored: Tensor, target: Tensor) -> list[str]:
    """Describe a difference in shape, or between numbers and codes (quantised weights), if any."""
    if stored.shape != target.shape:
        return [two_values(name, tuple(stored.shape), tuple(target.shape))]
    if number_kind(stored) != number_kind(target):
        return [two_values(name, stored.dtype, target.dtype)]
    if stored.layout != target.layout:
        return [two_values(name, stored.layout, target.layout)]
    return []


def number_kind(tensor: Tensor) -> tuple[bool, ...]:
    """Tell apart what is not cast into each other: floating point, complex, codes with a scale, other numbers."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.is_quantized


def two_values(name: str, in_checkpoint: Any, in_model: Any) -> str:
    """Put a name's value in the checkpoint beside its value in the model."""
    return f"{name} ({in_checkpoint} in the checkpoint, {in_model} in the model)"

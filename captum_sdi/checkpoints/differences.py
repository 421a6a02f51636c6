"""How a checkpoint differs from the model it is meant for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from captum_sdi.checkpoints.files import some


@dataclass(frozen=True)
class Differences:
    """Names that a checkpoint lacks, that it has besides, and that differ."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def error(self, file: Path, model: nn.Module) -> ValueError:
        """Say it all; ``model`` is unchanged so far."""
        kinds = [
            (self.missing, "missing from the checkpoint"),
            (self.unexpected, "in the checkpoint but not in the model"),
            (self.shapes, "different in the two"),
        ]
        lines = [f"\n    {len(names)} {kind}: {some(names)}" for names, kind in kinds if names]
        return ValueError(
            f"{file} does not fit the model ({type(model).__name__}):{''.join(lines)}\n"
            "Nothing was loaded. Build the model from the same config as the checkpoint."
        )


def difference(name: str, stored: Tensor, target: Tensor) -> list[str]:
    """Describe a difference in shape, or between numbers and codes (quantised weights)."""
    if stored.shape != target.shape:
        there, here = str(tuple(stored.shape)), str(tuple(target.shape))
    elif stored.is_floating_point() != target.is_floating_point():
        there, here = str(stored.dtype), str(target.dtype)
    else:
        return []
    return [f"{name} ({there} in the checkpoint, {here} in the model)"]

"""All trainable parameters of a model as one vector, and gradients of some of them laid out the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterVector:
    """Where each trainable parameter lies in a vector of ``size`` numbers; a tied parameter lies there once.

    Example:
        >>> layout = ParameterVector.of(nn.Linear(2, 1))
        >>> vector = layout.flat({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        >>> vector, layout.named(vector)["weight"].shape
        (tensor([1., 1., 0.]), torch.Size([1, 2]))
    """

    shapes: Mapping[str, torch.Size]
    """By parameter, in the model's order."""
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(model: nn.Module) -> ParameterVector:
        """Return the layout of a model's trainable parameters.

        Raises:
            ValueError: If there is none, or they are not all of float32 or all of float64.
        """
        # Without duplicates: a tied parameter listed twice would be two independent ones.
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        dtypes = {parameter.dtype for parameter in trainable.values()}
        if not trainable:
            raise ValueError("The model has no trainable parameter: unfreeze some with requires_grad_(True).")
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
            raise ValueError(
                f"Second derivatives need parameters that are all float32, or all float64; these are "
                f"{sorted(map(str, dtypes))}. Half precision rounds them away: convert the model with .float()."
            )
        first = next(iter(trainable.values()))
        shapes = {name: parameter.shape for name, parameter in trainable.items()}
        return ParameterVector(shapes, first.dtype, first.device)

    @property
    def size(self) -> int:
        """The number of entries of all parameters together."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each parameter, in order."""
        return [shape.numel() for shape in self.shapes.values()]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lay tensors of the parameters' names and shapes out as a vector ``(size,)``, a copy."""
        pieces = [tensors[name].detach().reshape(-1).to(self.device, self.dtype) for name in self.shapes]
        return torch.cat(pieces)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector's views in the parameters' shapes; gradients flow back into it."""
        # One split for all: a slice for each parameter would cost a whole vector each in the backward pass.
        pieces = vector.split(self.sizes)
        named_shapes = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece.view(shape) for (name, shape), piece in named_shapes}

    def rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Lay exact features out as vectors, zero where a parameter is not targeted.

        Args:
            rows: By parameter ``(..., entries)``, such as the rows of `captum_sdi.features.StepFeatures`.

        Returns:
            ``(..., size)``.

        Raises:
            ValueError: If there are rows of parameters that are not trainable.
        """
        unknown = sorted(set(rows) - set(self.shapes))
        if unknown:
            raise ValueError(f"These parameters are not trainable, so that no training changes them: {unknown}.")
        axes = next(iter(rows.values())).shape[:-1]
        pieces = []
        for name, shape in self.shapes.items():
            absent = torch.zeros((), device=self.device, dtype=self.dtype).expand(*axes, shape.numel())
            pieces.append(rows.get(name, absent).to(absent))
        return torch.cat(pieces, dim=-1)

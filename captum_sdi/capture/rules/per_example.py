"""Any other layer without children: the vector-Jacobian product of its forward, one example at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import vjp

from captum_sdi.capture.rules.bare_call import bare_call, lifted_buffers, lifted_parameters
from captum_sdi.capture.rules.base import PerExample, lifted
from captum_sdi.features import Dense

_PER_EXAMPLE_BUDGET = 2**24
"""Entries of dense per-example gradients held at once by `per_example`."""


def per_example(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield the gradients of any leaf, for as many examples at a time as fit the budget."""
    tensors = {**lifted_buffers(module), **lifted_parameters(module)}
    parameters = {name: tensors[name] for name in wanted}
    activation, backprop = lifted(activation), lifted(backprop)

    def gradients_of(one_activation: Tensor, one_backprop: Tensor) -> dict[str, Tensor]:
        def call(changed: dict[str, Tensor]) -> Tensor:
            return bare_call(module, {**tensors, **changed}, one_activation.unsqueeze(0))

        _, pullback = vjp(call, parameters)  # type: ignore[misc]
        (gradients,) = pullback(one_backprop.unsqueeze(0))
        return gradients

    entries = sum(parameter.numel() for parameter in parameters.values())
    chunk = max(1, _PER_EXAMPLE_BUDGET // entries)
    for start in range(0, len(activation), chunk):
        examples = slice(start, start + chunk)
        batch = activation[examples], backprop[examples]
        stacked: dict[str, Tensor] | None = None
        try:
            stacked = torch.vmap(gradients_of)(*batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # its forward looks at values, or calls what vmap does not know
        if stacked is None:
            singles = [gradients_of(*example) for example in zip(*batch, strict=True)]
            stacked = {}
            for name in parameters:
                stacked[name] = torch.stack([gradients[name] for gradients in singles])
        for name, gradients in stacked.items():
            yield name, examples, Dense(gradients)

"""Linear: weight ``(o, i)``: Σ_p g_p a_pᵀ; bias: Σ_p g_p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from captum_sdi.capture.rules.base import WEIGHT_AND_BIAS, PerExample, merge_positions, summed_over_positions
from captum_sdi.capture.rules.registry import rule
from captum_sdi.features import Outer


@rule(nn.Linear, parameters=WEIGHT_AND_BIAS, fresh_output=True, positionwise=True)
def linear(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield a linear layer's gradients."""
    inputs = merge_positions(activation)
    backprops = merge_positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=backprops, cols=inputs)
    if "bias" in wanted:
        yield "bias", slice(None), summed_over_positions(backprops)

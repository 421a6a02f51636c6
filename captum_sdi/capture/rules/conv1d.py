"""GPT-2's Conv1D, a transposed linear layer: weight ``(i, o)``: Σ_p a_p g_pᵀ; bias: Σ_p g_p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from captum_sdi.capture.rules.base import WEIGHT_AND_BIAS, PerExample, merge_positions, summed_over_positions
from captum_sdi.capture.rules.registry import rule
from captum_sdi.features import Outer


@rule("transformers.pytorch_utils.Conv1D", parameters=WEIGHT_AND_BIAS, fresh_output=True, positionwise=True)
def conv1d(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield a Conv1D's gradients."""
    inputs = merge_positions(activation)
    backprops = merge_positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=inputs, cols=backprops)
    if "bias" in wanted:
        yield "bias", slice(None), summed_over_positions(backprops)

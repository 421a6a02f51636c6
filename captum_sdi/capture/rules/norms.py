"""LayerNorm and RMSNorm: weight: Σ_p g_p ⊙ x̂_p with x̂ the normalised activation; bias: Σ_p g_p.

Norms of other classes are recognised by what they compute: see `captum_sdi.capture.rules.affine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi.capture.rules.base import WEIGHT_AND_BIAS, PerExample, lifted, merge_positions, summed_over_positions
from captum_sdi.capture.rules.registry import rule


def normalizes_each_position(module: nn.Module, activation: Tensor) -> bool:
    """Say whether the second axis is not among those that are normalised together."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return len(module.normalized_shape) <= activation.ndim - 2


@rule(
    nn.LayerNorm, nn.RMSNorm, parameters=WEIGHT_AND_BIAS, fresh_output=True, positionwise=normalizes_each_position
)  # fmt: skip
def layer_norm(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield a norm's gradients."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = module.normalized_shape
    normalize = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
    if "weight" in wanted:
        normalized = normalize(lifted(activation), shape, eps=module.eps)  # type: ignore[arg-type]
        slopes = merge_positions(normalized.mul_(backprop), trailing=len(shape))
        yield "weight", slice(None), summed_over_positions(slopes)
    if "bias" in wanted:
        yield "bias", slice(None), summed_over_positions(merge_positions(backprop, trailing=len(shape)))

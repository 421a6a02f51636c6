"""Forward derivatives of common functions in a few operations, where torch 2.13 takes them apart into many.

``y`` of a dual number ``x + ε x'`` is ``y(x) + ε y'``. Functions that are not here, and arguments that are not meant
here, keep torch's own derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRECISE = (torch.float32, torch.float64)
"""In other dtypes torch computes some of these functions in float32 and rounds what comes out."""


class ClosedForms(TorchFunctionMode):
    """Use the closed forms below in the passes inside ``with``."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function, or its closed form."""
        closed_form = CLOSED_FORMS.get(function, function)
        return closed_form(*args, **(kwargs or {}))


def tangent_of(tensor: Tensor | None) -> Tensor | None:
    """Return the tangent of a dual number; None of anything else, and where no closed form is meant."""
    if tensor is None or isinstance(tensor, nn.Parameter) or tensor.dtype not in PRECISE:
        return None
    return forward_ad.unpack_dual(tensor).tangent


def primal_of(tensor: Tensor) -> Tensor:
    """Return a dual number without its tangent."""
    return forward_ad.unpack_dual(tensor).primal


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b of a dual x: y' = x' Wᵀ."""
    tangent = tangent_of(input)
    if tangent is None or tangent_of(weight) is not None or tangent_of(bias) is not None:
        return F.linear(input, weight, bias)
    output = F.linear(primal_of(input), weight, bias)
    return forward_ad.make_dual(output, F.linear(tangent, weight))


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Compute a GELU of a dual x: y' = gelu'(x) x', where gelu' is computed once for all tangents."""
    tangent = tangent_of(input)
    if tangent is None:
        return F.gelu(input, approximate=approximate)
    primal = primal_of(input)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(primal), primal, approximate=approximate)
    return forward_ad.make_dual(F.gelu(primal, approximate=approximate), slope * tangent)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise a dual x: the Jacobian of (x - mean) / σ is symmetric, so that its backward pass takes x' forward."""
    tangent = tangent_of(input)
    if tangent is None or tangent_of(weight) is not None or tangent_of(bias) is not None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    primal = primal_of(input)
    output, mean, rate = torch.native_layer_norm(primal, normalized_shape, weight, bias, eps)
    slope, _, _ = torch.ops.aten.native_layer_norm_backward(
        tangent, primal, normalized_shape, mean, rate, None, None, [True, False, False]
    )
    return forward_ad.make_dual(output, slope if weight is None else slope * weight)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with dual q, k, v: with w = softmax(s), w' = w (s' - Σ w s'), as going backward, and y' = w' v + w v'."""
    query_slope, key_slope, value_slope = map(tangent_of, (query, key, value))
    is_boolean = attn_mask is None or attn_mask.dtype == torch.bool
    is_plain = is_boolean and dropout_p == 0 and not enable_gqa and not (is_causal and attn_mask is not None)
    if query_slope is None or key_slope is None or value_slope is None or not is_plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    queries, values = primal_of(query) * factor, primal_of(value)
    keys = primal_of(key).transpose(-1, -2)
    scores = queries @ keys
    seen = attn_mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    if attn_mask is not None:  # of a row that sees nothing, not NaN: zeros, as torch's
        weights = weights.masked_fill(~attn_mask, 0)
    score_slopes = query_slope @ (keys * factor) + queries @ key_slope.transpose(-1, -2)
    weight_slopes = torch.ops.aten._softmax_backward_data(score_slopes, weights, -1, weights.dtype)
    return forward_ad.make_dual(weights @ values, weight_slopes @ values + weights @ value_slope)


CLOSED_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    F.gelu: gelu,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: attention,
}

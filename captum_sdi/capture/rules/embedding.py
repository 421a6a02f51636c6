"""Embedding: weight ``(v, o)``: Σ_p e_p g_pᵀ with e_p the one-hot vector of a token id, which is never formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from captum_sdi.capture.rules.base import PerExample, merge_positions
from captum_sdi.capture.rules.registry import rule
from captum_sdi.features import Outer


@rule(nn.Embedding, parameters=["weight"], fresh_output=True, positionwise=True)
def embedding(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield an embedding's gradients."""
    assert isinstance(module, nn.Embedding)
    ids = activation.reshape(activation.shape[0], -1)
    backprops = merge_positions(backprop)
    if module.padding_idx is not None:  # autograd leaves this row without gradient
        backprops = backprops * ids.ne(module.padding_idx).unsqueeze(-1)
    yield "weight", slice(None), Outer(rows=ids, cols=backprops)


@rule(
    "captum_sdi.models.looped_gpt_layers.SoftEmbedding",
    parameters=["weight"],
    fresh_output=True,
    positionwise=True,
)
def soft_embedding(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield the gradients of an embedding of ids, or of distributions over them ``(n, ..., v)``."""
    if not activation.is_floating_point():
        yield from embedding(module, activation, backprop, wanted)
        return
    yield "weight", slice(None), Outer(rows=merge_positions(activation), cols=merge_positions(backprop))


def looks_at_batch(module: nn.Module) -> bool:
    """Say whether a module is an embedding whose gradient depends on the ids of all examples."""
    return isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)

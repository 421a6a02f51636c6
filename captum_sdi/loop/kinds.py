"""What kind of module it is, as far as finding a loop depends on it."""

from __future__ import annotations

from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def only_embeds_or_normalises(module: nn.Module) -> bool:
    """Say whether all parameters in a module belong to embeddings and norms, which make no loop of their own.

    Returns:
        False for a module without parameters.

    Example:
        >>> only_embeds_or_normalises(nn.Sequential(nn.Embedding(4, 2), nn.LayerNorm(2)))
        True
    """
    owners = [
        submodule for submodule in module.modules() if next(submodule.parameters(recurse=False), None) is not None
    ]
    return bool(owners) and all(map(is_embedding_or_norm, owners))


def is_embedding_or_norm(module: nn.Module) -> bool:
    """Say whether a module that owns parameters is an embedding or a norm, by its class or its class's name."""
    if isinstance(module, (*EMBEDDINGS, *NORMS)):
        return True
    kind = type(module).__name__.lower()
    parameters = module.parameters(recurse=False)
    is_norm = "norm" in kind and all(parameter.ndim <= 1 for parameter in parameters)
    return is_norm or "embedding" in kind

"""Calling a layer's own forward with other parameters, and without any hooks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from captum_sdi.capture.rules.base import lifted


class _Bare(nn.Module):
    """A module's own forward without hooks: neither ours nor the user's are the layer's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, activation: Tensor) -> Tensor:
        return self.inner.forward(activation)


def bare_call(
    module: nn.Module,
    tensors: dict[str, Tensor],
    activation: Tensor,
) -> Tensor:
    """Call a module's forward with these tensors as its parameters and buffers."""
    bare = _Bare(module)
    inner_tensors = {f"inner.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(bare, inner_tensors, (activation,))


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a module owns itself, detached, by its own names of them."""
    parameters = module.named_parameters(recurse=False)
    return {name: parameter.detach() for name, parameter in parameters}


def lifted_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters in at least float32."""
    return lifted_tensors(own_parameters(module))


def lifted_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own buffers in at least float32."""
    return lifted_tensors(dict(module.named_buffers(recurse=False)))


def lifted_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors in at least float32."""
    return {name: lifted(tensor) for name, tensor in tensors.items()}

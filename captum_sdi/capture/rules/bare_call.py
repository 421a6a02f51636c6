"""Calling a layer's own forward with other parameters, and without any hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from captum_sdi.capture.rules.base import lifted


def bare_call(
    module: nn.Module,
    tensors: dict[str, Tensor],
    activation: Tensor,
) -> Tensor:
    """Call a module's forward with these tensors as its own parameters and buffers, tied ones included.

    Neither our hooks nor the user's are run: they are not the layer's. `torch.func.functional_call` does the same for
    any module, and takes longer than a norm.

    Returns:
        What the forward returns.
    """
    parameters = dict(module._parameters)
    buffers = dict(module._buffers)
    own_tensors = {**parameters, **buffers}
    stand_ins: dict[int, Any] = {id(own_tensors[name]): tensor for name, tensor in tensors.items()}
    try:
        for name, parameter in parameters.items():
            module._parameters[name] = stand_ins.get(id(parameter), parameter)
        for name, buffer in buffers.items():
            module._buffers[name] = stand_ins.get(id(buffer), buffer)
        return module.forward(activation)
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)


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

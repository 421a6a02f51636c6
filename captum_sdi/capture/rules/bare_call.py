"""Calling a layer's own forward with other parameters, and without any hooks."""

from __future__ import annotations

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
    """
    held = (module._parameters, module._buffers)
    originals = [dict(tensors_held) for tensors_held in held]
    stand_ins = {}
    for name, tensor in tensors.items():
        original = module._parameters[name] if name in module._parameters else module._buffers[name]
        stand_ins[id(original)] = tensor
    try:
        for tensors_held in held:
            for name, original in tensors_held.items():
                tensors_held[name] = stand_ins.get(id(original), original)
        return module.forward(activation)
    finally:
        for tensors_held, original in zip(held, originals, strict=True):
            tensors_held.update(original)


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

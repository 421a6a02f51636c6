"""Models that accelerate spread over devices or offloaded: what its hooks hold, and a loan of the offloaded weights.

Between the calls of a module its offloaded weights are on no device ("meta"), and every call makes other Parameters of
them. While a model is borrowed its weights lie in the machine's memory instead, under Parameters that stay the same,
and a call of a module computes with copies of them where accelerate would have put them. The copies are made within
autograd's sight, so that whatever stands in a weight's place gets its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNING = "AlignDevicesHook"
"""Of accelerate, which is not imported: a model that it has not touched needs none of it."""


def align_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks by which accelerate brings a module and its inputs to one device, and that do nothing else."""
    hook = vars(module).get("_hf_hook")
    hooks = [] if hook is None else list(getattr(hook, "hooks", [hook]))
    is_known = all(type(each).__name__ == _ALIGNING for each in hooks)
    return hooks if is_known else []


def offload_hook(module: nn.Module) -> Any | None:
    """Return the hook by which accelerate keeps a module's weights elsewhere between its calls; None without one."""
    return next((hook for hook in align_hooks(module) if hook.offload), None)


def offloaded_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters and buffers that are offloaded."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if offload_hook(module) is not None:
            names.update(f"{prefix}.{name}".removeprefix(".") for name in weight_names(module))
    return names


def weight_names(module: nn.Module) -> list[str]:
    """Return the names of what accelerate offloads of a module."""
    hook = offload_hook(module)
    assert hook is not None
    recurse = hook.place_submodules
    names = [name for name, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
    if hook.offload_buffers:
        state = module.state_dict()
        names += [name for name, _ in module.named_buffers(recurse=recurse) if name in state]
    return names


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[None]:
    """Put offloaded weights into the model, as Parameters that stay the same; nothing for a model that has none.

    Yields:
        Nothing. Afterwards the weights are where accelerate had them, and its hooks do what they did.

    Raises:
        ValueError: If weights on the disk do not say whether they are tied.
    """
    offloading = {prefix: module for prefix, module in model.named_modules() if offload_hook(module)}
    shelf = Shelf()
    with ExitStack() as stack:
        for prefix, module in offloading.items():
            for name in weight_names(module):
                weight = shelf.weight(module, name, prefix)
                stack.enter_context(standing_for(module, name, weight))
            stack.enter_context(called_on_device(module))
        yield


class Shelf:
    """Parameters of offloaded weights; tied ones are one Parameter."""

    def __init__(self) -> None:
        self._lent: dict[tuple[Any, ...], Tensor] = {}
        self._from_disk: dict[tuple[torch.Size, float], tuple[str, Tensor]] = {}

    def weight(self, module: nn.Module, name: str, prefix: str) -> Tensor:
        """Return what accelerate keeps of a weight, as a Parameter where it is one.

        Args:
            module: The module that is offloaded.
            name: The weight's, in the module.
            prefix: The module's name.
        """
        hook = offload_hook(module)
        assert hook is not None
        owner, own_name = owner_of(module, name)
        values = hook.weights_map[name]
        if hook.weights_map[name] is not values:  # read anew
            self._check_untied(f"{prefix}.{name}", values)
        key: tuple[Any, ...] = values.data_ptr(), values.shape, values.stride(), values.dtype
        if values.numel() == 0:
            key = prefix, name  # nothing has no place of its own
        if key not in self._lent:
            parameter = owner._parameters.get(own_name)
            self._lent[key] = values if parameter is None else nn.Parameter(values, parameter.requires_grad)
        return self._lent[key]

    def _check_untied(self, name: str, values: Tensor) -> None:
        """Refuse a matrix read from the disk that equals another: whether they are one cannot be seen."""
        if values.ndim < 2 or not values.any():
            return
        key = values.shape, float(values.sum(dtype=torch.float64))
        other_name, other = self._from_disk.setdefault(key, (name, values))
        if other_name != name and torch.equal(values, other):
            raise ValueError(
                f"{other_name!r} and {name!r} are equal and offloaded to the disk, where tied weights and copies look "
                "alike. Offload them to the CPU: a device_map with 'cpu' in the place of 'disk'."
            )


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor of that name itself, and the name it has there."""
    path, _, own_name = name.rpartition(".")
    return module.get_submodule(path), own_name


@contextmanager
def standing_for(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Let a tensor stand in the place of a weight of a module or of modules inside it."""
    owner, own_name = owner_of(module, name)
    table: dict[str, Any] = owner._parameters if own_name in owner._parameters else owner._buffers
    absent = table[own_name]
    table[own_name] = tensor
    try:
        yield
    finally:
        table[own_name] = absent


# --- calls ---


@contextmanager
def called_on_device(module: nn.Module) -> Iterator[None]:
    """Let a module compute with copies of its weights where accelerate would have put them."""
    forward_of_accelerate = module.forward
    original = vars(module)["_old_forward"]
    module.forward = partial(call_on_device, module, original)
    try:
        yield
    finally:
        module.forward = forward_of_accelerate


def call_on_device(
    module: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a module's own forward as accelerate does: inputs and weights on its device, and outputs where it says."""
    from accelerate.utils import find_device, send_to_device

    hook = offload_hook(module)
    assert hook is not None
    device = hook.execution_device
    goes_back = any(each.io_same_device for each in align_hooks(module))
    origin = find_device([args, kwargs]) if goes_back else None
    moved_args = send_to_device(args, device)
    moved_kwargs = send_to_device(kwargs, device, skip_keys=hook.skip_keys)
    with ExitStack() as stack:
        for name in weight_names(module):
            copy = copied_to(attrgetter(name)(module), device)
            stack.enter_context(standing_for(module, name, copy))
        output = forward(*moved_args, **moved_kwargs)
    return output if origin is None else send_to_device(output, origin, skip_keys=hook.skip_keys)


def copied_to(weight: Tensor, device: Any) -> Tensor:
    """Return a weight on a device; itself where it is there."""
    return weight.to(device)

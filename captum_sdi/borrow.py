"""Borrowing a model: whatever happens to it meanwhile, it is given back exactly as it was."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def preserved(model: nn.Module, weights: bool = True) -> Iterator[None]:
    """Give the model back on exit exactly as it was, whatever happened inside, errors included.

    Restored: which module, Parameter and buffer object stands under which name, their storage,
    values, ``requires_grad`` and ``.grad``, the train/eval flag of every submodule, and the global
    random state of torch (CUDA too, once in use), Python and numpy.

    Args:
        model: The model that is borrowed.
        weights: Copy the values of parameters and gradients as well. False saves the memory of one
            copy of the model, for a block that loads no checkpoint; buffers are copied in any case,
            since a forward pass may write to them.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> weight = model.weight
        >>> with preserved(model):
        ...     model.weight = nn.Parameter(torch.ones(1, 2))
        >>> model.weight is weight
        True
    """
    parameters = [_TensorState.of(p, copied=weights) for p in model.parameters()]
    gradients = [_TensorState.of(p.grad, copied=weights) for p in parameters if p.grad is not None]
    buffers = [_TensorState.of(buffer, copied=True) for buffer in model.buffers()]
    modules = [_ModuleState.of(module) for module in model.modules()]
    # A stack runs every callback, the last one first, even when one of them fails.
    with kept_rng(), ExitStack() as stack:
        for state in [*parameters, *gradients, *buffers]:
            stack.callback(state.restore)
        for module in modules:
            stack.callback(module.restore)
        yield


@contextmanager
def kept_rng() -> Iterator[None]:
    """Restore the global random state of torch, Python and numpy on exit."""
    cpu, python = torch.get_rng_state(), random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - the global state is the one to be kept
    # Asking CUDA for its state would initialise it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@dataclass(frozen=True)
class _ModuleState:
    """What one module holds under which name, and its train/eval flag."""

    module: nn.Module
    training: bool
    tables: tuple[dict[str, Any], ...]
    non_persistent: set[str]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        tables = tuple(dict(table.items()) for table in _tables(module))
        return _ModuleState(module, module.training, tables, set(module._non_persistent_buffers_set))

    def restore(self) -> None:
        self.module.training = self.training
        for current, saved in zip(_tables(self.module), self.tables, strict=True):
            if [(k, id(v)) for k, v in current.items()] != [(k, id(v)) for k, v in saved.items()]:
                self._restore_table(current, saved)
        if self.module._non_persistent_buffers_set != self.non_persistent:
            self.module._non_persistent_buffers_set = set(self.non_persistent)

    def _restore_table(self, current: dict[str, Any], saved: dict[str, Any]) -> None:
        changed = [name for name in saved if current.get(name) is not saved[name]]
        current.clear()
        current.update(saved)
        for name in changed:
            # A plain attribute of that name would hide the entry, and an LSTM keeps a second list
            # of its weights, which only setattr updates.
            self.module.__dict__.pop(name, None)
            setattr(self.module, name, saved[name])


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return module._modules, module._parameters, module._buffers


@dataclass(frozen=True)
class _TensorState:
    """One parameter, buffer or gradient: its storage, its values, and which gradient it has."""

    tensor: Tensor
    alias: Tensor  # shares the storage, so it finds it again after `tensor.data = other`
    values: Tensor | None
    is_leaf: bool
    requires_grad: bool
    grad: Tensor | None

    @staticmethod
    def of(tensor: Tensor, copied: bool) -> _TensorState:
        alias = tensor.detach()
        return _TensorState(
            tensor,
            alias,
            _writable(alias).clone() if copied else None,
            tensor.is_leaf,
            tensor.requires_grad,
            tensor.grad if tensor.is_leaf else None,
        )

    def restore(self) -> None:
        tensor = self.tensor
        if _layout(tensor) != _layout(self.alias):
            tensor.data = self.alias
        if self.values is not None:
            _writable(self.alias).copy_(self.values)
        if tensor.grad_fn is not None and self.is_leaf:
            tensor.detach_()  # somebody wrote to it within autograd's sight
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if self.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _writable(tensor: Tensor) -> Tensor:
    """View an expanded tensor without its repetitions, which torch refuses to write to."""
    if tensor.layout != torch.strided:
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, so that the backward pass forms none.

    Args:
        model: Given back as it was.
    """
    active = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in active:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in active:
            parameter.requires_grad_(True)


@contextmanager
def requiring_grad(targets: dict[str, nn.Parameter]) -> Iterator[None]:
    """Parameters that are frozen require a gradient for a while, as targets named in ``layers`` need one to compare.

    Args:
        targets: By name; given back as they were.
    """
    still = [p for p in targets.values() if not p.requires_grad]
    for parameter in still:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache: a looped block would append to the cache of its previous iteration.

    Args:
        model: Given back as it was.
    """
    training = {module: module.training for module in model.modules()}
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module, mode in training.items():
            module.training = mode


@contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """``module`` drops its activations in the forward pass and recomputes them in the backward pass."""
    own = vars(module).get("forward")
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

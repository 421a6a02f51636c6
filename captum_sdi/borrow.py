"""Borrowing a model: whatever happens to it meanwhile, it is given back exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


@contextmanager
def preserved(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Give the model back on exit exactly as it was, whatever happened inside, errors included.

    Restored: which module, Parameter and buffer object stands under which name, their storage, values,
    ``requires_grad`` and ``.grad``, the train/eval flag of every submodule, and the global random state of torch (CUDA
    too, once in use), Python and numpy.

    Args:
        model: The model that is borrowed.
        weights: Copy the values of parameters and gradients as well. False saves the memory of one copy of the model,
            for a block that loads no checkpoint; buffers are copied in any case, since a forward pass may write to
            them.

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
    parameters = [_TensorState.saved(parameter, copied=weights) for parameter in model.parameters()]
    gradients = [_TensorState.saved(state.grad, copied=weights) for state in parameters if state.grad is not None]
    buffers = [_TensorState.saved(buffer, copied=True) for buffer in model.buffers()]
    modules = [_ModuleState.saved(module) for module in model.modules()]
    # A stack runs every callback, the last one first, even when one of them fails.
    with kept_rng(), ExitStack() as stack:
        for state in (*parameters, *gradients, *buffers):
            stack.callback(state.restore)
        for module in modules:
            stack.callback(module.restore)
        yield


@contextmanager
def kept_rng() -> Iterator[None]:
    """Restore the global random state of torch, Python and numpy on exit."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@dataclass(frozen=True)
class RandomState:
    """The global random state of torch, Python and numpy."""

    torch_state: Tensor
    cuda_states: list[Tensor] | None
    python_state: Any
    numpy_state: Any

    @staticmethod
    def now() -> RandomState:
        """Return the present state."""
        # Asking CUDA for its state would initialise it.
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is the one to be kept
        return RandomState(torch.get_rng_state(), cuda_states, random.getstate(), numpy_state)

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)  # noqa: NPY002
        if self.cuda_states is not None:
            torch.cuda.set_rng_state_all(self.cuda_states)


@dataclass(frozen=True)
class _ModuleState:
    """What one module holds under which name, and its train/eval flag."""

    module: nn.Module
    training: bool
    tables: tuple[dict[str, Any], ...]
    non_persistent: set[str]

    @staticmethod
    def saved(module: nn.Module) -> _ModuleState:
        tables = tuple(dict(table.items()) for table in _tables(module))
        return _ModuleState(module, module.training, tables, set(module._non_persistent_buffers_set))

    def restore(self) -> None:
        self.module.training = self.training
        for current, saved in zip(_tables(self.module), self.tables, strict=True):
            if _identities(current) != _identities(saved):
                self._restore_table(current, saved)
        if self.module._non_persistent_buffers_set != self.non_persistent:
            self.module._non_persistent_buffers_set = set(self.non_persistent)

    def _restore_table(self, current: dict[str, Any], saved: dict[str, Any]) -> None:
        changed = [name for name in saved if current.get(name) is not saved[name]]
        current.clear()
        current.update(saved)
        for name in changed:
            # A plain attribute of that name would hide the entry, and an LSTM keeps a second list of its weights,
            # which only setattr updates.
            self.module.__dict__.pop(name, None)
            setattr(self.module, name, saved[name])


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return module._modules, module._parameters, module._buffers


def _identities(table: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, id(entry)) for name, entry in table.items()]


@dataclass(frozen=True)
class _TensorState:
    """One parameter, buffer or gradient: its storage, its values, and which gradient it has."""

    tensor: Tensor
    alias: Tensor
    """Shares the tensor's storage, and so finds it again after ``tensor.data = other``."""
    values: Tensor | None
    is_leaf: bool
    requires_grad: bool
    grad: Tensor | None

    @staticmethod
    def saved(tensor: Tensor, *, copied: bool) -> _TensorState:
        alias = tensor.detach()
        values = _without_repetitions(alias).clone() if copied else None
        grad = tensor.grad if tensor.is_leaf else None
        return _TensorState(tensor, alias, values, tensor.is_leaf, tensor.requires_grad, grad)

    def restore(self) -> None:
        tensor = self.tensor
        if _layout(tensor) != _layout(self.alias):
            tensor.data = self.alias
        if self.values is not None:
            _without_repetitions(self.alias).copy_(self.values)
        if tensor.grad_fn is not None and self.is_leaf:
            tensor.detach_()  # somebody wrote to it within autograd's sight
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if self.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _without_repetitions(tensor: Tensor) -> Tensor:
    """View an expanded tensor without its repetitions, which torch refuses to write to."""
    if tensor.layout != torch.strided:
        return tensor
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, min(1, tensor.shape[axis]))
    return tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, so that the backward pass forms none."""
    with _requires_grad_set(model.parameters(), value=False):
        yield


@contextmanager
def requiring_grad(targets: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters require a gradient too."""
    with _requires_grad_set(targets.values(), value=True):
        yield


@contextmanager
def _requires_grad_set(parameters: Iterable[nn.Parameter], *, value: bool) -> Iterator[None]:
    changed = [parameter for parameter in parameters if parameter.requires_grad != value]
    for parameter in changed:
        parameter.requires_grad_(value)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without a key-value cache."""
    # A looped block would append to the cache of its previous iteration.
    modes = {module: module.training for module in model.modules()}
    caching: dict[int, Any] = {}
    for module in modes:
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            caching[id(config)] = config
    model.eval()
    for config in caching.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching.values():
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def recomputed(module: nn.Module, is_pass: Callable[[], bool]) -> Iterator[None]:
    """Let a module drop its activations and recompute them in the backward pass."""
    own_forward = vars(module).get("forward")
    module.forward = partial(recompute, module.forward, is_pass)
    try:
        yield
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


def recompute(forward: Callable[..., Any], is_pass: Callable[[], bool], *args: Any, **kwargs: Any) -> Any:
    """Call ``forward``, under activation checkpointing when this is a pass through the model."""
    if not is_pass():
        return forward(*args, **kwargs)  # torch.func, which a layer rule may use, takes no checkpoint
    # Counters and masks are written to between calls: what is recomputed is given them as they were.
    kept: dict[int, Tensor] = {}
    first_norms: list[Tensor] = []
    is_first = True

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_floating(leaf):
            return leaf
        copy = leaf.clone()
        kept[id(copy)] = leaf
        return copy

    copied_args, copied_kwargs = tree_map(copied, (args, kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        is_first_run, is_first = is_first, False
        originals = dict(kept)
        kept.clear()

        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.is_floating_point():
                return leaf
            return originals[id(leaf)] if is_first_run else leaf.clone()

        args, kwargs = tree_map(given, (args, kwargs))
        output = forward(*args, **kwargs)
        norms = [leaf.detach().norm() for leaf in tree_leaves(output) if is_floating(leaf)]
        if is_first_run:
            first_norms.extend(norms)
        elif not all(map(partial(torch.isclose, rtol=1e-2, equal_nan=True), norms, first_norms)):
            raise ValueError(
                "activation_checkpointing=True recomputes the looped modules, and one of them returned something else: "
                "it depends on more than it is given, such as a step that is set as its attribute. Hand it over as an "
                "argument, or pass activation_checkpointing=False."
            )
        return output

    # Else the recomputation would end before there is an output to compare.
    with set_checkpoint_early_stop(enable=False):
        return checkpoint(run, *copied_args, use_reentrant=False, **copied_kwargs)


def is_floating(leaf: Any) -> bool:
    """Say whether something is a tensor of floating point numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextmanager
def standing_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors stand in for the parameters of these names, tied ones and modules under several names included.

    `torch.func.functional_call` leaves a module that has several names, as looped blocks do, with the tensors in it.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with standing_in(model, {"weight": torch.zeros(1, 2), "bias": torch.ones(1)}):
        ...     model(torch.ones(1, 2))
        tensor([[1.]])
    """
    tensor_of = {id(model.get_parameter(name)): tensor for name, tensor in tensors.items()}
    with ExitStack() as stack:
        for module in model.modules():
            own_parameters = dict(module._parameters)
            stack.callback(module._parameters.update, own_parameters)
            for name, parameter in own_parameters.items():
                if id(parameter) in tensor_of:
                    module._parameters[name] = tensor_of[id(parameter)]  # type: ignore[assignment]
        yield


@contextmanager
def observable() -> Iterator[None]:
    """Run outside the user's inference mode and compiler, and call every layer."""
    # Hooks capture nothing inside compiled code, without any error; the fast path of nn.TransformerEncoderLayer goes
    # round the layers it consists of.
    has_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        with torch.inference_mode(mode=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fastpath)


@contextmanager
def replaced_in_calls(
    module: nn.Module,
    names: Sequence[str],
    *,
    requires_grad: bool,
) -> Iterator[dict[str, nn.Parameter]]:
    """Let aliases stand for parameters, a module's own or of modules inside it, while the module is called.

    Args:
        module: The module.
        names: Its names of the parameters.
        requires_grad: False makes them constants.

    Yields:
        The aliases by these names.
    """
    originals = {name: module.get_parameter(name) for name in names}
    aliases = {}
    for name, original in originals.items():
        aliases[name] = nn.Parameter(original.detach(), requires_grad=requires_grad)

    def enter(*_: object) -> None:
        put_parameters(module, aliases)

    def leave(*_: object) -> None:
        put_parameters(module, originals)

    with ExitStack() as stack:
        stack.callback(leave)
        stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        stack.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
        yield aliases


def put_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let other parameters stand under these names in a module and the modules inside it."""
    for name, parameter in parameters.items():
        prefix, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(prefix), own_name, parameter)  # an LSTM keeps a second list, updated by setattr

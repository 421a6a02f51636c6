"""Any parameter inside any module: its call is run again, and backpropagated for one example at a time.

With m the module, x its arguments, w its parameters and g the gradient at its output,

    example i's gradient of w = ∂/∂w ⟨g_i, m(x; w)_i⟩

as long as row i of the output depends on row i of the arguments alone. The call is repeated in the backward pass on
what it was given, from the same random state, under the same autocast and in evaluation mode, with an alias in the
place of each parameter, so that nothing else collects a gradient. It costs one forward and n backward passes through
the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from captum_sdi.borrow import RandomState, kept_rng, put_parameters
from captum_sdi.capture.rules.base import lifted
from captum_sdi.features import Dense

_PER_EXAMPLE_BUDGET = 2**24
"""Entries of dense per-example gradients held at once."""

_TENSOR = object()
"""Stands among a call's arguments where a tensor was."""

Row = tuple[int, ...]
"""Which entry of the outputs one row of features is of: an example, or an example and a position."""


@dataclass(frozen=True)
class Call:
    """A call of a module, but for the tensors it was given."""

    module: nn.Module
    arguments: tuple[Any, ...]
    form: TreeSpec
    random_state: RandomState
    """Before the call."""
    autocast: tuple[str, torch.dtype, bool]
    """The device's kind, and the dtype that autocast chose, if it was enabled."""

    def rerun(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Call the module's forward again, from the random state of the call, with its parameters `replaced`.

        They must stay so until its graph has been used: a part that is checkpointed runs once more by then.

        Args:
            tensors: What it was given.

        Returns:
            Those of its outputs that may have a gradient.
        """
        remaining = iter(tensors)
        arguments = [next(remaining) if argument is _TENSOR else argument for argument in self.arguments]
        args, kwargs = tree_unflatten(arguments, self.form)
        device, dtype, enabled = self.autocast
        with kept_rng(), torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            self.random_state.restore()
            output = self.module.forward(*args, **kwargs)
        return differentiable(tree_flatten(output)[0])


def recorded(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    random_state: RandomState,
    device: torch.device,
) -> tuple[Call, list[Tensor]]:
    """Return a call that can be run again, and the tensors it was given."""
    leaves, form = tree_flatten((args, kwargs))
    tensors = []
    arguments = []
    for leaf in leaves:
        is_tensor = isinstance(leaf, Tensor)
        arguments.append(_TENSOR if is_tensor else leaf)
        if is_tensor:
            # Counters and masks are written to between calls; what has a gradient may not be, or autograd says so.
            tensors.append(leaf.detach() if leaf.is_floating_point() else leaf.clone())
    kind = device.type
    autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return Call(module, tuple(arguments), form, random_state, autocast), tensors


def differentiable(leaves: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among a call's outputs that may have a gradient."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]


@contextmanager
def replaced(module: nn.Module, aliases: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let aliases stand in the place of a module's parameters, by its own names of them."""
    originals = {name: module.get_parameter(name) for name in aliases}
    put_parameters(module, aliases)
    try:
        yield
    finally:
        put_parameters(module, originals)


def aliases_of(
    module: nn.Module, targets: Mapping[str, str]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return aliases that share a module's parameters' values and collect their gradients.

    Args:
        module: The module.
        targets: Its own names of parameters, to their names among the targets; two of its names may be one target's.

    Returns:
        The aliases by the module's names, and by those of the targets.
    """
    by_own_name = {}
    by_target: dict[str, nn.Parameter] = {}
    for own_name, target in targets.items():
        alias = nn.Parameter(module.get_parameter(own_name).detach(), requires_grad=True)
        by_own_name[own_name] = by_target.setdefault(target, alias)
    return by_own_name, by_target


def masked_gradients(
    outputs: Sequence[Tensor],
    backprops: Sequence[Tensor | None],
    aliases: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
) -> Iterator[tuple[str, slice, Dense]]:
    """Yield each row's gradients, for as many rows at a time as fit the budget.

    Args:
        outputs: Of a call that was run again.
        backprops: The gradients there; None where there is none.
        aliases: By the name of the target.
        rows: The entries of the outputs whose gradients are asked for, one after another.
    """
    pairs = zip(outputs, backprops, strict=True)
    reached = [(output, backprop) for output, backprop in pairs if backprop is not None and output.requires_grad]
    if not reached:
        return
    entries = sum(alias.numel() for alias in aliases.values())
    chunk = max(1, _PER_EXAMPLE_BUDGET // entries)
    for start in range(0, len(rows), chunk):
        some_rows = rows[start : start + chunk]
        gradients_by_row = [_gradients_of_row(reached, aliases, row) for row in some_rows]
        for name in aliases:
            gradients = torch.stack([gradients_of_row[name] for gradients_of_row in gradients_by_row])
            yield name, slice(start, start + len(some_rows)), Dense(gradients)


def _gradients_of_row(
    reached: Sequence[tuple[Tensor, Tensor]],
    aliases: Mapping[str, nn.Parameter],
    row: Row,
) -> dict[str, Tensor]:
    with torch.enable_grad():
        own_outputs = [output[row] for output, _ in reached]
    own_backprops = [backprop[row] for _, backprop in reached]
    gradients = torch.autograd.grad(
        own_outputs,
        list(aliases.values()),
        own_backprops,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: lifted(gradient) for name, gradient in zip(aliases, gradients, strict=True)}

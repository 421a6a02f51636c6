"""The causal check beside every claim by step: another model's block, in one loop step only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating, preserved
from captum_sdi.data.batch import BatchReader, ForwardKwargs
from captum_sdi.data.calling import run_model
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import LossFn, default_loss, example_losses
from captum_sdi.features import LoopSpec
from captum_sdi.inputs import as_batches, padding_token
from captum_sdi.loop.clock import LoopClock
from captum_sdi.loop.finding import find_loop
from captum_sdi.loop.parameters import as_loop, parameters_inside
from captum_sdi.words import is_integer

Swap = tuple[nn.Parameter, Tensor]
"""A parameter of the loop, and the other model's values for it."""


def block_swap(
    model: nn.Module,
    other: nn.Module | Mapping[str, Tensor],
    test: Any,
    *,
    loop: str | Sequence[str] | LoopSpec | None = None,
    steps: Sequence[int | Collection[int]] | None = None,
    loss_fn: LossFn | None = None,
    forward_kwargs: ForwardKwargs | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Measure test losses with another model's looped block in one loop step, each step in turn.

    With a model that was retrained without an example this is the effect that influence by step predicts, to first
    order: phi_t is the derivative of the loss with respect to the block's weights in step t alone.

    Args:
        model: The model, given back as it was.
        other: A model of the same parameters, or its state dict; only those of the loop's modules are read.
        test: Test examples in any form that `captum_sdi.SDIInfluence` takes.
        loop: What repeats: a module's name, names, a `LoopSpec`; None finds it.
        steps: Which steps (from 0) have the other block: one, or several at once such as ``(0, 1)``. None is each
            step by itself.
        loss_fn: ``(output, labels)`` to losses; None is the language-model loss.
        forward_kwargs: Further keywords for the model's forward, or a function of the batch.
        batch_size: Examples per batch, where ``test`` is no batch itself.

    Returns:
        ``(q, t)``, or ``(q, len(steps))``, float64 on the CPU.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If parameters do not fit, a step does not exist, or test examples are none or of several depths.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> model, other = LoopedGPTForCausalLM(config), LoopedGPTForCausalLM(config)
        >>> block_swap(model, other, test).shape, block_swap(model, other, test, steps=[(), (0, 1, 2)]).shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """
    batches = list(as_batches(test, batch_size, Collator(padding_token(model)), "test"))
    if not batches:
        raise ValueError("test is empty.")
    spec = as_loop(loop) or find_loop(model, batches[0], forward_kwargs=forward_kwargs)
    swapper = BlockSwapper(model, spec, loop_swaps(model, other, spec))
    loss_fn = loss_fn or default_loss(model)
    reader = BatchReader(model)

    def losses_with(swapped: Collection[int]) -> Tensor:
        swapper.swapped = frozenset(swapped)
        losses, depths = [], set()
        for raw in batches:
            batch = reader(raw, forward_kwargs)
            swapper.clock.restart()
            output = run_model(model, batch)
            depths.add(swapper.clock.n_steps)
            losses.append(example_losses(loss_fn, output, batch.labels, batch.size).double().cpu())
        if len(depths) > 1:
            raise ValueError(f"test examples run {sorted(depths)} loop steps; pass those of one depth at a time.")
        return torch.cat(losses)

    with preserved(model, weights=False), evaluating(model), torch.no_grad(), swapper.installed():
        losses_with(())
        chosen = checked_steps(steps, swapper.clock.n_steps)
        return torch.stack([losses_with(swapped) for swapped in chosen], dim=1)


class BlockSwapper:
    """Puts other values into a loop's parameters while its modules are called in some steps.

    Values, not modules, are exchanged: whatever else a module does in a call, such as keeping a cache, stays its own.
    """

    def __init__(self, model: nn.Module, loop: LoopSpec, swaps: list[Swap]) -> None:
        self.clock = LoopClock(model, loop)
        self.swapped: frozenset[int] = frozenset()
        self._swaps = [(parameter, parameter.data, values) for parameter, values in swaps]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the loop's calls while the body runs."""
        with ExitStack() as stack:
            for module in self.clock.modules:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            for module in self.clock.anchors:
                # First, as a looped module may be its own anchor.
                stack.callback(module.register_forward_pre_hook(self._count_anchor, prepend=True).remove)
            yield

    def _count_anchor(self, module: nn.Module, args: object) -> None:
        self.clock.count_anchor()

    def _enter(self, module: nn.Module, args: object) -> None:
        self.clock.count_call(module)
        if self.clock.step in self.swapped:
            for parameter, _, other_values in self._swaps:
                parameter.data = other_values

    def _leave(self, *_: object) -> None:
        for parameter, own_values, _others in self._swaps:
            parameter.data = own_values


def loop_swaps(
    model: nn.Module,
    other: nn.Module | Mapping[str, Tensor],
    loop: LoopSpec,
) -> list[Swap]:
    """Pair the loop's parameters with another model's.

    Returns:
        Each parameter of the loop's modules, in the model's order, with the other model's values.

    Raises:
        TypeError: If the other one is no model and no state dict.
        ValueError: If one is missing there, is not finite or has another shape.
    """
    theirs: Mapping[str, Tensor]
    if isinstance(other, nn.Module):
        theirs = dict(other.named_parameters(remove_duplicate=False))
    elif isinstance(other, Mapping):
        theirs = other
    else:
        raise TypeError(f"other must be a model or its state dict, got {type(other).__name__}.")
    inside = {id(parameter) for parameter in parameters_inside(model, loop.modules, "loop=")}
    swaps = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            continue
        values = theirs.get(name)
        if not isinstance(values, Tensor) or values.shape != parameter.shape:
            received = tuple(values.shape) if isinstance(values, Tensor) else "nothing"
            raise ValueError(
                f"other has {received} for the loop's parameter {name!r} of shape {tuple(parameter.shape)}; pass a "
                "model of the same architecture, or its state dict."
            )
        if not values.isfinite().all():
            raise ValueError(f"other has NaN or infinite values for the loop's parameter {name!r}.")
        swaps.append((parameter, values.detach().to(parameter)))
    return swaps


def checked_steps(steps: Sequence[int | Collection[int]] | None, n_steps: int) -> list[tuple[int, ...]]:
    """Return which loop steps are swapped together, each step by itself where None is given.

    Raises:
        TypeError: If a step is no int.
        ValueError: If it does not exist, or none is named.
    """
    wanted = range(n_steps) if steps is None else steps
    chosen = []
    for entry in wanted:
        swapped = tuple(entry) if isinstance(entry, Collection) else (entry,)
        if not all(map(is_integer, swapped)):
            raise TypeError(f"steps must be ints, or collections of them to be swapped at once; got {entry!r}.")
        chosen.append(swapped)
    if not chosen:
        raise ValueError("steps is empty; name at least one loop step.")
    for swapped in chosen:
        unknown = [step for step in swapped if not 0 <= step < n_steps]
        if unknown:
            raise ValueError(f"steps names {unknown}, but the model runs {n_steps} loop steps, numbered from 0.")
    return chosen

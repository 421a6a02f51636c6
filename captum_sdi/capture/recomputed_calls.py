"""The hooks of a module whose calls are run again in the backward pass: see `captum_sdi.capture.rules.recompute`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_sdi.borrow import RandomState
from captum_sdi.capture import refusals
from captum_sdi.capture.adoption import Adoption
from captum_sdi.capture.calls import inside_autograd_function
from captum_sdi.capture.identity import ReportingIdentities
from captum_sdi.capture.owners import Owner
from captum_sdi.capture.pass_state import PassState
from captum_sdi.capture.rules.recompute import Call, aliases_of, differentiable, masked_gradients, recorded, replaced
from captum_sdi.capture.rules.trial import Digest, tried
from captum_sdi.loop.clock import Moment
from captum_sdi.model_lock import refuse_other_threads


class RecomputedCalls:
    """Observes the calls of one owner.

    Args:
        owner: The module.
        state: Of the pass.
        adoption: Says which of its targets it need not use.
    """

    def __init__(self, owner: Owner, state: PassState, adoption: Adoption) -> None:
        self._owner = owner
        self._state = state
        self._adoption = adoption
        self._random_states: list[RandomState] = []
        self._used: dict[bool, frozenset[str]] = {}
        self._settled: set[bool] = set()
        self._given_alone: list[torch.Size] | None = None

    def before(self, module: nn.Module, args: object) -> None:
        """Keep the random state that a call begins with."""
        refuse_other_threads(self._state.thread, module, args)  # this hook is called before the lock's own
        if self._state.is_listening:
            self._random_states.append(RandomState.now())

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Put the identity behind all outputs of a call."""
        state, owner = self._state, self._owner
        if not state.is_listening:
            return None
        random_state = self._random_states.pop()
        if not torch.is_grad_enabled():
            if inside_autograd_function():
                raise ValueError(refusals.reentrant_checkpointing(str(owner)))
            state.called_without_grad.update(owner.targets.values())
            return None
        leaves, form = tree_flatten(output)
        outputs = differentiable(leaves)
        call, tensors = recorded(module, args, kwargs, random_state, owner.device)
        if not self._tells(call, tensors, tree_flatten((args, kwargs))[0], leaves):
            state.note_unseen(owner.holders)
            return None
        for tensor in outputs:
            if tensor.shape[:1] == (state.batch_size,):
                state.token_axes.note(owner, tensor, tensor)
        moment = state.clock.moment_of(module)
        report = partial(self._report, call, moment, Digest.of(outputs))
        observed = iter(ReportingIdentities.apply(state.dummy, owner, report, tuple(tensors), *outputs))
        is_output = set(map(id, outputs))
        leaves = [next(observed) if id(leaf) in is_output else leaf for leaf in leaves]
        return tree_unflatten(leaves, form)

    def _tells(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        given: Sequence[Any],
        leaves: Sequence[Any],
    ) -> bool:
        """Say whether running this call again tells the examples' gradients, tried at the first call of each kind."""
        state, owner = self._state, self._owner
        outputs = differentiable(leaves)
        if not all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves):
            return False  # something in there may hold a tensor
        if not any(output.shape[:1] == (state.batch_size,) for output in outputs):
            return False
        is_batch = state.batch_size > 1
        if is_batch not in self._settled:
            by_example = self._have_example_axis([tensor for tensor in given if isinstance(tensor, Tensor)])
            aliases = aliases_of(owner.module, owner.targets)
            state.running_rule.active = True
            try:
                trial = tried(call, tensors, by_example, outputs, aliases, state.batch_size)
            finally:
                state.running_rule.active = False
            if not trial.agrees:
                return False
            if trial.mixes:
                state.mixing[str(owner)] = None
            direct_targets = {target for name, target in owner.targets.items() if "." not in name}
            if not direct_targets <= trial.read and self._owner.name in self._owner.holders:
                return False  # a hook of the user's computes from it what the forward reads
            vouched = self._adoption.vouches_for(owner.holders)
            if any(by_example) or not any(map(self._may_be_by_example, tensors)):
                self._settled.add(is_batch)  # else a later call may tell whether examples mix
            self._used[is_batch] = frozenset(owner.targets.values()) if vouched else trial.read
        if state.phase == "forward":
            state.called |= self._used[is_batch]
        return True

    def _have_example_axis(self, given: Sequence[Tensor]) -> list[bool]:
        """Say which tensors of a call have an example axis, as far as their shapes in this batch and alone tell."""
        batch_size = self._state.batch_size
        if batch_size == 1:
            self._given_alone = [tensor.shape for tensor in given]
            return [False for _ in given]
        are_by_example = []
        for number, tensor in enumerate(given):
            was_single = tensor.requires_grad
            if self._given_alone is not None and len(self._given_alone) == len(given):
                was_single = self._given_alone[number][:1] == (1,)
            # A table of as many positions as there are examples was not single.
            are_by_example.append(was_single and self._may_be_by_example(tensor))
        return are_by_example

    def _may_be_by_example(self, tensor: Tensor) -> bool:
        is_batch = self._state.batch_size > 1
        return is_batch and tensor.is_floating_point() and tensor.shape[:1] == (self._state.batch_size,)

    def _report(
        self,
        call: Call,
        moment: Moment,
        digest: Digest,
        tensors: Sequence[Tensor],
        backprops: Sequence[Tensor | None],
    ) -> None:
        """Run a call again, and hand its examples' gradients to the consumer."""
        state, owner = self._state, self._owner
        if state.is_muted:
            return
        consume = state.consumer(owner)
        place = state.clock.bin(moment)
        state.trim_heap(place)
        by_own_name, by_target = aliases_of(owner.module, owner.targets)
        state.running_rule.active = True
        try:
            with replaced(owner.module, by_own_name):
                outputs = call.rerun(tensors)
                told = [output.shape[:1] == (state.batch_size,) for output in outputs]
                untold = [backprop is not None and not tells for backprop, tells in zip(backprops, told, strict=True)]
                if any(untold) or not digest.fits(outputs):
                    state.note_unseen(owner.holders)
                    return
                rows = self._rows(outputs, backprops)
                for name, some_rows, gradient in masked_gradients(outputs, backprops, by_target, rows):
                    consume(name, some_rows, place, gradient)
        finally:
            state.running_rule.active = False

    def _rows(self, outputs: Sequence[Tensor], backprops: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
        """Return which entries of the outputs are an example, or a token."""
        examples = range(self._state.batch_size)
        if self._state.unit == "example":
            return [(number,) for number in examples]
        positions = range(next(len(backprop[0]) for backprop in backprops if backprop is not None))
        return [(number, position) for number in examples for position in positions]

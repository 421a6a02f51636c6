"""The hooks: what every use of a shared layer read and what flowed back to it, and at which loop step.

`Tape` is the only code that touches the model. While it is installed, each call of a layer that owns a targeted
parameter passes its output through an identity in the autograd graph, which saves what the layer read and, in the
backward pass, hands it to the layer's rule together with the gradient that arrives. Two choices matter.

* The loop step is a value that the identity's report holds since the forward pass. A stack popped in the backward pass
  is silently wrong as soon as some loop outputs do not reach the loss (early exit, exit gates).
* Every parameter is frozen meanwhile, so the backward pass forms no weight gradient: a dummy scalar that requires a
  gradient keeps the identities in the graph.

A layer whose calls do not tell its gradients is noted, and the pass goes on: `captum_sdi.capture.settling`
repeats it once other modules answer for all such layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_sdi.borrow import evaluating, frozen, observable, recomputed
from captum_sdi.capture import refusals
from captum_sdi.capture.adoption import Adoption, Reason, Unseen, UnsettledError
from captum_sdi.capture.calls import inside_autograd_function, only_tensor
from captum_sdi.capture.identity import observed
from captum_sdi.capture.owners import Owner, find_owners, holders_of, silent_targets
from captum_sdi.capture.pass_state import Consumer, PassState
from captum_sdi.capture.recomputed_calls import RecomputedCalls
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.choose import choose_rule
from captum_sdi.capture.stray_uses import leaves_of
from captum_sdi.capture.tokens import Unit, token_gradients
from captum_sdi.capture.whole_pass import WholePass
from captum_sdi.features import LoopSpec
from captum_sdi.loop.clock import LoopClock, Moment
from captum_sdi.model_lock import exclusive, refuse_other_threads

Answer = TypeVar("Answer")


class Tape:
    """Hooks on one model for one loop and one set of targeted parameters; install with ``with``.

    Args:
        model: The model; outside ``with`` it is as the user left it.
        activation_checkpointing: Recompute the looped modules in the backward pass instead of keeping their
            activations.
        adoption: Which modules answer for layers whose calls do not tell, as far as earlier passes have found.

    Raises:
        ValueError: If the loop names a module the model does not have, or a target's gradient is changed by a hook or
            depends on the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        loop: LoopSpec,
        *,
        activation_checkpointing: bool = False,
        adoption: Adoption | None = None,
    ) -> None:
        self.model = model
        self.targets = targets
        self._clock = LoopClock(model, loop)
        self._adoption = adoption or Adoption()
        self._find_owners()
        self._recomputed: list[nn.Module] = []
        if activation_checkpointing:
            self._recomputed = [module for module in self._clock.modules if next(module.children(), None)]
        device = next(iter(targets.values())).device
        trims_heap = bool(self._recomputed) and device.type == "cpu"
        self.state = PassState(self._clock, device, trims_heap=trims_heap)
        self._installed = ExitStack()
        self._watching = ExitStack()

    def _find_owners(self) -> None:
        loop = [*self._clock.modules, *self._clock.anchors]
        self.owners = find_owners(self.model, self.targets, loop, self._adoption)
        self._whole_pass = WholePass([owner for owner in self.owners if owner.way == "whole pass"], self._clock)

    @property
    def n_steps(self) -> int:
        """How many loop steps the last forward pass ran."""
        return self._clock.n_steps

    @property
    def n_tokens(self) -> int:
        """How many token positions each layer read in the last forward pass."""
        if self._whole_pass.owners:
            names = [name for owner in self._whole_pass.owners for name in owner.targets.values()]
            raise ValueError(refusals.no_tokens_of_whole_pass(names, self.layers_without(names)))
        return self.state.token_axes.length(self.layers_without)

    def layers_without(self, names: Collection[str]) -> str:
        """Write which layers= ask for all targets but these; see `refusals.suggest_layers`."""
        return refusals.suggest_layers(self.model, self.targets, set(names))

    # --- installing, and the passes ---

    def __enter__(self) -> Tape:
        with ExitStack() as stack:
            self.state.thread = threading.get_ident()
            stack.enter_context(exclusive(self.model))
            stack.callback(self.state.restart)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(frozen(self.model))
            stack.callback(lambda: self._watching.close())
            self._watch()
            for module in self._recomputed:
                stack.enter_context(recomputed(module, lambda: self.state.is_listening))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._installed.close()

    def _watch(self) -> None:
        """Put hooks on the loop and the owners, in place of any that were there."""
        self._watching.close()
        for handle in self._registered_hooks():
            self._watching.callback(handle.remove)

    def _registered_hooks(self) -> Iterator[RemovableHandle]:
        for module in self._clock.modules:
            yield module.register_forward_pre_hook(self._on_loop_call)
        for module in self._clock.anchors:
            yield module.register_forward_pre_hook(self._on_anchor, prepend=True)
        for owner in self.owners:
            if owner.way == "recompute":
                calls = RecomputedCalls(owner, self.state, self._adoption)
                yield owner.module.register_forward_pre_hook(calls.before, prepend=True)
                yield owner.module.register_forward_hook(calls.after, prepend=True, with_kwargs=True)
            if owner.way != "rule":
                continue
            expand = partial(self._expand, owner)
            yield owner.module.register_forward_pre_hook(expand, prepend=True, with_kwargs=True)
            # First, or a hook of the user's registered earlier would hide a branch of the graph from the identity.
            on_use = partial(self._on_use, owner)
            yield owner.module.register_forward_hook(on_use, prepend=True, with_kwargs=True)

    def adopt(self, unseen: Sequence[Unseen]) -> None:
        """Let other modules answer for layers that were not seen, and give the pass up.

        Raises:
            UnsettledError: If that was possible.
            ValueError: If the whole pass did not tell of a layer.
        """
        by_holder = {sighting.holder: sighting for sighting in unseen}
        stuck = [sighting.holder for sighting in by_holder.values() if not self._adoption.climb(self.model, sighting)]
        if stuck:
            names: list[str] = []
            for owner in self.owners:
                if set(stuck) & {*owner.holders}:
                    names += owner.targets.values()
            raise ValueError(refusals.never_called(names, self.layers_without(names)))
        self._find_owners()
        self._watch()
        raise UnsettledError

    def adopt_targets(self, names: Collection[str], reason: Reason) -> None:
        """Let other modules answer for these targets, wherever they are held; see `adopt`."""
        self.adopt([Unseen(holder, reason) for holder in holders_of(self.model, self.targets, names)])

    def forward(self, run: Callable[[], Answer], batch_size: int) -> Answer:
        """Run a forward pass on a batch under the hooks, and return its result, if its calls told all gradients."""
        self.state.restart()
        self.state.phase = "forward"
        self.state.batch_size = batch_size
        try:
            with observable(), torch.enable_grad(), self._whole_pass.aliasing(noting=True):
                answer = run()
        except (RuntimeError, IndexError, ValueError) as error:
            if self.state.expanded and self._works_unhooked(run):
                raise ValueError(refusals.fails_in_batch(error, batch_size)) from error
            raise
        finally:
            self.state.phase = None
        if self.state.mixing:
            raise ValueError(refusals.mixes_examples(list(self.state.mixing), batch_size))
        if self.state.unseen:
            self.adopt(self.state.unseen)
        return answer

    def _works_unhooked(self, run: Callable[[], Any]) -> bool:
        self.state.phase = None
        try:
            with observable(), torch.no_grad():
                run()
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    def silent(self, losses: Tensor) -> list[str]:
        """Return the targets of layers that the last forward pass, which led to these losses, has not used in sight."""
        if self._whole_pass.owners:
            reached = self._whole_pass.reached(leaves_of(losses))
            self.state.called |= reached | self._whole_pass.called
            self.state.called_without_grad |= self._whole_pass.called_without_grad
        return silent_targets(self.model, self.targets, self.state.called)

    def backward(
        self,
        losses: Tensor,
        consume: Consumer,
        unit: Unit = "example",
    ) -> None:
        """Backpropagate the sum of the last forward pass's losses; no ``.grad`` is written.

        Args:
            losses: ``(n,)``, or their sum. Losses that depend on no targeted parameter have nothing to report.
            consume: Receives the gradients of every use.
            unit: Whose gradients: each example's, or each token's.

        Raises:
            RuntimeError: If the model returned one of its own parameters in place of an activation.
            ValueError: If the model checkpoints its activations the reentrant way.
            UnsettledError: If it met layers whose calls do not tell; see `captum_sdi.capture.settling`.
        """
        if not losses.requires_grad:
            return
        self.state.phase = "backward"
        self.state.consume = consume
        self.state.unit = unit
        self.state.unseen = []
        # The user's autocast is for the model; rules and sketches compute in full precision.
        full_precision = torch.autocast(self.state.dummy.device.type, enabled=False)
        try:
            with full_precision, observable(), self._whole_pass.aliasing(noting=False):
                self.state.is_muted = True
                self._whole_pass.report(losses, consume)
                self.state.is_muted = False
                losses.register_hook(self.state.note_backward)
                ones = torch.ones_like(losses)
                torch.autograd.grad(losses, self.state.dummy, ones, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(refusals.reentrant_checkpointing("a part of the model")) from error
            raise
        finally:
            self.state.is_muted = False
            self.state.phase = None
            self.state.consume = None
        for name, parameter in self.model.named_parameters():
            if not parameter.is_leaf:
                raise RuntimeError(refusals.parameter_in_graph(name))
        if self.state.unseen:
            self.adopt(self.state.unseen)

    # --- the hooks ---

    def _on_loop_call(self, module: nn.Module, args: object) -> None:
        if self.state.phase == "forward":
            self._clock.count_call(module)
            self.state.trim_heap(self._clock.step)

    def _on_anchor(self, module: nn.Module, args: object) -> None:
        if self.state.phase == "forward":
            refuse_other_threads(self.state.thread, module, args)  # this hook is called before the lock's own
            self._clock.count_anchor()

    def _expand(
        self,
        owner: Owner,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any] | None:
        """Call a layer for every example where the model calls it once for the whole batch."""
        # GPT-2 calls wpe once. The examples' gradients could not be told apart, and the model broadcasts the output of
        # such a layer in any case.
        # A call for one example alone looks the same: where `expanded` names new layers, the rehearsal compares.
        refuse_other_threads(self.state.thread, module, args)
        activation = only_tensor(args, kwargs)
        if not self.state.is_listening or self.state.batch_size == 1 or activation is None:
            return None
        if activation.ndim < 2 or activation.shape[0] != 1:
            return None
        self.state.expanded.add(owner.name)
        expanded = activation.expand(self.state.batch_size, *activation.shape[1:])

        def replaced(argument: Any) -> Any:
            return expanded if argument is activation else argument

        expanded_args = tuple(map(replaced, args))
        expanded_kwargs = {key: replaced(argument) for key, argument in kwargs.items()}
        return expanded_args, expanded_kwargs

    def _on_use(
        self,
        owner: Owner,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Tensor | None:
        """Put the identity behind a layer's output."""
        if not self.state.is_listening:
            return None
        targets = owner.targets.values()
        if not torch.is_grad_enabled():
            # The step counts, and contributes nothing: influence is that of the graph that trained.
            if inside_autograd_function():
                raise ValueError(refusals.reentrant_checkpointing(str(owner)))
            self.state.called_without_grad.update(targets)
            return None
        if self.state.phase == "forward":
            self.state.called.update(targets)
        activation = only_tensor(args, kwargs)
        rule = None if activation is None else self._rule(owner, activation, output)
        if activation is None or rule is None:
            self.state.note_unseen(owner.holders)
            return None
        self.state.token_axes.note(owner, activation, output)
        # The output's shape alone: holding the output would keep it, and through it the graph, alive.
        moment = self._clock.moment_of(module)
        report = partial(self._report, owner, rule, moment, output.shape)
        return observed(
            output,
            self.state.dummy,
            activation.detach(),
            report,
            fresh=rule.fresh_output,
        )

    def _report(
        self,
        owner: Owner,
        rule: Rule,
        moment: Moment,
        shape: torch.Size,
        activation: Tensor,
        backprop: Tensor,
    ) -> None:
        """Hand a use's gradients to the consumer."""
        if self.state.is_muted:
            return
        consume = self.state.consumer(owner)
        place = self._clock.bin(moment)
        self.state.trim_heap(place)
        # A model spread over devices may hand its activations on to the next one.
        activation = activation.to(owner.device)
        backprop = backprop.reshape(shape).to(owner.device)
        wanted = tuple(owner.targets)
        gradients_of = rule.gradients if self.state.unit == "example" else partial(token_gradients, rule)
        yielded = set()
        self.state.running_rule.active = True
        try:
            for local_name, rows, gradient in gradients_of(owner.module, activation, backprop, wanted):
                if local_name in owner.targets:
                    consume(owner.targets[local_name], rows, place, gradient)
                    yielded.add(local_name)
        finally:
            self.state.running_rule.active = False
        missing = [local_name for local_name in wanted if local_name not in yielded]
        if missing and activation.numel():
            raise ValueError(refusals.incomplete_rule(str(owner), rule.name, missing))

    # --- the rule of a layer ---

    def _rule(self, owner: Owner, activation: Tensor, output: Any) -> Rule | None:
        """Return the rule for a layer's call; None where none tells its examples' gradients."""
        batch_shape = (self.state.batch_size,)
        has_axes = isinstance(output, Tensor) and activation.shape[:1] == output.shape[:1] == batch_shape
        rules = self._adoption.rules_of(owner.module)
        is_batch = self.state.batch_size > 1  # a single example cannot tell whether examples mix
        rule = rules.get(is_batch)
        if rule is None and has_axes:
            chosen = choose_rule(owner.module, activation, output)
            if isinstance(chosen, str):
                return None
            rule = chosen
            if output[:1].any():  # of zeros nothing can be told: looked at again at the next call
                rules[is_batch] = rule
        return rule if has_axes else None

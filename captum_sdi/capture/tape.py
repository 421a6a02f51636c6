"""The hooks: what every use of a shared layer read and what flowed back to it, and at which loop step.

`Tape` is the only code that touches the model. While it is installed, each call of a layer that owns a targeted
parameter passes its output through an identity in the autograd graph, which saves what the layer read and, in the
backward pass, hands it to the layer's rule together with the gradient that arrives. Two choices matter.

* The loop step is a value that the identity's report holds since the forward pass. A stack popped in the backward pass
  is silently wrong as soon as some loop outputs do not reach the loss (early exit, exit gates).
* Every parameter is frozen meanwhile, so the backward pass forms no weight gradient: a dummy scalar that requires a
  gradient keeps the identities in the graph.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_sdi.borrow import evaluating, frozen, recomputed
from captum_sdi.capture import refusals
from captum_sdi.capture.heap import HeapTrimmer
from captum_sdi.capture.identity import observed
from captum_sdi.capture.owners import Owner, find_owners
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.choose import choose_rule
from captum_sdi.capture.tokens import TokenAxes, Unit, token_gradients
from captum_sdi.features import Gradient, LoopSpec
from captum_sdi.loop.clock import LoopClock, Moment
from captum_sdi.model_lock import exclusive, refuse_other_threads

Consumer = Callable[[str, slice, int, Gradient], None]
"""Called in the backward pass with (parameter name, rows, bin, gradients): a row is an example, or a token."""


class _RunningRule(threading.local):
    """Whether a rule runs now, in this thread: autograd has one for each device."""

    active = False


class Tape:
    """Hooks on one model for one loop and one set of targeted parameters; install with ``with``.

    Args:
        model: The model; outside ``with`` it is as the user left it.
        activation_checkpointing: Recompute the looped modules in the backward pass instead of keeping their
            activations.

    Raises:
        ValueError: If the loop names a module the model does not have, or a targeted parameter is owned by a module
            that no rule covers or has a gradient hook.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        loop: LoopSpec,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.targets = targets
        self._clock = LoopClock(model, loop)
        self.owners = find_owners(model, targets)
        self._recomputed: list[nn.Module] = []
        if activation_checkpointing:
            self._recomputed = [module for module in self._clock.modules if next(module.children(), None)]
        self._rules: dict[tuple[str, bool], Rule] = {}
        device = next(iter(targets.values())).device
        self._dummy = torch.zeros((), device=device, requires_grad=True)
        self._heap = HeapTrimmer() if self._recomputed and device.type == "cpu" else None
        self._running_rule = _RunningRule()
        self._thread = threading.get_ident()
        self._installed = ExitStack()
        self._forget()

    def _forget(self) -> None:
        """Go back to the state before a forward pass."""
        self._phase: Literal["forward", "backward"] | None = None
        self._batch_size = 0
        self._unit: Unit = "example"
        self._consume: Consumer | None = None
        self._backward_task = -1
        self._token_axes = TokenAxes()
        self._clock.restart()
        if self._heap is not None:
            self._heap.restart()
        self.called: set[str] = set()
        self.called_without_grad: set[str] = set()
        self.expanded: set[str] = set()

    @property
    def n_steps(self) -> int:
        """How many loop steps the last forward pass ran."""
        return self._clock.n_steps

    @property
    def n_tokens(self) -> int:
        """How many token positions each layer read in the last forward pass."""
        return self._token_axes.length(self.layers_without)

    def layers_without(self, names: Collection[str]) -> str:
        """Write which layers= ask for all targets but these; see `refusals.suggest_layers`."""
        return refusals.suggest_layers(self.model, self.targets, set(names))

    # --- installing, and the passes ---

    def __enter__(self) -> Tape:
        with ExitStack() as stack:
            self._thread = threading.get_ident()
            stack.enter_context(exclusive(self.model))
            stack.callback(self._forget)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(frozen(self.model))
            for handle in self._registered_hooks():
                stack.callback(handle.remove)
            for module in self._recomputed:
                stack.enter_context(recomputed(module, lambda: self._listening))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._installed.close()

    def _registered_hooks(self) -> Iterator[RemovableHandle]:
        for module in self._clock.modules:
            yield module.register_forward_pre_hook(self._on_loop_call)
        for module in self._clock.anchors:
            yield module.register_forward_pre_hook(self._on_anchor, prepend=True)
        for owner in self.owners:
            expand = partial(self._expand, owner)
            yield owner.module.register_forward_pre_hook(expand, prepend=True, with_kwargs=True)
            # First, or a hook of the user's registered earlier would hide a branch of the graph from the identity.
            on_use = partial(self._on_use, owner)
            yield owner.module.register_forward_hook(on_use, prepend=True, with_kwargs=True)

    def forward(self, run: Callable[[], Any], batch_size: int) -> Any:
        """Run a forward pass on a batch under the hooks, and return its result."""
        self._forget()
        self._phase = "forward"
        self._batch_size = batch_size
        try:
            with observable(), torch.enable_grad():
                return run()
        except (RuntimeError, IndexError, ValueError) as error:
            if self.expanded and self._works_unhooked(run):
                raise ValueError(refusals.fails_in_batch(error, batch_size)) from error
            raise
        finally:
            self._phase = None

    def _works_unhooked(self, run: Callable[[], Any]) -> bool:
        self._phase = None
        try:
            with observable(), torch.no_grad():
                run()
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    def backward(self, losses: Tensor, consume: Consumer, unit: Unit = "example") -> None:
        """Backpropagate the sum of the last forward pass's losses; no ``.grad`` is written.

        Args:
            losses: ``(n,)``, or their sum. Losses that depend on no targeted parameter have nothing to report.
            consume: Receives the gradients of every use.
            unit: Whose gradients: each example's, or each token's.

        Raises:
            RuntimeError: If the model returned one of its own parameters in place of an activation.
            ValueError: If the model checkpoints its activations the reentrant way.
        """
        if not losses.requires_grad:
            return
        self._phase = "backward"
        self._consume = consume
        self._unit = unit
        losses.register_hook(self._on_backward)
        # The user's autocast is for the model; rules and sketches compute in full precision.
        full_precision = torch.autocast(self._dummy.device.type, enabled=False)
        try:
            with full_precision, observable():
                ones = torch.ones_like(losses)
                torch.autograd.grad(losses, self._dummy, ones, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(refusals.reentrant_checkpointing("a part of the model")) from error
            raise
        finally:
            self._phase = None
            self._consume = None
        for name, parameter in self.model.named_parameters():
            if not parameter.is_leaf:
                raise RuntimeError(refusals.parameter_in_graph(name))

    # --- the hooks ---

    @property
    def _listening(self) -> bool:
        """Whether a pass is under way, and it is not a rule that calls the layer."""
        return self._phase is not None and not self._running_rule.active

    def _on_backward(self, grad: Tensor) -> None:
        """Remember this backward pass's autograd task id, so that a nested pass can be refused."""
        self._backward_task = torch._C._current_graph_task_id()

    def _on_loop_call(self, module: nn.Module, args: object) -> None:
        if self._phase == "forward":
            self._clock.count_call(module)
            self._trim_heap(self._clock.step)

    def _on_anchor(self, module: nn.Module, args: object) -> None:
        if self._phase == "forward":
            refuse_other_threads(self._thread, module, args)  # this hook is called before the lock's own
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
        refuse_other_threads(self._thread, module, args)
        activation = only_tensor(args, kwargs)
        if not self._listening or self._batch_size == 1 or activation is None:
            return None
        if activation.ndim < 2 or activation.shape[0] != 1:
            return None
        self.expanded.add(owner.name)
        expanded = activation.expand(self._batch_size, *activation.shape[1:])

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
        if not self._listening:
            return None
        targets = owner.targets.values()
        if not torch.is_grad_enabled():
            # The step counts, and contributes nothing: influence is that of the graph that trained.
            if inside_autograd_function():
                raise ValueError(refusals.reentrant_checkpointing(str(owner)))
            self.called_without_grad.update(targets)
            return None
        if self._phase == "forward":
            self.called.update(targets)
        activation = only_tensor(args, kwargs)
        if activation is None:
            refused = [(str(owner), refusals.several_inputs())]
            raise ValueError(refusals.uncovered_layers(refused, self.layers_without(targets)))
        rule = self._rule(owner, activation, output)
        self._check_example_axis(owner, activation, "was given")
        self._check_example_axis(owner, output, "returned")
        self._token_axes.note(owner, activation, output)
        # The output's shape alone: holding the output would keep it, and through it the graph, alive.
        moment = self._clock.moment_of(module)
        report = partial(self._report, owner, rule, moment, output.shape)
        return observed(output, self._dummy, activation.detach(), report, fresh=rule.fresh_output)

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
        consume = self._consume
        if consume is None or torch._C._current_graph_task_id() != self._backward_task:
            raise ValueError(refusals.nested_backward(str(owner)))
        place = self._clock.bin(moment)
        self._trim_heap(place)
        # A model spread over devices may hand its activations on to the next one.
        activation = activation.to(owner.device)
        backprop = backprop.reshape(shape).to(owner.device)
        wanted = tuple(owner.targets)
        gradients_of = rule.gradients if self._unit == "example" else partial(token_gradients, rule)
        yielded = set()
        self._running_rule.active = True
        try:
            for local_name, rows, gradient in gradients_of(owner.module, activation, backprop, wanted):
                if local_name in owner.targets:
                    consume(owner.targets[local_name], rows, place, gradient)
                    yielded.add(local_name)
        finally:
            self._running_rule.active = False
        missing = [local_name for local_name in wanted if local_name not in yielded]
        if missing and activation.numel():
            raise ValueError(refusals.incomplete_rule(str(owner), rule.name, missing))

    def _trim_heap(self, place: int) -> None:
        if self._heap is not None:
            self._heap.trim_at((self._phase, place))

    # --- the rule of a layer ---

    def _rule(self, owner: Owner, activation: Tensor, output: Any) -> Rule:
        key = owner.name, self._batch_size > 1  # a single example cannot tell whether examples mix
        rule = self._rules.get(key)
        if rule is None:
            chosen = choose_rule(owner.module, activation, output)
            if isinstance(chosen, str):
                remedy = self.layers_without(owner.targets.values())
                raise ValueError(refusals.uncovered_layers([(str(owner), chosen)], remedy))
            rule = chosen
            if output[:1].any():  # of zeros nothing can be told: looked at again at the next call
                self._rules[key] = rule
        return rule

    def _check_example_axis(self, owner: Owner, tensor: Tensor, verb: str) -> None:
        if tensor.shape[:1] != (self._batch_size,):
            remedy = self.layers_without(owner.targets.values())
            raise ValueError(refusals.no_example_axis(str(owner), verb, tensor.shape, self._batch_size, remedy))


@contextmanager
def observable() -> Iterator[None]:
    """Run outside the user's inference mode and compiler."""
    # Hooks capture nothing inside compiled code, without any error.
    with torch.inference_mode(mode=False), torch.compiler.set_stance("force_eager"):
        yield


def inside_autograd_function() -> bool:
    """Say whether the caller runs in an autograd.Function, as reentrant checkpointing does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first_argument = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first_argument, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False


def only_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer was called with; None where there was anything beside it."""
    arguments = [*args, *kwargs.values()]
    given = [argument for argument in arguments if argument is not None]
    if len(given) == 1 and isinstance(given[0], Tensor):
        return given[0]
    return None

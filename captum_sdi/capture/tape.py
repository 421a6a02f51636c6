"""The hooks: what every use of a shared layer read and what flowed back to it, and at which loop step.

`Tape` is the only code that touches the model. While it is installed, each call of a layer that owns a targeted
parameter passes its output through `_Tap`, an identity in the autograd graph that saves what the layer read and, in
the backward pass, hands it to the layer's rule together with the gradient that arrives. Three choices matter.

* The loop step is a value the tap closes over in the forward pass. A stack popped in the backward pass is silently
  wrong as soon as some loop outputs do not reach the loss (early exit, exit gates).
* Every parameter is frozen meanwhile, so the backward pass forms no weight gradient: a dummy scalar that requires a
  gradient keeps the taps in the graph.
* What a layer read is saved the ordinary way, so activation checkpointing drops and recomputes it like anything else.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating, frozen, recomputed
from captum_sdi.capture.refusals import NESTED, REENTRANT, describe_layer, suggest_layers, uncovered_layers
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.choose import choose_rule, why_uncovered
from captum_sdi.features import Bins, Gradient, LoopSpec, canonical_name
from captum_sdi.loop.parameters import called_modules, find_module

Consumer = Callable[[str, slice, int, Gradient], None]
"""Called in the backward pass with (parameter name, examples, bin, per-example gradients)."""


class _Tap(torch.autograd.Function):
    """The identity; its backward reports (what the layer read, the gradient at its output)."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, dummy: Tensor, activation: Tensor, in_place: bool, report: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.report = report
        if not in_place:
            return output.clone()
        ctx.mark_dirty(output)  # a view of the output instead would break models that work in place on it
        return output

    @staticmethod
    def backward(ctx: Any, backprop: Tensor) -> tuple[Tensor, None, None, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.report(activation, backprop)
        return backprop, None, None, None, None


class _Use:
    """One call of a layer: the loop step it fell in, settled when the forward pass ends."""

    def __init__(self, step: int, in_loop: bool, loop_calls: int) -> None:
        self.step, self.in_loop, self.loop_calls = step, in_loop, loop_calls

    def bin(self, all_loop_calls: int) -> int:
        if self.step < 0:
            return Bins.PRELUDE
        # A layer outside the loop's list (a norm between two iterations) belongs to the step it follows as long as
        # the loop goes on after it.
        return Bins.of_step(self.step) if self.in_loop or self.loop_calls < all_loop_calls else Bins.CODA


class Tape:
    """Hooks on one model for one loop and one set of targeted parameters; install with ``with``.

    Args:
        model: The model; outside ``with`` it is as the user left it.
        targets: The targeted parameters by name.
        loop: What repeats.
        activation_checkpointing: Recompute the looped modules in the backward pass instead of keeping their
            activations.

    Raises:
        ValueError: The loop names a module the model does not have, or a targeted parameter is owned by a module that
            no rule covers or has a gradient hook.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        loop: LoopSpec,
        activation_checkpointing: bool = False,
    ) -> None:
        self.model, self.targets = model, targets
        self._loop, self._anchors = _resolve(model, loop.modules), _resolve(model, loop.anchors)
        self._in_loop = {id(part) for module in self._loop for part in module.modules()}
        self._checkpointed = [m for m in self._loop if activation_checkpointing and next(m.children(), None)]
        self._names = {id(module): canonical_name(name) for name, module in model.named_modules()}
        self._owners = _owners(model, targets)
        self._rules: dict[tuple[int, bool], Rule] = {}
        self._forget()

    def _forget(self) -> None:
        """Back to the state before a forward pass."""
        self._phase: str | None = None
        self._batch_size = 0
        self._step, self._loop_calls, self._pass = -1, 0, -1
        self._first_called: nn.Module | None = None
        self._consume: Consumer | None = None
        self._released: tuple[str | None, int] | None = None
        self.called: set[str] = set()
        self.called_without_grad: set[str] = set()

    @property
    def n_steps(self) -> int:
        """How many loop steps the last forward pass ran."""
        return self._step + 1

    def __enter__(self) -> Tape:
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(frozen(self.model))
            for module in self._loop:
                stack.callback(module.register_forward_pre_hook(self._on_loop_call).remove)
            for module in self._anchors:
                stack.callback(module.register_forward_pre_hook(self._on_anchor, prepend=True).remove)
            for module, _ in self._owners.values():
                stack.callback(module.register_forward_pre_hook(self._expand, prepend=True, with_kwargs=True).remove)
                # First, or a hook of the user's registered earlier would hide a branch of the graph from the tap.
                stack.callback(module.register_forward_hook(self._on_use, prepend=True, with_kwargs=True).remove)
            for module in self._checkpointed:
                stack.enter_context(recomputed(module))
            self._stack = stack.pop_all()
        device = next(iter(self.targets.values())).device
        self._dummy = torch.zeros((), device=device, requires_grad=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def forward(self, run: Callable[[], Any], batch_size: int) -> Any:
        """Runs one forward pass under the hooks.

        Args:
            run: Calls the model on a batch.
            batch_size: The number of examples n in it.

        Returns:
            What ``run`` returns.
        """
        self._forget()
        self._phase, self._batch_size = "forward", batch_size
        try:
            # Hooks capture nothing inside compiled code, without any error.
            with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                return run()
        finally:
            self._phase = None

    def backward(self, losses: Tensor, consume: Consumer) -> None:
        """Backpropagates the sum of the last forward pass's losses; no ``.grad`` is written.

        Args:
            losses: ``(n,)``, or their sum. What depends on no targeted parameter has nothing to report.
            consume: Receives every use's per-example gradients.

        Raises:
            RuntimeError: A model returned one of its own parameters in place of an activation.
            ValueError: The model checkpoints its activations the reentrant way.
        """
        if not losses.requires_grad:
            return
        self._phase, self._consume = "backward", consume
        losses.register_hook(self._on_backward)
        try:
            # The user's autocast is for the model; rules and sketches compute in full precision.
            full = torch.autocast(self._dummy.device.type, enabled=False)
            with full, torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
                torch.autograd.grad(losses, self._dummy, torch.ones_like(losses), allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(REENTRANT.format("a part of the model")) from error
            raise
        finally:
            self._phase, self._consume = None, None
        for name, parameter in self.model.named_parameters():
            if not parameter.is_leaf:
                raise RuntimeError(f"parameter {name!r} became part of the graph; please report this model.")

    @contextmanager
    def watching(self) -> Iterator[Callable[[Tensor], list[str]]]:
        """Forward passes meanwhile tell uses of the targets beside their layers' calls; for no backward pass.

        Yields:
            From losses to the names of the targets that reach them past every hook.
        """

        # Within their layers' calls the targets are constants: those that the graph still reaches are used elsewhere.
        def hide(module: nn.Module, args: object) -> None:
            for local, parameter in originals[module].items():
                module._parameters[local] = parameter.detach()  # type: ignore[assignment]

        def restore(module: nn.Module, *_: object) -> None:
            module._parameters.update(originals[module])

        originals = {m: {local: m.get_parameter(local) for local in mine} for m, mine in self._owners.values()}
        frozen = [parameter for parameter in self.targets.values() if not parameter.requires_grad]
        with ExitStack() as stack:
            for module in originals:
                stack.callback(restore, module)
                stack.callback(module.register_forward_pre_hook(hide, prepend=True).remove)
                stack.callback(module.register_forward_hook(restore, prepend=True, always_call=True).remove)
            for parameter in frozen:
                stack.callback(parameter.requires_grad_, False)
                parameter.requires_grad_(True)
            yield self._reached

    def _reached(self, losses: Tensor) -> list[str]:
        """Names of the targets among the leaves of the losses' graph."""
        leaves: set[int] = set()
        seen, pending = set(), [losses.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            pending += [parent for parent, _ in node.next_functions]
        return [name for name, parameter in self.targets.items() if id(parameter) in leaves]

    def _on_backward(self, grad: Tensor) -> None:
        """First in the backward pass: which one it is, to tell others that run within it."""
        self._pass = torch._C._current_graph_task_id()

    # --- forward hooks ---

    def _on_loop_call(self, module: nn.Module, args: object) -> None:
        if self._phase != "forward":
            return
        self._loop_calls += 1
        if not self._anchors:
            self._first_called = module if self._first_called is None else self._first_called
            self._step += module is self._first_called
        self._release(self._step)

    def _on_anchor(self, module: nn.Module, args: object) -> None:
        if self._phase == "forward":
            self._step += 1

    def _expand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        # A layer called once for the whole batch (GPT-2's wpe) is called for every example, or their gradients could
        # not be told apart; what it adds to is broadcast in any case.
        activation = _only_tensor(args, kwargs)
        if self._phase is None or self._batch_size == 1 or activation is None:
            return None
        if activation.ndim < 2 or activation.shape[0] != 1:
            return None
        expanded = activation.expand(self._batch_size, *activation.shape[1:])
        return (
            tuple(expanded if value is activation else value for value in args),
            {key: expanded if value is activation else value for key, value in kwargs.items()},
        )

    def _on_use(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._phase is None:
            return None
        _, parameters = self._owners[id(module)]
        if not torch.is_grad_enabled():
            # The step counts, and contributes nothing: influence is that of the graph that trained.
            if _inside_autograd_function():
                raise ValueError(REENTRANT.format(self._describe(module)))
            self.called_without_grad.update(parameters.values())
            return None
        if self._phase == "forward":
            self.called.update(parameters.values())
        activation = _only_tensor(args, kwargs)
        rule = self._rule(module, activation, output)
        assert activation is not None
        use = _Use(self._step, id(module) in self._in_loop, self._loop_calls)
        shape = output.shape  # closing over the output itself would keep it, and through it the graph, alive
        device = self.targets[next(iter(parameters.values()))].device

        def report(activation: Tensor, backprop: Tensor) -> None:
            if self._consume is None or torch._C._current_graph_task_id() != self._pass:
                raise ValueError(NESTED.format(self._describe(module)))
            bin = use.bin(self._loop_calls)
            self._release(bin)
            # A model spread over devices may hand its activations on to the next one.
            activation, backprop = activation.to(device), backprop.reshape(shape).to(device)
            for local, examples, gradient in rule.gradients(module, activation, backprop, tuple(parameters)):
                self._consume(parameters[local], examples, bin, gradient)

        return self._tap(output, activation.detach(), rule.fresh_output, report)

    def _release(self, place: int) -> None:
        """Once per loop step of a checkpointed pass on a CPU, memory that is free goes back to the system."""
        now = self._phase, place
        # glibc keeps it, and takes the small nodes of the graph out of the gaps that the activations left, so that
        # the next step's activations do not fit there any more: what checkpointing frees would be lost again.
        if self._checkpointed and now != self._released and self._dummy.device.type == "cpu":
            self._released = now
            _heap_trimmer()(0)

    def _tap(self, output: Tensor, activation: Tensor, fresh: bool, report: Callable[..., None]) -> Tensor:
        base = output._base if output._is_view() else None
        if fresh and base is not None and base.numel() == output.numel() and output.is_contiguous():
            # Linear with a bias and Conv1D return a view of the whole; tapping the view would copy it.
            return _Tap.apply(base, self._dummy, activation, True, report).view(output.shape)
        return _Tap.apply(output, self._dummy, activation, fresh and base is None, report)

    def _rule(self, module: nn.Module, activation: Tensor | None, output: Any) -> Rule:
        key = (id(module), self._batch_size > 1)  # a single example cannot tell whether examples mix
        rule = self._rules.get(key)
        if rule is None or activation is None:
            several = "it was called with something else than one tensor"
            chosen = several if activation is None else choose_rule(module, activation, output)
            if isinstance(chosen, str):
                out = set(self._owners[id(module)][1].values())
                raise ValueError(uncovered_layers([(self._describe(module), chosen)], self.without(out)))
            rule = chosen
            if output[:1].any():  # of zeros nothing can be told: looked at again at the next call
                self._rules[key] = rule
        assert activation is not None
        for what, tensor in (("was given", activation), ("returned", output)):
            if tensor.shape[:1] != (self._batch_size,):
                raise ValueError(
                    f"{self._describe(module)} {what} a tensor of shape {tuple(tensor.shape)} in a batch of "
                    f"{self._batch_size}: without the example axis first, per-example gradients cannot be told apart. "
                    f"Leave it out{self.without(set(self._owners[id(module)][1].values()))}, or let the model pass it "
                    "one row per example."
                )
        return rule

    def without(self, names: Iterable[str]) -> str:
        """How to ask for all targets but some.

        Args:
            names: Targets to leave out.

        Returns:
            Such as " with layers=['core.fc', 'core.norm']"; empty when nothing is left.
        """
        return suggest_layers(self.model, self.targets, set(names))

    def _describe(self, module: nn.Module) -> str:
        return describe_layer(self._names.get(id(module), "?"), module, self._owners[id(module)][1].values())


@functools.cache
def _heap_trimmer() -> Callable[[int], int]:
    """The malloc_trim of glibc; where there is none, a function that does nothing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return lambda _: 0


def _resolve(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules of these names that are called, each once even when it has several names."""
    modules = [called for name in names for called in called_modules(find_module(model, name, "loop="))]
    return list({id(module): module for module in modules}.values())


def _owners(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> dict[int, tuple[nn.Module, dict[str, str]]]:
    """Every module that owns targeted parameters, with its local names mapped to theirs."""
    # A parameter may have several owners (tied embedding and head, blocks that share tensors): their uses add up.
    by_id = {id(parameter): name for name, parameter in targets.items()}
    owners: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    uncovered: list[tuple[str, str, set[str]]] = []
    covered: set[str] = set()
    for name, module in model.named_modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        mine = {local: by_id[id(parameter)] for local, parameter in own if id(parameter) in by_id}
        if not mine:
            continue
        why = why_uncovered(module)
        if why is None and any(targets[target]._backward_hooks for target in mine.values()):
            why = "a hook of its own changes its gradient (Tensor.register_hook)"
        if why is None:
            owners[id(module)] = (module, mine)
            covered.update(mine.values())
        else:
            uncovered.append((describe_layer(canonical_name(name), module, mine.values()), why, set(mine.values())))
    # A head that only holds the bias of a layer inside it does not use it; if it does, `watching` tells.
    refused = [(what, why) for what, why, names in uncovered if not names <= covered]
    if refused:
        out = set().union(*(names for _, _, names in uncovered)) - covered
        raise ValueError(uncovered_layers(refused, suggest_layers(model, targets, out)))
    return owners


def _inside_autograd_function() -> bool:
    """Whether the caller runs in the forward of a `torch.autograd.Function`, as reentrant checkpointing does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False


def _only_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer was given, if that is one tensor and nothing else."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None

"""Parameters whose uses only the model's whole pass tells apart: one backward pass for each example.

A parameter that the model uses beside any call inside its loop (a state of its own, an embedding of the step, a head
that multiplies with the embedding's weight) belongs to no call that is of one step and has an example axis. In its
place stand aliases, a new one at every moment of the forward pass, and

    example i's gradient at a moment = ∂ℓ_i / ∂(the alias of that moment)

by an ordinary backward pass of the loss ℓ_i. It is exact for any use, and costs n backward passes in place of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from captum_sdi.borrow import put_parameters
from captum_sdi.capture.owners import Owner
from captum_sdi.capture.rules.base import lifted
from captum_sdi.features import Dense
from captum_sdi.loop.clock import LoopClock, Moment

Consumer = Callable[[str, slice, int, Dense], None]
"""Called with (parameter name, rows, bin, gradients)."""


@dataclass(frozen=True)
class Use:
    """All uses of a target at one moment."""

    target: str
    alias: nn.Parameter
    moment: Moment


class WholePass:
    """Aliases in the place of the targets of some layers, while a pass runs.

    Args:
        owners: The layers.
        clock: Counts the loop's steps.
    """

    def __init__(self, owners: Sequence[Owner], clock: LoopClock) -> None:
        self.owners = owners
        self._clock = clock
        self._uses: list[Use] = []
        self._is_noting = False
        self._depth = 0
        self.called: set[str] = set()
        """Targets whose layers were called."""
        self.called_without_grad: set[str] = set()
        """Targets whose layers were called where no graph is built."""

    @contextmanager
    def aliasing(self, *, noting: bool) -> Iterator[None]:
        """Let aliases stand in the targets' place.

        Args:
            noting: Whether these are the uses to be told apart; False where a part of the pass is repeated.
        """
        if not self.owners:
            yield
            return
        if noting:
            self._uses = []
            self.called = set()
            self.called_without_grad = set()
        self._is_noting = noting
        originals = []
        for owner in self.owners:
            parameters = {own_name: owner.module.get_parameter(own_name) for own_name in owner.targets}
            originals.append((owner.module, parameters))
        with ExitStack() as stack:
            for module, parameters in originals:
                stack.callback(put_parameters, module, parameters)
            for module in self._clock.modules:
                stack.callback(module.register_forward_pre_hook(partial(self._pass_border, 1)).remove)
                stack.callback(module.register_forward_hook(partial(self._pass_border, -1), always_call=True).remove)
            for module in self._clock.anchors:
                stack.callback(module.register_forward_pre_hook(partial(self._pass_border, 0)).remove)
            for owner in self.owners:
                enter = partial(self._enter, owner)
                leave = partial(self._leave, owner)
                stack.callback(owner.module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(owner.module.register_forward_hook(leave, always_call=True).remove)
            self._depth = 0
            self._pass_border(0)
            yield

    def _pass_border(self, depth: int, *_: object) -> None:
        """Begin a new moment of what is used beside the layers' calls, deeper in the loop's modules or less."""
        self._depth += depth
        for owner in self.owners:
            self._alias(owner, self._clock.moment(in_loop=self._depth > 0))

    def _enter(self, owner: Owner, module: nn.Module, *_: object) -> None:
        self._alias(owner, self._clock.moment_of(module))
        if self._is_noting:
            called = self.called if torch.is_grad_enabled() else self.called_without_grad
            called.update(owner.targets.values())

    def _leave(self, owner: Owner, *_: object) -> None:
        self._alias(owner, self._clock.moment(in_loop=self._depth > 0))

    def _alias(self, owner: Owner, moment: Moment) -> None:
        aliases = {}
        for own_name, target in owner.targets.items():
            standing = attrgetter(own_name)(owner.module)  # in an offloaded module a copy, which is no Parameter
            alias = nn.Parameter(standing.detach(), requires_grad=True)
            aliases[own_name] = alias
            if self._is_noting:
                self._uses.append(Use(target, alias, moment))
        put_parameters(owner.module, aliases)

    def reached(self, leaves: set[int]) -> set[str]:
        """Return the names of the targets whose aliases are among these leaves of a graph."""
        return {use.target for use in self._uses if id(use.alias) in leaves}

    def report(self, losses: Tensor, consume: Consumer) -> None:
        """Backpropagate the losses ``(n,)`` one by one, and hand each example's gradients on."""
        if not self.owners:
            return
        aliases = [use.alias for use in self._uses]
        device_of = {target: owner.device for owner in self.owners for target in owner.targets.values()}
        with torch.enable_grad():
            example_losses = losses.reshape(-1).unbind()
        for number, loss in enumerate(example_losses):
            gradients = torch.autograd.grad(loss, aliases, retain_graph=True, allow_unused=True)
            sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(()))
            for use, gradient in zip(self._uses, gradients, strict=True):
                if gradient is not None:
                    key = use.target, self._clock.bin(use.moment)
                    on_device = lifted(gradient).to(device_of[use.target])
                    sums[key] = on_device + sums[key].to(on_device.device)
            for (target, place), gradient in sums.items():
                consume(target, slice(number, number + 1), place, Dense(gradient.unsqueeze(0)))

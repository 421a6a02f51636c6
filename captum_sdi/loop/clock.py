"""Which loop step a forward pass is in, and which bin a layer's call belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from captum_sdi.features import Bins, LoopSpec
from captum_sdi.loop.kinds import only_embeds_or_normalises
from captum_sdi.loop.parameters import called_modules, find_module


@dataclass(frozen=True)
class Moment:
    """When a layer was called. Which bin that is, only the end of the forward pass tells."""

    step: int
    """The loop step that had begun; -1 before the first."""
    in_loop: bool
    """Whether the layer is inside one of the loop's modules."""
    loop_calls: int
    """How often the loop's modules had been called."""


class LoopClock:
    """Counts the loop steps of one forward pass at a time.

    An anchor's call starts a step. So does the call of a looped module before any anchor's: some loops leave their
    anchor out in the first iteration, as an adapter that has no state to mix in yet. Embeddings and norms start none,
    nor do modules with an anchor inside.

    Raises:
        ValueError: If the loop names a module the model does not have.
    """

    def __init__(self, model: nn.Module, loop: LoopSpec) -> None:
        self.modules = called_loop_modules(model, loop.modules)
        self.anchors = called_loop_modules(model, loop.anchors)
        self._inside: set[int] = set()
        for module in self.modules:
            self._inside.update(id(submodule) for submodule in module.modules())
        self._early_starters = {id(module) for module in self.modules if may_start_early(module, self.anchors)}
        self.restart()

    def restart(self) -> None:
        """Begin a forward pass."""
        self.step = -1
        self._calls = 0
        self._first_called: nn.Module | None = None

    @property
    def n_steps(self) -> int:
        """How many loop steps the forward pass has begun."""
        return self.step + 1

    def count_call(self, module: nn.Module) -> None:
        """Count a call of a looped module; without anchors, the first one called starts steps."""
        self._calls += 1
        if self.anchors:
            if self.step < 0 and id(module) in self._early_starters:
                self.step = 0
            return
        if self._first_called is None:
            self._first_called = module
        if module is self._first_called:
            self.step += 1

    def count_anchor(self) -> None:
        """Count a call of an anchor: a new step."""
        self.step += 1

    def moment_of(self, layer: nn.Module) -> Moment:
        """Return the moment of a call of ``layer``."""
        return self.moment(in_loop=id(layer) in self._inside)

    def moment(self, *, in_loop: bool) -> Moment:
        """Return the present moment, inside one of the loop's modules or beside them."""
        return Moment(self.step, in_loop, self._calls)

    def replay_call(self, module: nn.Module) -> Moment:
        """Count a call that was watched earlier, of any module, as the hooks would have, and return its moment."""
        if any(module is anchor for anchor in self.anchors):
            self.count_anchor()
        if any(module is looped for looped in self.modules):
            self.count_call(module)
        return self.moment_of(module)

    def bin(self, moment: Moment) -> int:
        """Return the bin of a moment of the forward pass that has ended."""
        if moment.step < 0:
            return Bins.PRELUDE
        # A layer outside the loop's list (a norm between two iterations) belongs to the step it follows as long as
        # the loop goes on after it.
        if moment.in_loop or moment.loop_calls < self._calls:
            return Bins.of_step(moment.step)
        return Bins.CODA


def may_start_early(module: nn.Module, anchors: Iterable[nn.Module]) -> bool:
    """Say whether a looped module's call before any anchor's starts a step."""
    inside = set(map(id, module.modules()))
    holds_an_anchor = any(id(anchor) in inside for anchor in anchors)
    return not holds_an_anchor and not only_embeds_or_normalises(module)


def called_loop_modules(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the modules of these names that are called, each once whatever its names."""
    modules: dict[int, nn.Module] = {}
    for name in names:
        for module in called_modules(find_module(model, name, "loop=")):
            modules[id(module)] = module
    return list(modules.values())

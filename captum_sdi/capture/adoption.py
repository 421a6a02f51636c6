"""Which module answers for parameters that no layer rule reaches: found by climbing from their layer upwards.

A parameter that is used beside the calls of a layer with a rule (Huginn's qk_bias, the projection of
`torch.nn.MultiheadAttention`, experts as one tensor) has a gradient all the same: that of the call of a module around
it. `Adoption` starts at the module that holds the parameter and goes up, one module at a time, for as long as the calls
do not tell the examples apart or do not see the parameter used:

    rule        the layer's own calls, by its type's rule; where nothing else is said
    recompute   the calls of the smallest module around the parameter's uses: see `captum_sdi.capture.rules.recompute`
    whole pass  where that module holds the loop, whose steps its call cannot tell apart: see
                `captum_sdi.capture.whole_pass`

What was found holds for later passes and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.registry import forward_of
from captum_sdi.loop.parameters import called_modules

WHOLE_PASS = ""
"""The name of the model itself, whose loss alone tells."""

Reason = Literal["uncovered", "never called", "used beside"]
"""Why the calls of a module do not do: they do not tell, they are not there, or they are not all uses."""


@dataclass(frozen=True)
class Unseen:
    """A layer whose targets' gradients a pass could not see."""

    holder: str
    """Its name in the model."""
    reason: Reason


class UnsettledError(Exception):
    """A pass met layers whose gradients it could not see; other modules answer for them from now on."""


class Adoption:
    """Remembers which module answers for each layer's parameters; see the module."""

    def __init__(self) -> None:
        self._adopters: dict[str, str] = {}
        self._reasons: dict[str, Reason] = {}
        self._rules: WeakKeyDictionary[nn.Module, tuple[object, dict[bool, Rule]]] = WeakKeyDictionary()

    def rules_of(self, module: nn.Module) -> dict[bool, Rule]:
        """Return the rules that calls of a layer were found to follow, of one example and of a batch.

        They are forgotten when its type, its forward or the names of its parameters are others than they were.
        """
        identity = (type(module), forward_of(module), *module._parameters)
        known = self._rules.get(module)
        if known is None or known[0] != identity:
            known = self._rules[module] = (identity, {})
        return known[1]

    def adopter(self, holder: str) -> str | None:
        """Return the name of the module that answers for a layer's parameters; None: the layer, by its rule."""
        return self._adopters.get(holder)

    def begin_at(self, holder: str) -> None:
        """Let a layer that no rule is for answer by being recomputed, unless something else has been found."""
        self._reasons.setdefault(holder, "uncovered")
        self._adopters.setdefault(holder, holder)

    def climb(self, model: nn.Module, unseen: Unseen) -> bool:
        """Go one module up, and say whether that was possible."""
        holder = unseen.holder
        self._reasons.setdefault(holder, unseen.reason)
        adopter = self._adopters.get(holder)
        if adopter == WHOLE_PASS:
            return False
        self._adopters[holder] = holder if adopter is None else called_parent(model, adopter)
        return True

    def vouches_for(self, holders: Iterable[str]) -> bool:
        """Say whether a module's recomputation may find no use of these layers' parameters, which then have none."""
        # Experts that no token was sent to are not called, and their neighbours are.
        return any(self._reasons.get(holder) != "never called" for holder in holders)


def called_parent(model: nn.Module, name: str) -> str:
    """Return the name of the module around another one, containers that are never called passed over."""
    parent = name.rpartition(".")[0]
    while parent and model.get_submodule(parent) not in called_modules(model.get_submodule(parent)):
        parent = parent.rpartition(".")[0]
    return parent


def holds_loop(module: nn.Module, loop: Iterable[nn.Module]) -> bool:
    """Say whether some module of the loop is inside another module, so that its one call has several steps."""
    inside = set(_inside(module))
    return any(id(looped) in inside for looped in loop)


def _inside(module: nn.Module) -> Iterator[int]:
    for submodule in module.modules():
        if submodule is not module:
            yield id(submodule)

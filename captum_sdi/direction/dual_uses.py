"""Parameters that are dual numbers in one loop step: the uses of a pass, told apart while it runs.

A pass is run once as it is, and every use of a targeted parameter noted; at its end the loop's clock says which bin
each belongs to. A pass of the same batch then meets the same uses in the same order, and those of one bin find dual
numbers ``w + ε d`` in the place of w: what arrives at the losses is their derivative along d through that bin alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from captum_sdi.capture.owners import Owner
from captum_sdi.features import LoopSpec
from captum_sdi.loop.clock import LoopClock, Moment

NO_BIN = -1
"""Of uses where no graph is built: influence is that of the graph that trained the model."""


@dataclass(frozen=True)
class Slot:
    """Where a module keeps a targeted parameter."""

    table: dict[str, Any]
    name: str
    parameter: nn.Parameter
    target: str

    def put(self, tangents: Mapping[str, Tensor] | None) -> None:
        """Let a dual number stand here, or the parameter itself."""
        if tangents is None:
            self.table[self.name] = self.parameter
        else:
            self.table[self.name] = forward_ad.make_dual(self.parameter, tangents[self.target])


@dataclass(frozen=True)
class Watched:
    """A module that answers for targets, and where these are."""

    owner: Owner
    slots: tuple[Slot, ...]

    @staticmethod
    def of(owner: Owner) -> Watched:
        """Find the targets of an owner."""
        slots = []
        for own_name, target in owner.targets.items():
            prefix, _, name = own_name.rpartition(".")
            table: dict[str, Any] = owner.module.get_submodule(prefix)._parameters
            slots.append(Slot(table, name, table[name], target))
        return Watched(owner, tuple(slots))

    @property
    def is_used_beside_calls(self) -> bool:
        """Whether the targets are used elsewhere than in the module's calls."""
        return self.owner.way == "whole pass"

    def put(self, tangents: Mapping[str, Tensor] | None) -> None:
        """Let dual numbers stand for the targets, or these themselves."""
        for slot in self.slots:
            slot.put(tangents)


class DualUses:
    """Puts dual numbers in the place of targeted parameters, in one bin of a forward pass.

    Args:
        model: The model.
        loop: What repeats.
        owners: The modules that answer for the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        loop: LoopSpec,
        owners: Sequence[Owner],
    ) -> None:
        self.clock = LoopClock(model, loop)
        self._watched = [Watched.of(owner) for owner in owners]
        self._moments: list[Moment | None] = []
        self._bins: list[int] = []
        self._tangents: Mapping[str, Tensor] = {}
        self._bin = NO_BIN
        self._n_met = 0
        self._depth = 0

    @property
    def used_bins(self) -> list[int]:
        """In which bins the noted pass used a target."""
        return sorted(set(self._bins) - {NO_BIN})

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the uses of the forward pass that runs inside."""
        self._moments, self._bins = [], []
        with self._hooked():
            yield
        for moment in self._moments:
            self._bins.append(NO_BIN if moment is None else self.clock.bin(moment))

    @contextmanager
    def dual_in(self, place: int, tangents: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the targets be dual numbers in one bin of the forward pass inside, of the batch that was noted last.

        Raises:
            ValueError: If the pass uses its parameters otherwise than the noted one.
        """
        self._tangents, self._bin = tangents, place
        try:
            with self._hooked():
                yield
        finally:
            self._bin = NO_BIN
        if self._n_met != len(self._bins):
            raise ValueError(
                f"The model used its parameters {len(self._bins)} times, then {self._n_met} times for the same batch: "
                "its forward pass depends on more than the batch."
            )

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self.clock.restart()
        self._n_met = 0
        self._depth = 0
        with ExitStack() as stack:
            for watched in self._watched:
                stack.callback(watched.put, None)
            for module in self.clock.modules:
                stack.callback(module.register_forward_pre_hook(self._enter_loop).remove)
                stack.callback(module.register_forward_hook(self._leave_loop, always_call=True).remove)
            for module in self.clock.anchors:
                # First, as a looped module may be its own anchor.
                stack.callback(module.register_forward_pre_hook(self._count_anchor, prepend=True).remove)
            for watched in self._watched:
                module = watched.owner.module
                enter = partial(self._enter, watched)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                leave = partial(self._leave, watched)
                stack.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
            self._pass_border()
            yield

    def _count_anchor(self, module: nn.Module, args: object) -> None:
        self.clock.count_anchor()
        self._pass_border()

    def _enter_loop(self, module: nn.Module, args: object) -> None:
        self.clock.count_call(module)
        self._depth += 1
        self._pass_border()

    def _leave_loop(
        self,
        module: nn.Module,
        args: object,
        output: Any,
    ) -> Any:
        self._depth -= 1
        self._pass_border()
        return without_tangents(output)

    def _enter(self, watched: Watched, module: nn.Module, args: object) -> None:
        self._meet(watched, self.clock.moment_of(module) if torch.is_grad_enabled() else None)

    def _leave(
        self,
        watched: Watched,
        module: nn.Module,
        args: object,
        output: Any,
    ) -> Any:
        watched.put(None)
        if watched.is_used_beside_calls:
            self._meet(watched, self._moment())
        return without_tangents(output)

    def _pass_border(self) -> None:
        """Begin a new moment of what is used beside the calls of its module."""
        for watched in self._watched:
            if watched.is_used_beside_calls:
                self._meet(watched, self._moment())

    def _moment(self) -> Moment:
        return self.clock.moment(in_loop=self._depth > 0)

    def _meet(self, watched: Watched, moment: Moment | None) -> None:
        """Note a use and its moment, None where no graph is built; or let it be of dual numbers, if of their bin."""
        number = self._n_met
        self._n_met += 1
        if self._bin == NO_BIN:
            self._moments.append(moment)
            return
        is_chosen = number < len(self._bins) and self._bins[number] == self._bin
        watched.put(self._tangents if is_chosen else None)


def without_tangents(output: Any) -> Any:
    """Return an output as a constant where no graph is built; else None, which leaves it as it is."""
    if torch.is_grad_enabled():
        return None

    def primal(leaf: Any) -> Any:
        return forward_ad.unpack_dual(leaf).primal if isinstance(leaf, Tensor) else leaf

    return tree_map(primal, output)

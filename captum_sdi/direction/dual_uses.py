"""Uses of parameters, each moved along a direction in the bin that it belongs to, while a forward pass runs.

With a scale ε_b for each bin, a use of a parameter w in bin b is one of ``w + ε_b d``; what a forward pass says of the
scales' slopes at zero is the derivative along d, bin by bin. Which bin a use belongs to, the loop's clock tells at the
end of a pass: each pass takes it from the one before, and notes it anew.
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

LINEAR_IN_PARAMETERS = (
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.sparse.Embedding",
    "transformers.pytorch_utils.Conv1D",
)
"""Layers whose output is linear in weight and bias: called with d in their place, they say what d adds to it."""


@dataclass(frozen=True)
class Slot:
    """Where a module keeps a targeted parameter."""

    table: dict[str, Any]
    name: str
    parameter: nn.Parameter
    target: str


@dataclass(frozen=True)
class Watched:
    """A module that answers for targets, and where these are."""

    owner: Owner
    slots: tuple[Slot, ...]
    is_linear: bool
    """Whether the output of the module's calls is linear in the targets, all parameters that it reads."""

    @staticmethod
    def of(owner: Owner) -> Watched:
        """Find the targets of an owner."""
        slots = []
        for own_name, target in owner.targets.items():
            prefix, _, name = own_name.rpartition(".")
            table: dict[str, Any] = owner.module.get_submodule(prefix)._parameters
            slots.append(Slot(table, name, table[name], target))
        return Watched(owner, tuple(slots), is_linear_in_targets(owner))

    @property
    def is_used_beside_calls(self) -> bool:
        """Whether the targets are used elsewhere than in the module's calls."""
        return self.owner.way == "whole pass"

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Let tensors stand where the targets are."""
        for slot in self.slots:
            slot.table[slot.name] = tensors[slot.target]

    def restore(self) -> None:
        """Let the targets stand where they are."""
        for slot in self.slots:
            slot.table[slot.name] = slot.parameter

    def move(self, rate: Tensor | None, tangents: Mapping[str, Tensor]) -> None:
        """Let the targets stand where they are, or move along tangents at a rate."""
        self.restore()
        if rate is not None:
            self.put({slot.target: moved(slot.parameter, rate, tangents[slot.target]) for slot in self.slots})

    def added(
        self,
        tangents: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return what tangents add to the output of a call, where that is linear."""
        primal_args = map(primal, args)
        primal_kwargs = {name: primal(argument) for name, argument in kwargs.items()}
        self.put(tangents)
        try:
            output: Tensor = self.owner.module.forward(*primal_args, **primal_kwargs)
        finally:
            self.restore()
        return output


def is_linear_in_targets(owner: Owner) -> bool:
    """Say whether the output of a module's calls is linear in its targets, all parameters that it reads."""
    module = owner.module
    kind = type(module)
    is_known = f"{kind.__module__}.{kind.__qualname__}" in LINEAR_IN_PARAMETERS
    is_changed = "forward" in vars(module) or getattr(module, "max_norm", None) is not None
    own_names = {name for name, _ in module.named_parameters()}
    reads_targets = owner.targets.keys() == own_names and own_names <= {"weight", "bias"}
    return is_known and not is_changed and reads_targets and owner.way != "whole pass"


class DualUses:
    """Moves targeted parameters along a direction in the forward passes of batches, bin by bin.

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
        self.bins: list[int] = []
        """Of each use in the last pass, in order."""
        self._watched = [Watched.of(owner) for owner in owners]
        self._moments: list[Moment | None] = []
        self._tangents: Mapping[str, Tensor] = {}
        self._rates: dict[int, Tensor | None] = {}
        self._depth = 0

    @property
    def places(self) -> list[int]:
        """The bins in which the last pass used a target."""
        return sorted(set(self.bins) - {NO_BIN})

    @contextmanager
    def along(self, tangents: Mapping[str, Tensor], scales: Mapping[int, Tensor]) -> Iterator[None]:
        """Move the targets by the scale of each bin, where the last pass had a use of it, and note the uses anew."""
        self._tangents = tangents
        self._rates = {place: forward_ad.unpack_dual(scale).tangent for place, scale in scales.items()}
        self._moments = []
        self._depth = 0
        self.clock.restart()
        with self._hooked():
            yield
        self.bins = [NO_BIN if moment is None else self.clock.bin(moment) for moment in self._moments]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.clock.modules:
                stack.callback(module.register_forward_pre_hook(self._enter_loop).remove)
                stack.callback(module.register_forward_hook(self._leave_loop, always_call=True).remove)
            for module in self.clock.anchors:
                # First, as a looped module may be its own anchor.
                stack.callback(module.register_forward_pre_hook(self._count_anchor, prepend=True).remove)
            for watched in self._watched:
                stack.callback(watched.restore)
                module = watched.owner.module
                if watched.is_linear:
                    add = partial(self._add, watched)
                    stack.callback(module.register_forward_hook(add, prepend=True, with_kwargs=True).remove)
                    continue
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

    def _add(
        self,
        watched: Watched,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        rate = self._rate(self._moment_of(module))
        if rate is None:
            return without_tangents(output)
        return moved(output, rate, watched.added(self._tangents, args, kwargs))

    def _enter(self, watched: Watched, module: nn.Module, args: object) -> None:
        watched.move(self._rate(self._moment_of(module)), self._tangents)

    def _leave(
        self,
        watched: Watched,
        module: nn.Module,
        args: object,
        output: Any,
    ) -> Any:
        watched.restore()
        if watched.is_used_beside_calls:
            self._move_until_border(watched)
        return without_tangents(output)

    def _pass_border(self) -> None:
        """Begin a new moment of what is used beside the calls of its module."""
        for watched in self._watched:
            if watched.is_used_beside_calls:
                self._move_until_border(watched)

    def _move_until_border(self, watched: Watched) -> None:
        moment = self.clock.moment(in_loop=self._depth > 0)
        watched.move(self._rate(moment), self._tangents)

    def _moment_of(self, module: nn.Module) -> Moment | None:
        """Return the moment of a call; None where no graph is built."""
        return self.clock.moment_of(module) if torch.is_grad_enabled() else None

    def _rate(self, moment: Moment | None) -> Tensor | None:
        """Note a use, and return how fast the scale of its bin in the last pass moves."""
        number = len(self._moments)
        self._moments.append(moment)
        place = self.bins[number] if number < len(self.bins) else NO_BIN
        return self._rates.get(place)


def moved(point: Tensor, rate: Tensor, tangent: Tensor) -> Tensor:
    """Return ``point + scale * tangent`` where the scale is zero and moves at a rate."""
    value, slope = forward_ad.unpack_dual(point)
    rate = rate.to(tangent)
    return forward_ad.make_dual(value, rate * tangent if slope is None else torch.addcmul(slope, rate, tangent))


def primal(leaf: Any) -> Any:
    """Return a tensor without its tangent, anything else as it is."""
    return forward_ad.unpack_dual(leaf).primal if isinstance(leaf, Tensor) else leaf


def without_tangents(output: Any) -> Any:
    """Return an output as a constant where no graph is built; else None, which leaves it as it is."""
    return None if torch.is_grad_enabled() else tree_map(primal, output)

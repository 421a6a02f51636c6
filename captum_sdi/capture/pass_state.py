"""What the hooks of a pass under way share: which pass it is, where it is, and what it has seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from captum_sdi.capture import refusals
from captum_sdi.capture.adoption import Unseen
from captum_sdi.capture.heap import HeapTrimmer
from captum_sdi.capture.owners import Owner
from captum_sdi.capture.tokens import TokenAxes, Unit
from captum_sdi.features import Gradient
from captum_sdi.loop.clock import LoopClock

Consumer = Callable[[str, slice, int, Gradient], None]
"""Called in the backward pass with (parameter name, rows, bin, gradients): a row is an example, or a token."""


class RunningRule(threading.local):
    """Whether a rule runs now, in this thread: autograd has one for each device."""

    active = False


class PassState:
    """The state of one pass at a time.

    Args:
        clock: Counts its loop steps.
        device: Of the targets.
        trims_heap: Whether free memory goes back to the system at every step.
    """

    def __init__(
        self,
        clock: LoopClock,
        device: torch.device,
        *,
        trims_heap: bool,
    ) -> None:
        self.clock = clock
        self.dummy = torch.zeros((), device=device, requires_grad=True)
        self.running_rule = RunningRule()
        self.thread = threading.get_ident()
        self._heap = HeapTrimmer() if trims_heap else None
        self.restart()

    def restart(self) -> None:
        """Go back to the state before a forward pass."""
        self.phase: Literal["forward", "backward"] | None = None
        self.batch_size = 0
        self.unit: Unit = "example"
        self.consume: Consumer | None = None
        self.backward_task = -1
        self.is_muted = False
        self.token_axes = TokenAxes()
        self.called: set[str] = set()
        """Targets whose owners were called."""
        self.called_without_grad: set[str] = set()
        """Targets whose owners were called where no graph is built."""
        self.expanded: set[str] = set()
        """Names of the layers that the model called once for the whole batch, or for one example of it."""
        self.losses = torch.empty(0)
        """Of the forward pass ``(n,)``, once it is over."""
        self.has_gradient = False
        """Whether a gradient leads back from them."""
        self.unseen: list[Unseen] = []
        """The layers whose calls did not tell."""
        self.mixing: dict[str, None] = {}
        """Descriptions, in order, of the owners that mix the examples of the batch."""
        self.clock.restart()
        if self._heap is not None:
            self._heap.restart()

    @property
    def is_listening(self) -> bool:
        """Whether a pass is under way, and it is not a rule that calls the layer."""
        return self.phase is not None and not self.running_rule.active

    def note_backward(self, _: object) -> None:
        """Remember this backward pass's autograd task id, so that a nested pass can be refused."""
        self.backward_task = torch._C._current_graph_task_id()

    def consumer(self, owner: Owner) -> Consumer:
        """Return the consumer of the backward pass under way.

        Raises:
            ValueError: If it is another one, within it.
        """
        if self.consume is None or torch._C._current_graph_task_id() != self.backward_task:
            raise ValueError(refusals.nested_backward(str(owner)))
        return self.consume

    def note_unseen(self, holders: Iterable[str]) -> None:
        """Note layers whose calls do not tell their examples' gradients."""
        self.unseen += [Unseen(holder, "uncovered") for holder in holders]

    def trim_heap(self, place: int) -> None:
        """Give free memory back where a step of the pass begins."""
        if self._heap is not None:
            self._heap.trim_at((self.phase, place))

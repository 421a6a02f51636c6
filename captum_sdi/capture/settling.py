"""Passes repeated until some module answers for every target: see `captum_sdi.capture.adoption`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from captum_sdi.borrow import RandomState
from captum_sdi.capture import refusals
from captum_sdi.capture.adoption import UnsettledError
from captum_sdi.capture.stray_uses import only_stray_uses, stray_targets
from captum_sdi.capture.tape import Tape

Answer = TypeVar("Answer")


def settled(attempt: Callable[[], Answer]) -> Answer:
    """Return what an attempt at a pass returns, once it meets no layer whose calls do not tell.

    Args:
        attempt: Repeated from the same random state for as long as it meets some.
    """
    state = RandomState.now()
    while True:
        try:
            return attempt()
        except UnsettledError:
            state.restore()


def seen_forward(
    tape: Tape,
    run: Callable[[], tuple[Any, Tensor]],
    batch_size: int,
) -> tuple[Any, Tensor]:
    """Attempt a forward pass that sees every target used.

    Args:
        tape: Installed.
        run: Returns an output and losses.
        batch_size: How many examples it runs.

    Returns:
        What ``run`` does.

    Raises:
        ValueError: If a layer of targets is not called, or only where no graph is built.
    """
    output, losses = tape.forward(run, batch_size)
    silent = tape.silent(losses)
    without_grad = [name for name in silent if name in tape.state.called_without_grad]
    if without_grad:
        raise ValueError(refusals.only_without_grad(without_grad, tape.layers_without(without_grad)))
    if silent:
        tape.adopt_targets(silent, "never called")
    tape.state.losses, tape.state.has_gradient = losses.detach(), losses.requires_grad
    return output, losses


@contextmanager
def uses_in_sight(tape: Tape, *, checked: bool) -> Iterator[Callable[[Tensor], None]]:
    """Let other modules answer for the targets that are used outside their layer's calls.

    Args:
        tape: Installed.
        checked: False does nothing.

    Yields:
        A check of the losses of a forward pass inside, which gives the pass up where some use is out of sight. A
        backward pass belongs inside, too, where activations may be recomputed.
    """
    if not checked:
        yield lambda losses: None
        return
    with only_stray_uses(tape.owners, tape.targets) as aliases:

        def check(losses: Tensor) -> None:
            stray = stray_targets(losses, tape.targets, aliases)
            if stray:
                tape.adopt_targets(stray, "used beside")

        yield check

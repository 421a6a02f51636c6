"""Parameters used outside their layer's call, e.g. ``F.linear(x, layer.weight)``: no hook sees these uses.

Within the calls of their layers the parameters are constants, so that those the loss still depends on are used
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from captum_sdi.borrow import detached_in_calls, requiring_grad
from captum_sdi.capture.owners import Owner


@contextmanager
def only_stray_uses(owners: Sequence[Owner], targets: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let forward passes depend on the targets' stray uses alone. Do not call backward inside."""
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(detached_in_calls(owner.module, list(owner.targets)))
        stack.enter_context(requiring_grad(targets))
        yield


def reached_parameters(losses: Tensor, targets: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of the targets among the leaves of the losses' graph."""
    leaves: set[int] = set()
    seen = set()
    pending = [losses.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        for parent, _ in node.next_functions:
            pending.append(parent)
    return [name for name, parameter in targets.items() if id(parameter) in leaves]

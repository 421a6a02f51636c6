"""Parameters used outside the calls that are watched, e.g. ``F.linear(x, layer.weight)``: no hook sees these uses.

Within the calls of their layers the parameters are constants, so that those the loss still depends on are used
elsewhere. Within a call that will be run again they are aliases: those that the loss depends on by a way that does not
lead through the call's outputs (a loss that a module keeps as an attribute) are used where no gradient arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from captum_sdi.borrow import replaced_in_calls, requiring_grad
from captum_sdi.capture.owners import Owner

Aliases = Sequence[tuple[Owner, Mapping[str, nn.Parameter]]]
"""What stands for the parameters of recomputed owners while these are called, by their own names."""


@contextmanager
def only_stray_uses(owners: Sequence[Owner], targets: Mapping[str, nn.Parameter]) -> Iterator[Aliases]:
    """Let forward passes depend on the targets' stray uses alone.

    Do not call ``.backward()`` inside: it would write to their ``.grad``.

    Yields:
        What stands for the parameters of recomputed owners.
    """
    aliases = []
    with ExitStack() as stack:
        for owner in owners:
            if owner.way == "rule":
                stack.enter_context(replaced_in_calls(owner.module, list(owner.targets), requires_grad=False))
            if owner.way == "recompute":
                replaced = replaced_in_calls(owner.module, list(owner.targets), requires_grad=True)
                aliases.append((owner, stack.enter_context(replaced)))
        stack.enter_context(requiring_grad(targets))
        yield aliases


def stray_targets(
    losses: Tensor,
    targets: Mapping[str, nn.Parameter],
    aliases: Aliases,
) -> list[str]:
    """Return the names of the targets whose stray uses the losses depend on."""
    leaves = leaves_of(losses)
    stray = {name for name, parameter in targets.items() if id(parameter) in leaves}
    for owner, own_aliases in aliases:
        ids = set(map(id, own_aliases.values()))
        if ids & leaves and ids & leaves_of(losses, beside=owner):
            stray.update(owner.targets.values())
    return [name for name in targets if name in stray]


def leaves_of(losses: Tensor, beside: Owner | None = None) -> set[int]:
    """Return the ids of the leaves of the losses' graph, but for those behind the outputs of one owner."""
    leaves: set[int] = set()
    seen = set()
    pending = [losses.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        if beside is not None and getattr(node, "owner", None) is beside:
            continue
        for parent, _ in node.next_functions:
            pending.append(parent)
    return leaves

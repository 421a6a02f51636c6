"""Which layers own the targeted parameters, and whether a rule may cover each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from captum_sdi.capture import refusals
from captum_sdi.capture.rules.choose import why_uncovered
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.loop.clock import called_loop_modules


@dataclass(frozen=True)
class Owner:
    """A layer that owns targeted parameters itself, not through a child."""

    name: str
    module: nn.Module
    targets: dict[str, str]
    """The layer's own names of these parameters, to their names among the targets."""
    device: torch.device
    """Where its targets are."""

    def __str__(self) -> str:
        return refusals.describe_layer(self.name, self.module, self.targets.values())


def check_targets(model: nn.Module, names: Sequence[str], loop: LoopSpec) -> None:
    """Check, before any forward pass, that these parameters' gradients can be captured.

    Raises:
        ValueError: If the loop names a module the model does not have, or a parameter is owned by a module that no
            rule covers, or has a gradient hook.
    """
    called_loop_modules(model, loop.modules)
    called_loop_modules(model, loop.anchors)
    targets = {name: model.get_parameter(name) for name in names}
    find_owners(model, targets)


def find_owners(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> list[Owner]:
    """Return every module that owns targets.

    A parameter may have several owners (tied embedding and head, blocks that share tensors): their uses add up.

    Raises:
        ValueError: If no rule covers any of the owners of a target.
    """
    covered: list[Owner] = []
    uncovered: list[tuple[Owner, str]] = []
    for owner in _all_owners(model, targets):
        reason = why_uncovered(owner.module)
        hooked = any(targets[name]._backward_hooks for name in owner.targets.values())
        if reason is None and hooked:
            reason = refusals.changed_by_hook()
        if reason is None:
            covered.append(owner)
        else:
            uncovered.append((owner, reason))
    covered_names = _target_names(covered)
    refused = []
    for owner, reason in uncovered:
        # A head that only holds the bias of a layer inside it does not use it; if it does, `stray_uses` tells.
        if not covered_names.issuperset(owner.targets.values()):
            refused.append((str(owner), reason))
    if refused:
        uncovered_names = _target_names([owner for owner, _ in uncovered])
        remedy = refusals.suggest_layers(model, targets, uncovered_names - covered_names)
        raise ValueError(refusals.uncovered_layers(refused, remedy))
    return covered


def _all_owners(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> Iterator[Owner]:
    target_names = {id(parameter): name for name, parameter in targets.items()}
    for name, module in model.named_modules():
        owned = {}
        for local_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in target_names:
                owned[local_name] = target_names[id(parameter)]
        if owned:
            first_target = next(iter(owned.values()))
            yield Owner(canonical_name(name), module, owned, targets[first_target].device)


def _target_names(owners: Sequence[Owner]) -> set[str]:
    names: set[str] = set()
    for owner in owners:
        names.update(owner.targets.values())
    return names

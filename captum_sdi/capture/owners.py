"""Which modules answer for the targeted parameters, and what cannot be answered for at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from captum_sdi.capture import refusals
from captum_sdi.capture.adoption import WHOLE_PASS, Adoption, holds_loop
from captum_sdi.capture.rules.choose import why_uncovered
from captum_sdi.capture.rules.embedding import looks_at_batch
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.loop.clock import called_loop_modules

Way = Literal["rule", "recompute", "whole pass"]
"""How an owner's gradients are formed; see `captum_sdi.capture.adoption`."""


@dataclass(frozen=True)
class Owner:
    """A module that answers for targeted parameters: its own or, where it is recomputed, those inside it."""

    name: str
    module: nn.Module
    targets: dict[str, str]
    """The module's own names of these parameters, to their names among the targets."""
    device: torch.device
    """Where its targets are."""
    holders: tuple[str, ...]
    """The names, in the model, of the layers that hold the parameters."""
    way: Way = "rule"

    def __str__(self) -> str:
        return refusals.describe_layer(self.name, self.module, self.targets.values())


def check_targets(model: nn.Module, names: Sequence[str], loop: LoopSpec) -> None:
    """Check, before any forward pass, that these parameters' gradients can be captured.

    Raises:
        ValueError: If the loop names a module the model does not have, or a parameter's gradient is changed by a hook
            or depends on the whole batch.
    """
    called_loop_modules(model, loop.modules)
    called_loop_modules(model, loop.anchors)
    targets = {name: model.get_parameter(name) for name in names}
    find_owners(model, targets, (), Adoption())


def find_owners(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    loop: Collection[nn.Module],
    adoption: Adoption,
) -> list[Owner]:
    """Return every module that answers for targets.

    A parameter may have several owners (tied embedding and head, blocks that share tensors): their uses add up.

    Args:
        model: The model.
        targets: The targeted parameters by name.
        loop: The modules whose calls make the steps.
        adoption: Which module answers for a layer's parameters.

    Raises:
        ValueError: If a target's gradient is changed by a hook or depends on the whole batch.
    """
    layers = list(_layers(model, targets))
    _check(model, targets, layers)
    covered: set[str] = set()
    for layer in layers:
        if why_uncovered(layer.module) is None:
            covered.update(layer.targets.values())
    adopted: dict[str, list[Owner]] = {}
    owners = []
    for layer in layers:
        (holder,) = layer.holders
        # A head that only holds the bias of a layer inside it does not use it; if it does, `stray_uses` tells.
        if why_uncovered(layer.module) is not None and not covered.issuperset(layer.targets.values()):
            adoption.begin_at(holder)
        adopter = adoption.adopter(holder)
        if adopter is not None:
            adopted.setdefault(adopter, []).append(layer)
        elif why_uncovered(layer.module) is None:
            owners.append(layer)
    for adopter, adopted_layers in adopted.items():
        owners.extend(_adopters(model, adopter, adopted_layers, loop))
    return owners


def holders_of(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    names: Collection[str],
) -> list[str]:
    """Return the names of all layers that hold targets of these names."""
    holders: list[str] = []
    for layer in _layers(model, targets):
        if set(names).intersection(layer.targets.values()):
            holders.extend(layer.holders)
    return holders


def silent_targets(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    called: Collection[str],
) -> list[str]:
    """Return the targets of layers none of whose targets were called."""
    # A bias beside a weight that is used has a gradient: zero, where the model does not use it.
    silent = set(targets).difference(called)
    if silent:
        for layer in _layers(model, targets):
            if not silent.issuperset(layer.targets.values()):
                silent.difference_update(layer.targets.values())
    return [name for name in targets if name in silent]


def _adopters(
    model: nn.Module,
    name: str,
    layers: Sequence[Owner],
    loop: Iterable[nn.Module],
) -> Iterator[Owner]:
    """Yield the module of that name, in the place of the layers inside it; or these, where the whole pass tells."""
    module = model.get_submodule(name)
    if name == WHOLE_PASS or holds_loop(module, loop):
        for layer in layers:
            yield Owner(
                layer.name,
                layer.module,
                layer.targets,
                layer.device,
                layer.holders,
                "whole pass",
            )
        return
    targets = {}
    holders: list[str] = []
    for layer in layers:
        (holder,) = layer.holders
        prefix = holder[len(name) :].removeprefix(".")
        for own_name, target in layer.targets.items():
            targets[f"{prefix}.{own_name}" if prefix else own_name] = target
        holders.append(holder)
    yield Owner(
        canonical_name(name),
        module,
        targets,
        layers[0].device,
        tuple(holders),
        "recompute",
    )


def _check(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    layers: Sequence[Owner],
) -> None:
    """Refuse, in one sentence, all layers whose per-example gradients do not exist."""
    refused = []
    names: set[str] = set()
    for layer in layers:
        reasons = []
        if looks_at_batch(layer.module):
            reasons.append(refusals.depends_on_batch())
        if any(targets[name]._backward_hooks for name in layer.targets.values()):
            reasons.append(refusals.changed_by_hook())
        if reasons:
            refused.append((str(layer), reasons[0]))
            names.update(layer.targets.values())
    if refused:
        raise ValueError(refusals.uncovered_layers(refused, refusals.suggest_layers(model, targets, names)))


def _layers(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> Iterator[Owner]:
    """Yield every module that holds targets itself."""
    target_names = {id(parameter): name for name, parameter in targets.items()}
    for name, module in model.named_modules():
        owned = {}
        for local_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in target_names:
                owned[local_name] = target_names[id(parameter)]
        if owned:
            first_target = next(iter(owned.values()))
            yield Owner(
                canonical_name(name),
                module,
                owned,
                targets[first_target].device,
                (name,),
            )

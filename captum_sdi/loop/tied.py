"""Modules of their own that share their parameters: one block under several names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from captum_sdi.features import canonical_name
from captum_sdi.loop.kinds import is_embedding_or_norm
from captum_sdi.model_facts import has_children


def tied_blocks(model: nn.Module) -> dict[str, str]:
    """Map each block to the first one of its type that it shares parameters with, by name.

    Embeddings and norms that are shared make no block of what holds them: an encoder and a decoder may have one
    embedding.

    Returns:
        The first block's name under that of every later one.
    """
    modules = dict(model.named_modules())
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if is_embedding_or_norm(module):
            continue
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    earlier: dict[str, str] = {}
    for first_owner, *later_owners in owners.values():
        for later_owner in later_owners:
            pair = called_blocks(modules, first_owner, later_owner)
            if pair is not None:
                block, twin = pair
                earlier.setdefault(canonical_name(twin), canonical_name(block))
    return earlier


def called_blocks(
    modules: Mapping[str, nn.Module],
    first_owner: str,
    later_owner: str,
) -> tuple[str, str] | None:
    """Return the blocks of one type in which two owners of a parameter stand; None if there are none."""
    pair = diverging_modules(first_owner, later_owner)
    if pair is None:
        return None
    block, twin = pair
    while isinstance(modules[twin], nn.ModuleList | nn.ModuleDict) and twin != later_owner:
        # A container is not called: its entries are the blocks.
        entry = later_owner.removeprefix(f"{twin}.").split(".")[0]
        block, twin = f"{block}.{entry}", f"{twin}.{entry}"
    if type(modules[block]) is not type(modules[twin]):
        return None
    # A lone layer is a block in a list; elsewhere it may be one of two projections that share their weight.
    entries_of_lists = is_entry(block) and is_entry(twin)
    return (block, twin) if has_children(modules[twin]) or entries_of_lists else None


def is_entry(name: str) -> bool:
    """Say whether a module's name is a number, as in a list."""
    *_, last_name = name.split(".")
    return last_name.isdigit()


def diverging_modules(first: str, second: str) -> tuple[str, str] | None:
    """Return the modules from which two paths go on alike; None if one is inside the other.

    Example:
        >>> diverging_modules("layers.1.mlp.up", "layers.4.mlp.up")
        ('layers.1', 'layers.4')
        >>> diverging_modules("laps.0.1.up", "laps.2.0.up")
        ('laps.0.1', 'laps.2.0')
    """
    first_path = first.split(".")
    second_path = second.split(".")
    while first_path and second_path and first_path[-1] == second_path[-1]:
        first_path.pop()
        second_path.pop()
    first_module = ".".join(first_path)
    second_module = ".".join(second_path)
    longer, shorter = sorted((f"{first_module}.", f"{second_module}."), key=len, reverse=True)
    if not first_path or not second_path or longer.startswith(shorter):
        return None
    return first_module, second_module

"""`find_loop`: a preset where the model's family is known, else whatever repeats in a forward pass.

The outermost modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's
shared transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from captum_sdi.data.batch import ForwardKwargs, select
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.inputs import first_batch
from captum_sdi.loop.parameters import canonical_modules
from captum_sdi.loop.presets import WHOLE_MODEL, find_preset
from captum_sdi.loop.table import FoundLoop, tabulate_loop
from captum_sdi.loop.watch import Call, watch_calls
from captum_sdi.words import first_few


def find_loop(
    model: nn.Module,
    batch: Any,
    *,
    forward_kwargs: ForwardKwargs | None = None,
) -> FoundLoop:
    """Find the modules that repeat, by `PRESETS` or by watching a pass of the first example.

    Args:
        model: Run once, and given back as it was.
        batch: A batch it takes, or rows, a Dataset or a DataLoader; see `captum_sdi.data`.
        forward_kwargs: Further keywords for its forward, or a function of the batch.

    Returns:
        The outermost modules with parameters that run more than once, and whose call starts a step; prints as a table
        of what was seen. When nothing repeats, the whole model as one step, with a warning: influence is then
        TracIn.

    Example:
        >>> import torch
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> config = LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8, n_coda=2, n_loops=3)
        >>> print(find_loop(LoopedGPTForCausalLM(config), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}))
        LoopSpec(modules=('core',), anchors=('core',)): 3 steps
        module             calls  step (from 0)
        wte                    1  prelude
        wpe                    1  prelude
        prelude.0 to .1        1  prelude
        core                   3  0-2
        coda.0 to .1           1  coda
        ln_f                   1  coda
        lm_head                1  coda
    """
    first_example = select(first_batch(model, batch, 1), [0])
    calls = watch_calls(model, first_example, forward_kwargs)
    loop = find_preset(model, calls) or repeated_modules(model, calls)
    if loop is None:
        warnings.warn(_nothing_repeats(model, calls), stacklevel=2)
        return FoundLoop(WHOLE_MODEL.modules, WHOLE_MODEL.anchors)
    return tabulate_loop(model, loop, calls)


def repeated_modules(model: nn.Module, calls: Sequence[Call]) -> LoopSpec | None:
    """Return the loop of the outermost modules that run more than once; None if none does."""
    loop = repeated_calls(model, calls)
    if not loop:
        return None
    anchors = step_starters(loop)
    return LoopSpec(modules=module_names(loop), anchors=anchors)


# --- modules that share parameters ---


def tied_blocks(model: nn.Module) -> dict[str, str]:
    """Map each block to the first one of its type that it shares parameters with, by name."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    modules = dict(model.named_modules())
    earlier: dict[str, str] = {}
    for first_owner, *later_owners in owners.values():
        for later_owner in later_owners:
            pair = diverging_modules(first_owner, later_owner)
            if pair is None:
                continue
            block, twin = pair
            same_type = type(modules[block]) is type(modules[twin])
            # An embedding and a head that share their weight hold no modules: they are no blocks.
            has_children = next(modules[block].children(), None) is not None
            if same_type and has_children:
                earlier.setdefault(canonical_name(twin), canonical_name(block))
    return earlier


def diverging_modules(first: str, second: str) -> tuple[str, str] | None:
    """Return the modules at which two paths part; None if they differ in more than one name.

    Example:
        >>> diverging_modules("layers.1.mlp.up", "layers.4.mlp.up")
        ('layers.1', 'layers.4')
    """
    first_path = first.split(".")
    second_path = second.split(".")
    if len(first_path) != len(second_path):
        return None
    differing = [depth for depth, name in enumerate(first_path) if name != second_path[depth]]
    if len(differing) != 1:
        return None
    end = differing[0] + 1
    first_module = ".".join(first_path[:end])
    second_module = ".".join(second_path[:end])
    return first_module, second_module


# --- the loop's calls ---


class LoopCall(NamedTuple):
    """One call in the loop."""

    name: str
    """The module that was called."""
    block: str
    """The first module with the same parameters: itself, or the block that it is tied to."""


def repeated_calls(model: nn.Module, calls: Sequence[Call]) -> list[LoopCall]:
    """Return the loop's calls: of the outermost modules that repeat while the biggest does.

    A norm that is used once before and once after the loop is called twice, too, but not while the loop runs. Blocks of
    the biggest one's type that repeat before or after it (Albert's second group) are the loop as well.
    """
    tied = tied_blocks(model)

    def block_of(name: str) -> str:
        return tied.get(name, name)

    counts = Counter(block_of(call.name) for call in calls)
    called_once = {call.name for call in calls if counts[block_of(call.name)] == 1}
    inner_calls: Counter[str] = Counter()  # by block: a norm makes none
    outermost = []
    for call in calls:
        inner_calls.update(map(block_of, call.path))
        if call.name not in called_once and called_once.issuperset(call.path):
            loop_call = LoopCall(call.name, block_of(call.name))
            outermost.append(loop_call)
    if not outermost:
        return []
    blocks = [call.block for call in outermost]

    def size_of(block: str) -> tuple[int, int]:
        return inner_calls[block], counts[block]

    biggest = max(blocks, key=size_of)
    positions = [position for position, block in enumerate(blocks) if block == biggest]
    start, end = positions[0], positions[-1] + 1
    while_it_repeats = blocks[start:end]
    types = {name: type(module) for name, module in canonical_modules(model)}
    of_its_type = [block for block in blocks if types[block] is types[biggest]]
    in_loop = {*while_it_repeats, *of_its_type}
    return [call for call in outermost if call.block in in_loop]


def step_starters(loop: Sequence[LoopCall]) -> tuple[str, ...]:
    """Return the names of the modules whose calls start a step.

    ``a b a b``: only ``a`` does, 2 steps of two layers. ``l l h l l h``: every call does, 6 steps of two modules on one
    timeline.
    """
    blocks = [call.block for call in loop]
    first = blocks[0]
    laps: list[list[str]] = []  # from a call of the first block to its next one
    for block in blocks:
        if block == first:
            laps.append([])
        laps[-1].append(block)
    blocks_take_turns = all(1 < len(lap) == len(set(lap)) for lap in laps)
    if blocks_take_turns or set(blocks) == {first}:
        loop = [call for call in loop if call.block == first]
    return module_names(loop)


def module_names(loop: Sequence[LoopCall]) -> tuple[str, ...]:
    """Return the names of the modules called, each once, in the order of their first calls."""
    names = [call.name for call in loop]
    return tuple(dict.fromkeys(names))


def _nothing_repeats(model: nn.Module, calls: Sequence[Call]) -> str:
    """Write what was seen, and what to pass."""
    called = {call.name for call in calls}
    silent = []
    for name, module in canonical_modules(model):
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if name and name not in called and has_parameters:
            silent.append(name)
    model_name = type(model).__name__
    seen = f"{len(called)} modules with parameters ran once each"
    if silent:
        seen += f", {first_few(silent, at_most=1)} not at all"
    return (
        f"Nothing repeats in {model_name}: it is taken as one loop step, and influence as TracIn. Name the "
        f"repeated module in loop= if there is one ({seen}; a call of a module's .forward cannot be seen)."
    )

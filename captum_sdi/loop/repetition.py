"""From the calls of a forward pass to the loop in them: what repeats, and whose calls start a step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn

from captum_sdi.features import LoopSpec
from captum_sdi.loop.kinds import only_embeds_or_normalises
from captum_sdi.loop.parameters import canonical_modules
from captum_sdi.loop.tied import tied_blocks
from captum_sdi.loop.watch import Call
from captum_sdi.model_facts import has_children


class LoopCall(NamedTuple):
    """One call of a module that repeats."""

    name: str
    """The module that was called."""
    block: str
    """The first module with the same parameters: itself, or the block that it is tied to."""
    carries_state: int
    """How surely its output is the state of a loop; see `state_carried`."""
    size: tuple[int, int]
    """How many calls its block makes inside it, and how often it is called itself."""


def repeated_modules(model: nn.Module, calls: Sequence[Call]) -> LoopSpec | None:
    """Return the loop of the outermost modules that run more than once; None if none does."""
    loop = repeated_calls(model, calls)
    if not loop:
        return None
    loop, starters = step_starters(model, loop)
    return LoopSpec(modules=module_names(loop), anchors=module_names(starters))


def repeated_calls(model: nn.Module, calls: Sequence[Call]) -> list[LoopCall]:
    """Return the loop's calls: of the outermost modules that repeat while the biggest does.

    A norm that is used once before and once after the loop is called twice, too, but not while the loop runs. Blocks of
    the biggest one's type that repeat before or after it (Albert's second group) are the loop as well. Embeddings and
    norms alone are none, nor is a head that reads out at several depths.
    """
    outermost = outermost_repeated(model, calls)
    modules = dict(canonical_modules(model))
    cores = []
    for call in outermost:
        is_light = only_embeds_or_normalises(modules[call.block])
        if call.carries_state >= 0 and not is_light:
            cores.append(call)
    if not cores:
        return []
    core = max(cores, key=lambda call: (call.carries_state, call.size))
    biggest = core.block
    blocks = [call.block for call in outermost]
    positions = [position for position, block in enumerate(blocks) if block == biggest]
    start, end = positions[0], positions[-1] + 1
    while_it_repeats = blocks[start:end]
    core_type = type(modules[biggest])
    of_its_type = [block for block in blocks if type(modules[block]) is core_type]
    in_loop = {*while_it_repeats, *of_its_type}
    return [call for call in outermost if call.block in in_loop]


def outermost_repeated(model: nn.Module, calls: Sequence[Call]) -> list[LoopCall]:
    """Return the calls of modules that run more than once, but for those inside another one that does."""
    tied = tied_blocks(model)

    def block_of(name: str) -> str:
        return tied.get(name, name)

    counts = Counter(block_of(call.name) for call in calls)
    called_once = {call.name for call in calls if counts[block_of(call.name)] == 1}
    inner_calls: Counter[str] = Counter()  # by block: a norm makes none
    for call in calls:
        inner_calls.update(map(block_of, call.path))
    given = frozenset().union(*[call.given for call in calls])
    outermost = []
    for call in calls:
        is_outermost = called_once.issuperset(call.path)
        if call.name in called_once or not is_outermost:
            continue
        block = block_of(call.name)
        carried = state_carried(call, given)
        size = inner_calls[block], counts[block]
        loop_call = LoopCall(call.name, block, carried, size)
        outermost.append(loop_call)
    return outermost


def state_carried(call: Call, given: Collection[torch.Size]) -> int:
    """Say how surely a call's output is the state of a loop, by its shape and those `given` to any module.

    Returns:
        2 where the module could be given it again, 1 where another one could be, 0 where it could be given again beside
        the model's input, and -1 for a readout, wider than all that it was given.
    """
    if call.returned in call.given:
        return 2
    if call.returned in given:
        return 1
    widths = [shape[-1] for shape in call.given if shape]
    is_wider = bool(call.returned and widths) and call.returned[-1] > max(widths)  # type: ignore[index]
    return -1 if is_wider else 0


def step_starters(model: nn.Module, loop: list[LoopCall]) -> tuple[list[LoopCall], list[LoopCall]]:
    """Return the calls that are the loop, and those of them that start a step.

    ``a b a b``: only ``a`` starts steps, 2 of two layers. Where the order is irregular, as with a readout at some
    iterations (``a a r a r``), it is decided again over the blocks like the biggest one: 3 steps of ``a``. Where these
    are irregular, too, ``l l h l l h``, every call starts one: 6 steps of two modules on one timeline.
    """
    first = loop[0].block
    blocks = [call.block for call in loop]
    if takes_turns(blocks):
        return loop, [call for call in loop if call.block == first]
    alike = like_the_biggest(model, loop)
    if len(alike) < len(loop):
        return step_starters(model, alike)
    return loop, loop


def takes_turns(blocks: Sequence[str]) -> bool:
    """Say whether several blocks come in laps, each at most once from one call of the first to the next.

    Returns:
        True for a single block, too.

    Example:
        >>> takes_turns(["a", "b", "a", "b"]), takes_turns(["l", "l", "h", "l", "l", "h"])
        (True, False)
    """
    if len(set(blocks)) == 1:
        return True
    laps: list[list[str]] = []
    for block in blocks:
        if block == blocks[0]:
            laps.append([])
        laps[-1].append(block)
    return all(1 < len(lap) == len(set(lap)) for lap in laps)


def like_the_biggest(model: nn.Module, loop: Sequence[LoopCall]) -> list[LoopCall]:
    """Return the calls of blocks that could be the loop's core: of its kind, and carrying a state where it does."""
    modules = dict(canonical_modules(model))
    carries_state: defaultdict[str, int] = defaultdict(lambda: -1)
    for call in loop:
        carries_state[call.block] = max(carries_state[call.block], call.carries_state)

    def kind_of(block: str) -> tuple[bool, int, bool]:
        module = modules[block]
        return not only_embeds_or_normalises(module), carries_state[block], has_children(module)

    best = max(kind_of(call.block) for call in loop)
    return [call for call in loop if kind_of(call.block) == best]


def module_names(loop: Sequence[LoopCall]) -> tuple[str, ...]:
    """Return the names of the modules called, each once, in the order of their first calls."""
    names = [call.name for call in loop]
    return tuple(dict.fromkeys(names))

"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from captum_sdi.data.batch import ForwardKwargs, select
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.loop.presets import WHOLE_MODEL, find_preset
from captum_sdi.loop.table import FoundLoop, tabulate_loop
from captum_sdi.loop.watch import Call, watch_calls


def find_loop(model: nn.Module, batch: Any, *, forward_kwargs: ForwardKwargs | None = None) -> FoundLoop:
    """Finds the modules that repeat, by `PRESETS` or by watching a forward pass of the first example.

    Args:
        model: The model.
        batch: A batch it takes; see `captum_sdi.batches`.
        forward_kwargs: Further keywords for its forward, or a function of the batch.

    Returns:
        The outermost modules with parameters that run more than once, and whose call starts a step; prints as a table
        of what was seen. When nothing repeats, the whole model as one step, with a warning: influence is then
        TracIn.

    Example:
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
    calls = watch_calls(model, select(batch, [0]), forward_kwargs)
    spec = find_preset(model, calls)
    if spec is None:
        kinds = {canonical_name(name): type(module) for name, module in model.named_modules()}
        loop = _outermost_repeated(calls, _tied_blocks(model), kinds)
        if not loop:
            warnings.warn(_nothing_repeats(model, calls), stacklevel=2)
            return FoundLoop(WHOLE_MODEL.modules, WHOLE_MODEL.anchors)
        spec = LoopSpec(modules=tuple(dict.fromkeys(name for name, _ in loop)), anchors=_anchors(loop))
    return tabulate_loop(model, spec, calls)


def _tied_blocks(model: nn.Module) -> dict[str, str]:
    """Modules that share parameters with an earlier one of their type: their name to the first one's."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(name)
    modules = dict(model.named_modules())
    blocks: dict[str, str] = {}
    for first, *others in owners.values():
        for other in others:
            # Of layers.1.mlp.up and layers.4.mlp.up the blocks are layers.1 and layers.4; an embedding and a head
            # that share their weight have nothing alike around them.
            a, b = first.split("."), other.split(".")
            differ = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if differ is None or a[differ + 1 :] != b[differ + 1 :]:
                continue
            block, twin = ".".join(a[: differ + 1]), ".".join(b[: differ + 1])
            if type(modules[block]) is type(modules[twin]) and next(modules[block].children(), None) is not None:
                blocks.setdefault(canonical_name(twin), canonical_name(block))
    return blocks


def _outermost_repeated(
    calls: Sequence[Call], blocks: dict[str, str], kinds: dict[str, type[nn.Module]]
) -> list[tuple[str, str]]:
    """The loop's calls in order, as (name, block): of modules that run more than once while the biggest repeats."""
    # A norm that is used once before and once after the loop is called twice, too, but not while the loop runs. Blocks
    # of the biggest one's type that repeat before or after it (Albert's second group) are the loop as well.
    named = [(call.name, blocks.get(call.name, call.name)) for call in calls]
    counts = Counter(block for _, block in named)
    once = {name for name, block in named if counts[block] == 1}
    outer = [
        pair for pair, call in zip(named, calls, strict=True) if pair[0] not in once and once.issuperset(call.path)
    ]
    if not outer:
        return []
    inner = Counter(blocks.get(parent, parent) for call in calls for parent in call.path)  # a norm calls no layer
    biggest = max((block for _, block in outer), key=lambda block: (inner[block], counts[block]))
    positions = [i for i, (_, block) in enumerate(outer) if block == biggest]
    meanwhile = {block for _, block in outer[positions[0] : positions[-1] + 1]}
    return [(name, block) for name, block in outer if block in meanwhile or kinds[name] is kinds[biggest]]


def _anchors(loop: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Whose call starts a step: the first block's when every step calls it once among others, else every block's."""
    # a b a b are two steps of two layers; l l h l l h are six steps of two modules on one timeline.
    blocks = [block for _, block in loop]
    starts = [i for i, block in enumerate(blocks) if block == blocks[0]] + [len(blocks)]
    steps = [blocks[i:j] for i, j in itertools.pairwise(starts)]
    regular = len(set(blocks)) == 1 or all(1 < len(step) == len(set(step)) for step in steps)
    return tuple(dict.fromkeys(name for name, block in loop if not regular or block == blocks[0]))


def _nothing_repeats(model: nn.Module, calls: Sequence[Call]) -> str:
    """What was seen, and what to pass."""
    called = {call.name for call in calls}
    named = ((canonical_name(name), module) for name, module in model.named_modules())
    silent = [n for n, m in named if n and n not in called and any(True for _ in m.parameters(recurse=False))]
    seen = f"{len(called)} modules with parameters ran once each"
    if silent:
        seen += f", {silent[0]!r}{f' and {len(silent) - 1} more' * (len(silent) > 1)} not at all"
    return (
        f"Nothing repeats in {type(model).__name__}: it is taken as one loop step, and influence as TracIn. Name the "
        f"repeated module in loop= if there is one ({seen}; a call of a module's .forward cannot be seen)."
    )

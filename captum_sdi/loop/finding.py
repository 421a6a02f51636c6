"""`find_loop`: a preset where the model's family is known, else whatever repeats in a forward pass.

The outermost modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's
shared transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.inputs import first_examples
from captum_sdi.loop.parameters import canonical_modules
from captum_sdi.loop.presets import WHOLE_MODEL, find_preset
from captum_sdi.loop.repetition import repeated_modules
from captum_sdi.loop.saved import check_saved_loop
from captum_sdi.loop.table import FoundLoop, tabulate_loop
from captum_sdi.loop.watch import Call, watch_calls
from captum_sdi.words import first_few, warn_user

N_EXAMPLES = 8
"""How many examples are run, one by one, until one repeats: some models halt by themselves, some after one step."""


def find_loop(
    model: nn.Module,
    batch: Any,
    *,
    forward_kwargs: ForwardKwargs | None = None,
) -> FoundLoop:
    """Find the modules that repeat, by `PRESETS` or by watching a pass of the first example that runs several steps.

    Whether a call is fed from the one before is not asked: of one encoder for two inputs (a Siamese network) the calls
    are the steps, in their order, and add up to the whole influence.

    Args:
        model: Run once, and given back as it was.
        batch: A batch it takes, or rows, a Dataset or a DataLoader; see `captum_sdi.data`.
        forward_kwargs: Further keywords for its forward, or a function of the batch.

    Returns:
        The outermost modules with parameters that run more than once, and whose call starts a step; prints as a table
        of what was seen. When nothing repeats, the whole model as one step, with a warning: influence is then
        TracIn. A family's loop that runs once warns, too.

    Raises:
        ValueError: If the model was saved with a loop that it does not have now; see
            `captum_sdi.models.loop_layers`.

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
    check_saved_loop(model)
    return loop_of_examples(model, first_examples(model, batch, N_EXAMPLES), forward_kwargs)


def loop_of_examples(
    model: nn.Module,
    examples: Iterable[Any],
    forward_kwargs: ForwardKwargs | None,
) -> FoundLoop:
    """Find the loop in the first example that runs several steps, and warn where none does."""
    loop_table = None
    calls: list[Call] = []
    for example in examples:
        calls = watch_calls(model, example, forward_kwargs)
        loop = find_preset(model, calls) or repeated_modules(model, calls)
        if loop is None:
            continue
        loop_table = tabulate_loop(model, loop, calls)
        if loop_table.n_steps > 1:
            return loop_table
    if loop_table is None:
        warn_user(_nothing_repeats(model, calls))
        return FoundLoop(WHOLE_MODEL.modules, WHOLE_MODEL.anchors)
    warn_user(
        f"Nothing repeats: {loop_table!r}, the loop of {type(model).__name__}, runs once. It is taken as one loop "
        "step, and influence as TracIn. Let the model loop more often, or name another module in loop= if another one "
        "repeats."
    )
    return loop_table


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

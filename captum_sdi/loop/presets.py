"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.loop.parameters import called_names
from captum_sdi.loop.watch import Call

PRESETS = {
    "albert": LoopSpec(modules=("albert_layer_groups",), anchors=("albert_layer_groups",)),
    "hrm_text": LoopSpec(modules=("L_module", "H_module"), anchors=("L_module", "H_module")),
    "huginn_raven": LoopSpec(
        modules=("transformer.adapter", "transformer.core_block"), anchors=("transformer.adapter",)
    ),
    "looped_gpt": LoopSpec(modules=("core",), anchors=("core",)),
    "ouro": LoopSpec(modules=("layers", "norm", "early_exit_gate"), anchors=("layers.0",)),
    "zamba": LoopSpec(modules=("shared_transf",), anchors=("shared_transf",)),
    "zamba2": LoopSpec(modules=("shared_transformer",), anchors=("shared_transformer",)),
}
"""Known families by ``config.model_type``. A name stands for every module whose name ends in it, so that prefixes
(``model.``, a wrapper's) do not matter; add a family with one line.

Zamba's one transformer is several modules that share parameters. Each of its calls is a step, so a block that takes
turns with another one has gradients at every other step only; the Mamba layers in between belong to the step they
follow, and count with ``layers=None``."""


WHOLE_MODEL = LoopSpec(modules=("",), anchors=("",))
"""One step: the call of the model itself."""


def find_preset(model: nn.Module, calls: Sequence[Call]) -> LoopSpec | None:
    configs = (getattr(module, "config", None) for module in model.modules())
    kinds = dict.fromkeys(str(getattr(config, "model_type", "")) for config in configs if config is not None)
    names = [canonical_name(name) for name, _ in model.named_modules()]
    called = {call.name for call in calls}
    for preset in (PRESETS[kind] for kind in kinds if kind in PRESETS):
        full = {
            short: [name for name in names if name == short or name.endswith(f".{short}")]
            for short in (*preset.modules, *preset.anchors)
        }
        spec = [tuple(name for short in group for name in full[short]) for group in (preset.modules, preset.anchors)]
        # Of a model that only shares the name, such as one with untied layers, nothing may be known.
        if all(full.values()) and called & set(called_names(model, spec[1])):
            return LoopSpec(*spec)
    return None

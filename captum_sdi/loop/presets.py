"""Families of looped models whose loop is known by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from captum_sdi.features import LoopSpec
from captum_sdi.loop.clock import LoopClock
from captum_sdi.loop.parameters import called_names, canonical_modules
from captum_sdi.loop.watch import Call
from captum_sdi.model_facts import model_configs

PRESETS = {
    "albert": LoopSpec(modules=("albert_layer_groups",), anchors=("albert_layer_groups",)),
    "hrm_text": LoopSpec(modules=("L_module", "H_module"), anchors=("L_module", "H_module")),
    "huginn_raven": LoopSpec(
        modules=("transformer.adapter", "transformer.core_block"), anchors=("transformer.adapter",)
    ),
    "looped_gpt": LoopSpec(modules=("core",), anchors=("core",)),
    "looped_gpt, tokens": LoopSpec(
        modules=("wte", "wpe", "prelude", "core", "coda", "ln_f", "lm_head"), anchors=("wte",)
    ),
    "ouro": LoopSpec(modules=("layers", "norm", "early_exit_gate"), anchors=("layers.0",)),
    "zamba": LoopSpec(modules=("shared_transf",), anchors=("shared_transf",)),
    "zamba2": LoopSpec(modules=("shared_transformer",), anchors=("shared_transformer",)),
}
"""Known families by ``config.model_type``. A name stands for every module whose name ends in it, so that prefixes
(``model.``, a wrapper's) do not matter; add a family with one line. `family_of` makes the key of a config.

Zamba's one transformer is several modules that share parameters. Each of its calls is a step, so a block that takes
turns with another one has gradients at every other step only; the Mamba layers in between belong to the step they
follow, and count with ``layers=None``."""

WHOLE_MODEL = LoopSpec(modules=("",), anchors=("",))
"""One step: the call of the model itself."""


def find_preset(model: nn.Module, calls: Sequence[Call]) -> LoopSpec | None:
    """Return the loop of the first family that a config names and that fits the calls seen."""
    called = {call.name for call in calls}
    for config in model_configs(model):
        preset = PRESETS.get(family_of(config))
        if preset is None:
            continue
        modules = full_names(model, preset.modules)
        anchors = full_names(model, preset.anchors)
        # A model may only share its family's name, such as one with untied layers.
        if modules and called.intersection(called_names(model, anchors)):
            loop = LoopSpec(modules, anchors)
            return loop if fits(model, loop, calls) else None
    return None


def family_of(config: object) -> str:
    """Return under which name `PRESETS` has a config's loop: its model type, and that tokens are handed on if so."""
    family = str(getattr(config, "model_type", ""))
    hands_on_tokens = getattr(config, "feedback", None) == "tokens"
    return f"{family}, tokens" if hands_on_tokens else family


def fits(model: nn.Module, loop: LoopSpec, calls: Sequence[Call]) -> bool:
    """Say whether each of the loop's modules was called at most once a step."""
    modules = dict(canonical_modules(model))
    looped = called_names(model, loop.modules)
    clock = LoopClock(model, loop)
    seen: set[tuple[int, str]] = set()
    for call in calls:
        moment = clock.replay_call(modules[call.name])
        place = moment.step, call.name
        if call.name in looped and place in seen:
            return False
        seen.add(place)
    return True


def full_names(model: nn.Module, short_names: Sequence[str]) -> tuple[str, ...]:
    """Return the modules whose names end in one of these; none unless each has a match."""
    names = [name for name, _ in canonical_modules(model)]
    matching: list[str] = []
    for short_name in short_names:
        matches = [name for name in names if ends_in(name, short_name)]
        if not matches:
            return ()
        matching += matches
    return tuple(matching)


def ends_in(name: str, short_name: str) -> bool:
    """Say whether a module's path ends in a shorter path."""
    return name == short_name or name.endswith(f".{short_name}")

"""The hooks: what every use of a shared layer read and what flowed back to it, and at which loop step.

`Tape` is the only code that touches the model. While it is installed, each call of a layer that owns a targeted
parameter passes its output through `_Tap`, an identity in the autograd graph that saves what the layer read and, in
the backward pass, hands it to the layer's rule together with the gradient that arrives. Three choices matter.

* The loop step is a value the tap closes over in the forward pass. A stack popped in the backward pass is silently
  wrong as soon as some loop outputs do not reach the loss (early exit, exit gates).
* Every parameter is frozen meanwhile, so the backward pass forms no weight gradient: a dummy scalar that requires a
  gradient keeps the taps in the graph.
* What a layer read is saved the ordinary way, so activation checkpointing drops and recomputes it like anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from captum_sdi.features import canonical_name


def describe_layer(name: str, module: nn.Module, owned: Iterable[str]) -> str:
    listed = ", ".join(repr(canonical_name(parameter)) for parameter in owned)
    return f"{name!r} ({type(module).__name__}), which owns {listed},"


def uncovered_layers(refused: list[tuple[str, str]], without: str) -> str:
    reasons = "; nor ".join(f"{what} because {why}" for what, why in refused)
    return (
        f"No layer rule covers {reasons}. Leave it out{without}, or move the parameter into a leaf module that takes "
        "one tensor and returns one."
    )


def suggest_layers(model: nn.Module, targets: Mapping[str, nn.Parameter], out: set[str]) -> str:
    """`Tape.without`: the outermost modules that hold targets only, none of them in ``out``."""
    wanted = {id(parameter) for name, parameter in targets.items() if name not in out}
    chosen: dict[frozenset[int], str] = {}

    def choose(name: str, module: nn.Module) -> None:
        inside = frozenset(id(parameter) for parameter in module.parameters())
        if name and inside and inside <= wanted:
            chosen.setdefault(inside, canonical_name(name))
        elif inside & wanted:
            for child, part in module.named_children():
                choose(f"{name}.{child}" if name else child, part)

    choose("", model)
    return f" with layers={list(chosen.values())}" if chosen else ""


REENTRANT = (
    "{} runs inside reentrant activation checkpointing or another autograd.Function, where no graph is built that can "
    "be observed. Checkpoint with use_reentrant=False, or switch it off: activation_checkpointing=True saves the same "
    "memory."
)


NESTED = (
    "A backward pass within the forward or backward pass (an implicit layer's, a gradient penalty's, a checkpoint's of "
    "the model's own) runs through {} so that gradients of its uses cannot be told apart. Leave it out with "
    "layers=[...]."
)

"""The sentences about layers whose per-example gradients cannot be seen: which layer, why, and what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from captum_sdi.features import canonical_name
from captum_sdi.words import first_few

# --- which layers ---


def describe_layer(name: str, module: nn.Module, owned: Iterable[str]) -> str:
    """Write a layer's name, its type and the targeted parameters it owns."""
    parameters = ", ".join(repr(canonical_name(parameter)) for parameter in owned)
    return f"{name!r} ({type(module).__name__}), which owns {parameters},"


def suggest_layers(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    excluded: Collection[str],
) -> str:
    """Write which ``layers=`` ask for all targets but the excluded ones.

    Returns:
        Such as " with layers=['core.fc', 'core.norm']", the outermost modules that hold no other parameters; empty
        when nothing is left.
    """
    wanted = {id(parameter) for name, parameter in targets.items() if name not in excluded}
    chosen: dict[frozenset[int], str] = {}

    def choose(name: str, module: nn.Module) -> None:
        inside = frozenset(id(parameter) for parameter in module.parameters())
        if name and inside and inside <= wanted:
            chosen.setdefault(inside, canonical_name(name))
        elif inside & wanted:
            for child_name, child in module.named_children():
                choose(f"{name}.{child_name}" if name else child_name, child)

    choose("", model)
    return f" with layers={list(chosen.values())}" if chosen else ""


# --- why no rule covers a layer, written behind "because" ---


def depends_on_batch() -> str:
    """Say why an embedding that looks at the whole batch has no per-example gradient."""
    return "max_norm and scale_grad_by_freq make its gradient depend on the whole batch"


def computed_elsewhere() -> str:
    """Say why a parametrization's parameters are out of reach."""
    return "another module computes its weight from them (torch.nn.utils.parametrize)"


def used_outside_layers() -> str:
    """Say why parameters beside children are out of reach."""
    return "it uses them outside any layer of its own"


def changed_by_hook() -> str:
    """Say why a parameter with a gradient hook is out of reach."""
    return "a hook of its own changes its gradient (Tensor.register_hook)"


def several_outputs(output: object) -> str:
    """Say that a layer's call returned more than an activation."""
    return f"it returned a {type(output).__name__}, not one tensor"


def fails_alone(error: Exception) -> str:
    """Say that a layer cannot be called on one example."""
    return f"calling its forward on one example alone fails ({error})"


def changes_input() -> str:
    """Say that a layer writes to its activation."""
    return "it changes its input in place"


def differs_alone() -> str:
    """Say that a layer's output for one example depends on the others."""
    return "its forward on one example alone gives something else than in the batch"


def unread_parameters(names: Sequence[str]) -> str:
    """Say that a layer's forward computes its output without these parameters."""
    return f"its forward does not read {names} (a hook does, as for torch.nn.utils.weight_norm)"


def uncovered_layers(refused: Sequence[tuple[str, str]], remedy: str) -> str:
    """Refuse layers that no rule covers, each given by its description and a reason."""
    reasons = "; nor ".join(f"{layer} because {reason}" for layer, reason in refused)
    return (
        f"No layer rule covers {reasons}. Leave it out{remedy}, or move the parameter into a leaf module that takes "
        "one tensor and returns one."
    )


# --- how a layer is called ---


def mixes_examples(layers: Sequence[str], batch_size: int) -> str:
    """Refuse modules whose output for one example depends on others."""
    modules = "; and in ".join(layer.removesuffix(",") for layer in layers)
    return (
        f"In a batch of {batch_size} examples are mixed, so that no gradient is one example's own: what is returned "
        f"for the first depends on what was given for others in {modules}. Pass batch_size=1 (to a "
        "DataLoader, too), or let the model keep examples apart."
    )


def no_tokens_of_whole_pass(names: Sequence[str], remedy: str) -> str:
    """Refuse per-token features of parameters whose gradients the losses alone tell."""
    return (
        f"unit='token' needs a call that tells the gradient of {first_few(names)}: the model uses it beside any call "
        f"inside the loop. Leave it out{remedy}, or ask without axes of positions."
    )


def fails_in_batch(error: Exception, batch_size: int) -> str:
    """Refuse a model that cannot be run under the hooks where a layer is called for one example, or once for all."""
    return (
        f"{error} In a batch of {batch_size} the model calls a layer for one example, which is taken as one call for "
        "them all. Pass batch_size=1 if it takes examples one by one or in groups."
    )


def no_token_axis(
    layer: str,
    activation: torch.Size,
    output: torch.Size,
    remedy: str,
) -> str:
    """Refuse per-token features of a layer whose second axis is not the token positions."""
    return (
        "unit='token' needs the token positions as the second axis of each layer's input and output: "
        f"{layer} was given a tensor of shape {tuple(activation)} and returned one of shape {tuple(output)}. Leave it "
        f"out{remedy}, or ask without axes of positions."
    )


def unequal_token_axes(
    layer: str,
    count: int,
    other_layer: str,
    other_count: int,
    remedy: str,
) -> str:
    """Refuse per-token features of two layers that read different numbers of tokens."""
    return (
        f"unit='token' needs the same number of token positions in every layer: {layer} was given {count}, "
        f"{other_layer} {other_count}. Leave the second one out{remedy}, or ask without axes of positions."
    )


def only_without_grad(names: Sequence[str], remedy: str) -> str:
    """Refuse parameters whose layers run under `torch.no_grad` throughout."""
    return (
        f"The forward pass runs the layer that owns {first_few(names)} under torch.no_grad only: no gradient reaches "
        f"it. Leave it out{remedy}, or let the model build a graph: with another number of loop steps in "
        "forward_kwargs=, of which Huginn takes a pair such as {'num_steps': (0, 4)}; or, as it runs in eval(), "
        "without asking for self.training, e.g. by torch.set_grad_enabled(torch.is_grad_enabled())."
    )


def never_called(names: Sequence[str], remedy: str) -> str:
    """Refuse parameters whose layers are never called."""
    return (
        f"The forward pass never called the layer that owns {first_few(names)}: their influence cannot be seen. Leave "
        f"them out{remedy}, or call the layer itself, not its weight or its .forward."
    )


# --- what happens in the backward pass ---


def reentrant_checkpointing(layer: str) -> str:
    """Refuse a layer that runs where autograd builds no graph."""
    return (
        f"{layer} runs inside reentrant activation checkpointing or another autograd.Function, where no graph is "
        "built that can be observed. Checkpoint with use_reentrant=False, or switch it off: "
        "activation_checkpointing=True saves the same memory."
    )


def nested_backward(layer: str) -> str:
    """Refuse a layer that a second backward pass runs through."""
    return (
        "A backward pass within the forward or backward pass (an implicit layer's, a gradient penalty's, a "
        f"checkpoint's of the model's own) runs through {layer} so that gradients of its uses cannot be told apart. "
        "Leave it out with layers=[...]."
    )


def incomplete_rule(layer: str, rule: str, missing: Sequence[str]) -> str:
    """Refuse a layer rule that is silent about a wanted parameter, which would count as zero."""
    return (
        f"The layer rule {rule!r} for {layer} yielded no gradient of {first_few(missing)}. Let it yield one for each "
        "wanted parameter, or register it with parameters=, the names it knows, so that other layers are not taken."
    )


def parameter_in_graph(name: str) -> str:
    """Report a model that returned one of its own parameters in place of an activation."""
    return f"parameter {name!r} became part of the graph; please report this model."

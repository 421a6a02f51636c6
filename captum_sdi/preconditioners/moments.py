"""Second moments out of an optimizer's state, which lists parameters by position: whose are they?"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_sdi.checkpoints.files import WEIGHT_FILES
from captum_sdi.checkpoints.reading import OPTIMIZER_KEYS, unpickled
from captum_sdi.features import canonical_name

WITHOUT_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Patterns of names without weight decay in `transformers.Trainer` since 4.48; before, ``bias`` alone."""
REMEDY = "Pass Adam(moments=a function of the checkpoint that returns second moments by the parameter's name)."


@dataclass(frozen=True)
class Moments:
    """What an optimizer knows of each parameter."""

    squares: dict[str, Tensor]
    """v̂ by the parameter's name."""
    eps: dict[str, float]
    """ε of the parameter's group."""


def check_has_moments(source: Any) -> None:
    """Check that an optimizer's state can be looked for.

    Raises:
        ValueError: If the checkpoint is no path, or its folder has no ``optimizer.pt``.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"Adam() reads second moments beside a checkpoint's weights; {source!r} is no path. {REMEDY}")
    file = optimizer_file(source)
    if not file.is_file():
        raise ValueError(f"There is no {file}, which Adam() reads second moments from. {REMEDY}")


def optimizer_file(source: str | os.PathLike[str]) -> Path:
    """Return the file that holds the optimizer's state: beside a folder's weights, or with them in one file."""
    path = Path(os.fsdecode(source))
    if path.is_dir():
        return path / "optimizer.pt"
    is_weights_alone = path.name in WEIGHT_FILES or path.suffix == ".safetensors"
    return path.with_name("optimizer.pt") if is_weights_alone else path


def optimizer_moments(
    source: Any,
    model: nn.Module,
    trainable: Collection[str],
) -> Moments:
    """Read the second moments beside a checkpoint's weights.

    Args:
        source: The checkpoint's folder or file.
        model: The model.
        trainable: Names of the parameters that it was trained in.

    Returns:
        v̂ and ε of every parameter that the optimizer has stepped.

    Raises:
        ValueError: If there are none, or nobody can tell whose they are.
    """
    check_has_moments(source)
    file = optimizer_file(source)
    state = optimizer_state(unpickled(file), file)
    groups = state["param_groups"]
    names = named_groups(state, model, trainable)
    if names is None:
        sizes = [len(group["params"]) for group in groups]
        raise ValueError(
            f"{file} lists {sum(sizes)} parameters in groups of {sizes} by position, and neither their order nor the "
            f"Trainer's rule for weight decay alone gives every one the shape of its moments. {REMEDY}"
        )
    squares, eps = {}, {}
    for group, group_names in zip(groups, names, strict=True):
        for number, name in zip(group["params"], group_names, strict=True):
            if number in state["state"]:
                known_as = canonical_name(name)
                parameter_state = state["state"][number]
                squares[known_as] = corrected_square(parameter_state, group, file)
                eps[known_as] = float(group["eps"])
    return Moments(squares, eps)


def optimizer_state(saved: Any, file: Path) -> Mapping[str, Any]:
    """Find the state of an Adam in what a file holds.

    Returns:
        Its ``state`` and ``param_groups``.

    Raises:
        ValueError: If there is none.
    """
    state = saved
    if isinstance(saved, Mapping) and "param_groups" not in saved:
        for key in OPTIMIZER_KEYS:
            state = saved.get(key, state)
        if isinstance(state, list) and len(state) == 1:  # Lightning's
            state = state[0]
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(f"{file} holds no optimizer's state. {REMEDY}")
    for group in state["param_groups"]:
        if not {"betas", "eps", "params"} <= set(group):
            raise ValueError(f"{file} holds the state of an optimizer that is no Adam: no betas, or no eps. {REMEDY}")
    return state


def corrected_square(
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    file: Path,
) -> Tensor:
    """Return v̂ = v / (1 - β₂ᵏ) of one parameter.

    Raises:
        ValueError: If its state is not that of `torch.optim.Adam` or ``AdamW``.
    """
    if not {"step", "exp_avg_sq"} <= set(state) or not isinstance(state["exp_avg_sq"], Tensor):
        raise ValueError(
            f"{file} has no exp_avg_sq and step of every parameter, as torch's Adam and AdamW do. {REMEDY}"
        )
    _, beta = group["betas"]
    n_updates = float(state["step"])
    if not n_updates >= 1:
        raise ValueError(f"{file} was saved before the optimizer's first step: there are no moments yet.")
    correction = 1 - float(beta) ** n_updates
    return state["exp_avg_sq"] / correction


# --- whose they are ---


def named_groups(
    state: Mapping[str, Any],
    model: nn.Module,
    trainable: Collection[str],
) -> list[list[str]] | None:
    """Name each group's parameters.

    Returns:
        Names by group; None where no known order gives every parameter the shape of its moments, or two orders do.
    """
    possible = possible_groups(model, trainable)
    fitting = [names for names in possible if fits(names, state, model)]
    is_clear = len(fitting) > 0 and all(names == fitting[0] for names in fitting)
    return fitting[0] if is_clear else None


def possible_groups(model: nn.Module, trainable: Collection[str]) -> Iterator[list[list[str]]]:
    """Yield the ways in which parameters are usually put into groups."""
    all_names = [name for name, _ in model.named_parameters()]
    trained = [name for name in all_names if name in trainable]
    norms = parameters_of_norms(model)
    for patterns in (WITHOUT_DECAY, WITHOUT_DECAY[:1]):
        spared = [name for name in trained if name in norms or matches(name, patterns)]
        yield [[name for name in trained if name not in spared], spared]
    vectors = [name for name in trained if model.get_parameter(name).ndim < 2]
    yield [[name for name in trained if name not in vectors], vectors]
    yield [trained]
    yield [all_names]


def parameters_of_norms(model: nn.Module) -> set[str]:
    """Return the names of the parameters in layer norms, which the Trainer spares from weight decay."""
    names: set[str] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            prefix = f"{module_name}." if module_name else ""
            for local_name, _ in module.named_parameters():
                names.add(prefix + local_name)
    return names


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Say whether some pattern is in a parameter's name."""
    return any(re.search(pattern, name.lower()) for pattern in patterns)


def fits(
    names: Sequence[Sequence[str]],
    state: Mapping[str, Any],
    model: nn.Module,
) -> bool:
    """Say whether groups have the optimizer's sizes, and every parameter the shape of its moments."""
    groups = state["param_groups"]
    if [len(group) for group in names] != [len(group["params"]) for group in groups]:
        return False
    for group, group_names in zip(groups, names, strict=True):
        for number, name in zip(group["params"], group_names, strict=True):
            parameter_state = state["state"].get(number, {})
            square = parameter_state.get("exp_avg_sq")
            parameter = model.get_parameter(name)
            if isinstance(square, Tensor) and square.shape != parameter.shape:
                return False
    return True

"""Copying a whole model's state dict into it, once the two agree in every key and shape."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import kept_rng
from captum_sdi.checkpoints.differences import Differences, mismatch
from captum_sdi.checkpoints.files import abbreviated
from captum_sdi.checkpoints.reading import StateDict


def load_whole(model: nn.Module, state: StateDict, file: Path) -> None:
    """Copy a state dict of the whole model into it, if the two agree in every key and shape."""
    # Not strict, because a module's "_extra_state" is no tensor and is left as it is.
    model.load_state_dict(fitting_weights(model, state, file), strict=False)


def fitting_weights(model: nn.Module, state: StateDict, file: Path) -> StateDict:
    """Return a state dict under the model's names, if the two agree in every key and shape."""
    matched, differences = match_names(model, state)
    if differences:
        renamed = read_by_transformers(model, file)
        if renamed is not None:
            matched, differences = match_names(model, renamed)
    if differences:
        raise differences.error(file, model)
    return matched


def lightning_weights(model: nn.Module, state: StateDict, file: Path) -> StateDict:
    """Take the model's tensors out of a LightningModule's, which has the model under an attribute's name."""
    names = list(bare_names(named_tensors(model)))
    prefixes = [name.removesuffix(names[0]) for name in state if name.endswith(names[0])]
    fitting = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    if len(fitting) > 1:
        raise ValueError(
            f"{file} holds weights for the model under several names: {abbreviated(fitting)}. Save the right ones: "
            "torch.save({'model_state_dict': module.<name>.state_dict(), 'learning_rate': lr}, path)."
        )
    if not fitting or fitting == [""]:
        return state
    return {name: state[fitting[0] + name] for name in names}


def named_tensors(model: nn.Module) -> StateDict:
    """List the model's own tensors under the names its state dict uses, tied ones repeatedly."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map names without the prefixes of torch.compile and DataParallel to the names as they are."""
    originals = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): name for name in names}
    # "module." is a prefix only where every name has it: a model may have a submodule called so.
    while originals and all(name.startswith("module.") for name in originals):
        originals = {name.removeprefix("module."): original for name, original in originals.items()}
    return originals


def match_names(model: nn.Module, state: StateDict) -> tuple[StateDict, Differences]:
    """Pair a state dict with the model's names, and list everything in which the two differ."""
    targets = named_tensors(model)
    model_names = bare_names(targets)
    stored = {bare_name: state[name] for bare_name, name in bare_names(state).items()}
    matched: StateDict = {}
    mismatched: list[str] = []
    for bare_name, name in model_names.items():
        if bare_name in stored:
            matched[name] = stored[bare_name]
            mismatched += mismatch(bare_name, stored[bare_name], targets[name])
    mismatched += fill_tied(matched, targets)
    missing = [bare_name for bare_name, name in model_names.items() if name not in matched]
    missing = undeclared(missing, model, "_keys_to_ignore_on_load_missing")
    unexpected = [bare_name for bare_name in stored if bare_name not in model_names]
    unexpected = undeclared(unexpected, model, "_keys_to_ignore_on_load_unexpected")
    return matched, Differences(missing, unexpected, mismatched)


def fill_tied(matched: StateDict, targets: StateDict) -> list[str]:
    """Give a tied tensor's absent names the value of a present one; list values that disagree."""
    tied_names: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        tied_names.setdefault(id(tensor), []).append(name)
    disagreements = []
    for names in tied_names.values():
        present = [name for name in names if name in matched]
        if len(names) == 1 or not present:
            continue
        first, *aliases = present
        for name in aliases:
            # Copying both would silently keep the last: the checkpoint is of an untied model.
            if not same_values(matched[first], matched[name]):
                disagreements.append(f"{first} and {name} (two tensors there, one in the model)")
        matched.update(dict.fromkeys(names, matched[first]))
    return disagreements


def same_values(first: Tensor, second: Tensor) -> bool:
    """Compare exactly, NaN equal to NaN; tensors of another shape are reported elsewhere, headers have no values."""
    if first.shape != second.shape or first.is_meta or second.is_meta:
        return True
    equal = torch.isclose(first, second.to(first.dtype), rtol=0, atol=0, equal_nan=True)
    return bool(equal.all())


def undeclared(names: list[str], model: nn.Module, attribute: str) -> list[str]:
    """Leave out the names that a transformers class declares safe to lack or to ignore."""
    patterns: set[str] = set()
    for module in model.modules():
        declared = getattr(module, attribute, None)
        patterns.update(declared or ())
    remaining = []
    for name in names:
        if not any(re.search(pattern, name) for pattern in patterns):
            remaining.append(name)
    return remaining


def read_by_transformers(model: nn.Module, file: Path) -> StateDict | None:
    """Read a save_pretrained folder through transformers, where its names are not the model's.

    transformers 5 stores some models under other names and shapes than it computes with (the experts of a Mixtral one
    by one), and only ``from_pretrained`` knows how to go back. It builds a second model, so it is the second choice.

    Returns:
        The state dict of the second model; None where transformers cannot read the folder, or not all of it.
    """
    from transformers import PreTrainedModel  # takes seconds to import, and only this case needs it
    from transformers.utils import logging

    if not isinstance(model, PreTrainedModel) or not (file.parent / "config.json").is_file():
        return None
    loader: Any = type(model)  # the annotation of from_pretrained leaves out the pair that output_loading_info makes
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report would call "ok" what we are about to refuse
    try:
        with kept_rng():
            second_model, loading_info = loader.from_pretrained(
                file.parent,
                config=copy.deepcopy(model.config),
                dtype="auto",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception:  # whatever it stumbles over, our own list of differences says it better
        return None
    finally:
        logging.set_verbosity(verbosity)
    complete = not any(loading_info.values())
    return second_model.state_dict() if complete else None

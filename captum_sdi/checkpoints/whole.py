"""Copying a state dict of the whole model into it, once the two agree in every key and shape."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from captum_sdi.borrow import kept_rng
from captum_sdi.checkpoints.differences import Differences, difference


def load_whole(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Copy a state dict of the whole model into it, if the two agree in every key and shape."""
    matched, differences = _matched(model, state)
    if differences and (renamed := _read_by_transformers(model, file)) is not None:
        matched, differences = _matched(model, renamed)
    if differences:
        raise differences.error(file, model)
    # Not strict, because a module's "_extra_state" is no tensor and is left as it is.
    model.load_state_dict(matched, strict=False)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List the model's own tensors under the names its state dict uses, tied ones repeatedly."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map names without the prefixes of torch.compile and DataParallel to the names as they are."""
    # "module." is a prefix only where every name has it: a model may have a submodule called so.
    bare = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): name for name in names}
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): original for name, original in bare.items()}
    return bare


def _matched(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Differences]:
    """Pair a state dict with the model's names, and list everything in which the two differ."""
    targets = named_tensors(model)
    stored = {bare: state[name] for bare, name in _bare_names(state).items()}
    wanted = _bare_names(targets)
    matched: dict[str, Tensor] = {}
    shapes: list[str] = []
    for bare, name in wanted.items():
        if bare in stored:
            matched[name] = stored[bare]
            shapes += difference(bare, stored[bare], targets[name])
    shapes += _fill_tied(matched, targets)
    optional = _declared_patterns(model, "_keys_to_ignore_on_load_missing")
    missing = [bare for bare, name in wanted.items() if name not in matched and not optional(bare)]
    surplus = _declared_patterns(model, "_keys_to_ignore_on_load_unexpected")
    unexpected = [bare for bare in stored if bare not in wanted and not surplus(bare)]
    return matched, Differences(missing, unexpected, shapes)


def _fill_tied(matched: dict[str, Tensor], targets: dict[str, Tensor]) -> list[str]:
    """Give a tied tensor's absent names the value of a present one; list values that disagree."""
    groups: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        groups.setdefault(id(tensor), []).append(name)
    differences = []
    for names in groups.values():
        present = [name for name in names if name in matched]
        if len(names) == 1 or not present:
            continue
        first = matched[present[0]]
        for name in present[1:]:
            # Copying both would silently keep the last: the checkpoint is of an untied model.
            if not _same_values(first, matched[name]):
                differences.append(f"{present[0]} and {name} (two tensors there, one in the model)")
        matched.update(dict.fromkeys(names, first))
    return differences


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Compare exactly, NaN equal to NaN; tensors of another shape are reported elsewhere."""
    if a.shape != b.shape:
        return True
    return bool(torch.isclose(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True).all())


def _declared_patterns(model: nn.Module, attribute: str) -> Callable[[str], bool]:
    """Make a test for the keys that a transformers class declares safe to lack or to ignore."""
    patterns = {p for module in model.modules() for p in getattr(module, attribute, None) or ()}
    return lambda key: any(re.search(pattern, key) for pattern in patterns)


def _read_by_transformers(model: nn.Module, file: Path) -> dict[str, Tensor] | None:
    """Read a save_pretrained folder through transformers, where its names are not the model's."""
    # transformers 5 stores some models under other names and shapes than it computes with (the
    # experts of a Mixtral one by one), and only from_pretrained knows how to go back. It builds a
    # second model, so it is the second choice.
    if not isinstance(model, PreTrainedModel) or not (file.parent / "config.json").is_file():
        return None
    loader: Any = type(model)  # its annotation leaves out the pair that loading info makes
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report would call "ok" what we are about to refuse
    try:
        with kept_rng():
            read, info = loader.from_pretrained(
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
    return None if any(info.values()) else read.state_dict()

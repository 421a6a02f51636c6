"""Copying an adapter's weights into a ``peft.PeftModel``, whose base model stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from captum_sdi.checkpoints.differences import Differences, compared, two_values
from captum_sdi.checkpoints.reading import StateDict, read_json

# Settings of an adapter that change what it computes without changing the shape of a weight.
_ADAPTER_SETTINGS = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora")


def adapter_name(model: nn.Module) -> str | None:
    """Return the name of a PeftModel's active adapter; None for any other model."""
    name = getattr(model, "active_adapter", None)
    return name if isinstance(name, str) else None


def load_adapter(model: nn.Module, state: StateDict, file: Path) -> None:
    """Copy an adapter's weights into the active adapter of a PeftModel; the base model stays."""
    name = check_adapter(model, state, file)
    from peft import set_peft_model_state_dict  # optional: a PeftModel proves that it is installed

    set_peft_model_state_dict(model, state, adapter_name=name)


def check_adapter(model: nn.Module, state: StateDict, file: Path) -> str:
    """Check that an adapter fits the active adapter of a PeftModel, and return that one's name."""
    name = adapter_name(model)
    if name is None or not hasattr(model, "peft_config"):
        raise ValueError(
            f"{file} holds the weights of an adapter, but the model ({type(model).__name__}) is no PeftModel. Wrap it "
            f"first: model = peft.PeftModel.from_pretrained(model, {str(file.parent)!r}, is_trainable=True)."
        )
    check_adapter_settings(model, name, file)
    differences = adapter_differences(model, name, state)
    if differences:
        raise differences.error(file, model)
    return name


def check_adapter_settings(model: Any, name: str, file: Path) -> None:
    """Check that the checkpoint's adapter and the model's adapter ``name`` agree in settings."""
    settings_file = file.parent / "adapter_config.json"
    if not settings_file.is_file():
        return
    saved = read_json(settings_file)
    current = model.peft_config[name].to_dict()
    differing = []
    for setting in _ADAPTER_SETTINGS:
        if setting in saved and saved[setting] != current.get(setting):
            differing.append(two_values(setting, saved[setting], current.get(setting)))
    if differing:
        raise ValueError(
            f"{file} was trained as another adapter than the model's '{name}': {', '.join(differing)}. Nothing was "
            f"loaded. Build the model with peft.PeftModel.from_pretrained(base, {str(file.parent)!r})."
        )


def adapter_differences(model: Any, name: str, state: StateDict) -> Differences:
    """Compare an adapter's state dict with the model's adapter called ``name``."""
    from peft import get_peft_model_state_dict

    # peft saves resized embeddings along with the adapter. Only the checkpoint tells whether it did, and peft's own
    # guess would ask the Hub: compare without embeddings, then with them, and take the better fit.
    candidates = []
    for embeddings in (False, True):
        targets = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
        differences = compared(state, targets)
        candidates.append(differences)
        if not differences.unexpected:
            break
    return min(candidates, key=len)

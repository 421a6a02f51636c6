"""Copying the weights of an adapter into a ``peft.PeftModel``, whose base model stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_sdi.checkpoints.differences import Differences, difference
from captum_sdi.checkpoints.reading import read_json

# Settings of an adapter that change what it computes without changing the shape of a weight.
_ADAPTER_SETTINGS = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora")


def adapter_name(model: nn.Module) -> str | None:
    """Tell a PeftModel's active adapter; peft saves one not called default in a subfolder."""
    name = getattr(model, "active_adapter", None)
    return name if isinstance(name, str) else None


def load_adapter(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Copy an adapter's weights into the active adapter of a PeftModel; the base model stays."""
    name = adapter_name(model)
    if name is None or not hasattr(model, "peft_config"):
        raise ValueError(
            f"{file} holds the weights of an adapter, but the model ({type(model).__name__}) is no PeftModel. Wrap it "
            f"first: model = peft.PeftModel.from_pretrained(model, {str(file.parent)!r}, is_trainable=True)."
        )
    from peft import set_peft_model_state_dict  # optional: a PeftModel proves that it is installed

    _check_settings(model, name, file)
    if differences := _differences(model, name, state):
        raise differences.error(file, model)
    set_peft_model_state_dict(model, state, adapter_name=name)


def _check_settings(model: Any, name: str, file: Path) -> None:
    saved_file = file.parent / "adapter_config.json"
    if not saved_file.is_file():
        return
    saved, current = read_json(saved_file), model.peft_config[name].to_dict()
    differ = [
        f"{key} ({saved[key]} in the checkpoint, {current.get(key)} in the model)"
        for key in _ADAPTER_SETTINGS
        if key in saved and saved[key] != current.get(key)
    ]
    if differ:
        raise ValueError(
            f"{file} was trained as another adapter than the model's '{name}': {', '.join(differ)}. Nothing was "
            f"loaded. Build the model with peft.PeftModel.from_pretrained(base, {str(file.parent)!r})."
        )


def _differences(model: Any, name: str, state: dict[str, Tensor]) -> Differences:
    from peft import get_peft_model_state_dict

    # Whether embeddings were saved along (they were if resized) only the checkpoint tells; peft's
    # own guess would ask the Hub. Take the answer that fits better.
    found: list[Differences] = []
    for embeddings in (False, True):
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
        shapes = [d for k in own if k in state for d in difference(k, state[k], own[k])]
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        found.append(Differences(missing, unexpected, shapes))
        if not unexpected:
            break
    return min(found, key=len)

"""A loop that a config speaks of: `loop_layers` writes it there, and loading does not apply it."""

from __future__ import annotations

from torch import nn

from captum_sdi.model_facts import LOOP_KEY, saved_loop


def check_saved_loop(model: nn.Module) -> None:
    """Refuse a model that was saved with looped layers and loaded without.

    Raises:
        ValueError: If a config says that layers are looped, and they are not.
    """
    record = saved_loop(model)
    if record is None or is_looped(model):
        return
    raise ValueError(
        f"The config of {type(model).__name__}, or that of the base model that its adapters name, says that its layers "
        f"were looped when it was saved, {record}; loading does not loop them. After loading write model = "
        "captum_sdi.models.loop_layers(model), which repeats them as the config says, or del "
        f"model.config.{LOOP_KEY} to take the model as it is."
    )


def is_looped(model: nn.Module) -> bool:
    """Say whether `captum_sdi.models.loop_layers` has looped a model, or one inside it."""
    return any("_loop" in vars(module) for module in model.modules())

"""Loading a checkpoint into a model, in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_sdi.checkpoints.adapters import adapter_name, check_adapter, load_adapter
from captum_sdi.checkpoints.checkpoint import Checkpoint
from captum_sdi.checkpoints.files import ADAPTER_FILES, weights_file
from captum_sdi.checkpoints.rates import effective_rate, learning_rate
from captum_sdi.checkpoints.reading import LIGHTNING_KEY, StateDict, read_weights
from captum_sdi.checkpoints.whole import fitting_weights, lightning_weights, load_whole, named_tensors


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> float:
    """Load a checkpoint into ``model``, in place, and return its learning rate.

    What it reads:

    * folders of the Hugging Face ``Trainer`` and of ``save_pretrained``: safetensors or ``pytorch_model.bin``, in one
      file or sharded, and adapters for a ``peft.PeftModel``;
    * ``.safetensors`` files, with ``learning_rate`` in their metadata if they have it;
    * files of ``torch.save``: a state dict, alone or under ``model_state_dict``, ``state_dict`` or ``model``, with
      ``learning_rate``, ``lr`` or an optimizer's state dict (``optimizer``, ``optimizer_state_dict``) beside it. An
      optimizer saved *after* ``scheduler.step()`` holds the next step's rate, so prefer ``learning_rate``;
    * Lightning's ``*.ckpt``, if one prefix alone tells the model's weights from the LightningModule's others.

    The prefixes ``module.`` and ``_orig_mod.`` may be on either side, a tied weight may be stored under one of its
    names only, and values are cast to the model's dtype.

    The learning rate of a Trainer folder is the one logged at its step. At an unlogged step it is interpolated between
    the nearest logged ones; the later of them stands in the log of a later checkpoint of the same run.

    Returns:
        The learning rate; 1.0, with a warning, where the checkpoint holds none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the path is missing, unreadable, or sharded by FSDP or DeepSpeed; if keys or shapes differ from
            the model's; if the learning rate is negative or not finite; or if the model is on the meta device. The
            model is then unchanged.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step-1.pt")
        ...     torch.save({"model_state_dict": model.state_dict(), "learning_rate": 0.1}, path)
        ...     load_checkpoint(model, path)
        0.1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    model = unwrapped(model)
    file, state, rate = opened(model, path)
    if file.name in ADAPTER_FILES:
        load_adapter(model, state, file)
    else:
        load_whole(model, state, file)
    return effective_rate(rate, Path(os.fsdecode(path)))


def check_checkpoints(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> None:
    """Check that `load_checkpoint` can load every one of several checkpoints, before hours are spent on the first.

    Headers, keys, shapes and learning rates are read, and no weights: pickles are mapped into memory, unless torch
    wrote them in its format of before 2020.

    Raises:
        TypeError: If a checkpoint is no path.
        ValueError: If `load_checkpoint` would refuse one.
    """
    if len(checkpoints) == 1:
        return  # it is loaded before anything else is done
    model = unwrapped(model)
    for checkpoint in checkpoints:
        with warnings.catch_warnings(action="ignore"):  # what there is to say of a rate is said when it is used
            file, state, _ = opened(model, checkpoint.source, headers=True)
        if file.name in ADAPTER_FILES:
            check_adapter(model, state, file)
        else:
            fitting_weights(model, state, file)


def opened(
    model: nn.Module, path: str | os.PathLike[str], *, headers: bool = False
) -> tuple[Path, StateDict, float | None]:
    """Find and read a checkpoint's file, its weights (or the headers alone) and its learning rate."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"load_checkpoint takes the path of a file or folder, got {type(path).__name__}. "
            "Pass checkpoints_load_func to load checkpoints of another kind."
        )
    check_writable(model)
    source = Path(os.fsdecode(path))
    file = weights_file(source, adapter_name(model))
    state, metadata = read_weights(file, headers=headers)
    if LIGHTNING_KEY in metadata:
        state = lightning_weights(model, state, file)
    return file, state, learning_rate(metadata, source, file)


def unwrapped(model: nn.Module) -> nn.Module:
    """Take off DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        original = model._modules.get("_orig_mod")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(original, nn.Module):
            model = original
        else:
            return model


def check_writable(model: nn.Module) -> None:
    """Check that weights can be copied into every tensor of the model, before the first one is."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' of the model is on the meta device, so there is nothing to load weights into. Give the "
                "model memory first, e.g. model.to_empty(device='cpu'), or build it with from_pretrained and without "
                "offloading."
            )
        entries_share_memory = any(s == 0 and n > 1 for s, n in zip(strides(tensor), tensor.shape, strict=True))
        if entries_share_memory or (tensor.is_inference() and not torch.is_inference_mode_enabled()):
            cause = "entries that share memory (expand)" if entries_share_memory else "been made in inference mode"
            raise ValueError(
                f"'{name}' of the model has {cause}, so nothing can be loaded into it. Nothing was loaded. Replace it "
                "by its clone() first, or build the model outside torch.inference_mode()."
            )


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's strides; 1s where its layout (sparse) has none."""
    return tensor.stride() if tensor.layout == torch.strided else (1,) * tensor.ndim

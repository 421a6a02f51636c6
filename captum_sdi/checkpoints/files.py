"""Which file of a checkpoint folder holds the weights."""

from __future__ import annotations

import re
from pathlib import Path

WHOLE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# In the order in which they are looked for: whole models before adapters, safetensors before pickles.
WEIGHT_FILES = WHOLE_FILES + ADAPTER_FILES
TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")
# What trainers leave beside their checkpoints.
_OTHER_FOLDERS = ("runs", "logs", "wandb", "lightning_logs", "tensorboard", "__pycache__")
_OTHER_FILES = re.compile(
    r".*\.(json|jsonl|txt|md|ya?ml|toml|csv|tsv|log|out|err|py|sh|html|ipynb|png|jpe?g|svg|pdf|jinja|model|lock|tmp|zip)"
    r"|.*\.tfevents\..*|.*\.unfinished|(training_args|optimizer|scheduler|sampler|scaler|random_states|rng_state)(_\d+)*\.(pt|pth|bin|pkl)"
)
_NAMES_IN_A_MESSAGE = 10


def weights_file(path: Path, adapter: str | None) -> Path:
    """Find the file of the weights (or their index) at a path; an adapter may have a subfolder."""
    if not path.exists():
        raise ValueError(f"There is no checkpoint at {path}: no such file or directory.")
    if path.is_file() and path.suffix != ".distcp":
        return path
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is neither a regular file nor a folder (a pipe, a device?), so it is no checkpoint.")
    folder = path if path.is_dir() else path.parent
    candidates = [folder / name for name in WEIGHT_FILES]
    if adapter is not None:
        candidates += [folder / adapter / name for name in WEIGHT_FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    command = conversion_command(folder)
    if command is not None:
        raise ValueError(
            f"{folder} holds weights sharded by FSDP or DeepSpeed, which must be merged before they can be read. "
            f"Run once:\n    {command}"
        )
    entries = sorted(entry.name for entry in folder.iterdir())
    listed = abbreviated(entries) or "nothing"
    raise ValueError(
        f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)} is in it, but {listed}. "
        "Pass a checkpoint folder or file; a folder of several checkpoints goes to checkpoints=."
    )


def may_be_weights(path: Path) -> bool:
    """Tell whether an entry of a folder can be a checkpoint, by its name; only a load function knows for certain."""
    if path.is_dir():
        return path.name not in _OTHER_FOLDERS
    return path.is_file() and not _OTHER_FILES.fullmatch(path.name)


def conversion_command(folder: Path) -> str | None:
    """Return the command that merges a folder's FSDP or DeepSpeed shards; None without shards."""
    shards = [*folder.glob("*.distcp"), *folder.glob("pytorch_model_fsdp*/*.distcp")]
    if shards:
        sharded = min(shards).parent
        merged = folder.parent if sharded == folder else folder
        return f"accelerate merge-weights {sharded} {merged}"
    for entry in sorted(folder.glob("pytorch_model_fsdp*")):
        if entry.is_dir():
            return f"accelerate merge-weights {entry} {folder}"
    top = folder.parent if folder.name.startswith("global_step") else folder
    if saved_by_deepspeed(top):
        return f"python {top / 'zero_to_fp32.py'} {top} {top} --safe_serialization"
    return None


def saved_by_deepspeed(folder: Path) -> bool:
    """Tell whether DeepSpeed saved a folder."""
    script = folder / "zero_to_fp32.py"
    states = folder.glob("global_step*/*_states.pt")
    if script.is_file() or any(states):
        return True
    # DeepSpeed's "latest" names its newest folder; other programs use the word for other things.
    latest = folder / "latest"
    return latest.is_file() and latest.read_bytes().startswith(b"global_step")


def abbreviated(names: list[str]) -> str:
    """List the first few names, and say how many more there are."""
    listed = ", ".join(names[:_NAMES_IN_A_MESSAGE])
    omitted = len(names) - _NAMES_IN_A_MESSAGE
    return f"{listed}, and {omitted} more" if omitted > 0 else listed

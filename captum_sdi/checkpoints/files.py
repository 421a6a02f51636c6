"""Which file of a checkpoint folder holds the weights."""

from __future__ import annotations

import re
from pathlib import Path

# In the order they are looked for: safetensors before pickles, whole models before adapters.
WHOLE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")
_LISTED = 10  # names per list in an error message


def weights_file(path: Path, adapter: str | None) -> Path:
    """Find the file that holds (or indexes) the weights at ``path``; peft has a folder per named adapter."""
    if not path.exists():
        raise ValueError(f"There is no checkpoint at {path}: no such file or directory.")
    if path.is_file() and path.suffix != ".distcp":
        return path
    folder = path if path.is_dir() else path.parent
    inside = [folder] if adapter is None else [folder, folder / adapter]
    for file in (d / name for d in inside for name in WHOLE_FILES + ADAPTER_FILES):
        if file.is_file():
            return file
    if command := conversion_command(folder):
        raise ValueError(
            f"{folder} holds weights sharded by FSDP or DeepSpeed, which must be merged before they can be read. "
            f"Run once:\n    {command}"
        )
    entries = some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise ValueError(
        f"{folder} holds no weights: none of {', '.join(WHOLE_FILES + ADAPTER_FILES)} is in it, but {entries}. "
        "Pass a checkpoint folder or file; a folder of several checkpoints goes to checkpoints=."
    )


def conversion_command(folder: Path) -> str | None:
    """Tell the command that merges the FSDP or DeepSpeed shards in a folder, None without any."""
    for shard in sorted([*folder.glob("*.distcp"), *folder.glob("pytorch_model_fsdp*/*.distcp")]):
        merged = folder.parent if shard.parent == folder else folder
        return f"accelerate merge-weights {shard.parent} {merged}"
    for entry in sorted(folder.glob("pytorch_model_fsdp*")):
        if entry.is_dir():
            return f"accelerate merge-weights {entry} {folder}"
    top = folder.parent if folder.name.startswith("global_step") else folder
    if _is_deepspeed(top):
        return f"python {top / 'zero_to_fp32.py'} {top} {top} --safe_serialization"
    return None


def _is_deepspeed(folder: Path) -> bool:
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*/*_states.pt")):
        return True
    # DeepSpeed's "latest" names its newest folder; other programs use the word for other things.
    latest = folder / "latest"
    return latest.is_file() and latest.read_bytes().startswith(b"global_step")


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more

"""Results as safetensors files: written whole, and read without believing them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from captum_sdi.whole_file import check_regular, followed, write_whole


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors to one file, whole or not at all, on the CPU and without pickle.

    Args:
        path: The file to write; an existing one is replaced, and a link stays one.
        tensors: By name.
        metadata: Kept beside them.

    Raises:
        FileNotFoundError: If its folder does not exist.
        ValueError: If the path is a folder, a pipe or a device.
    """
    target = followed(path)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, metadata=dict(metadata))
    write_whole(target, lambda unfinished: unfinished.write_bytes(content))


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    newest: str,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote.

    Args:
        path: The file.
        kind: The class whose ``save`` wrote it, as its metadata must say.
        newest: The newest version of its format that can be read.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        ValueError: If the file is of no such kind that can be read, or of a newer version.
    """
    name = os.fspath(path)
    check_regular(Path(name))
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise ValueError(f"{name} is not a saved {kind}: {error}. Pass a file written by {kind}.save.") from error
    version = metadata.get("version", "")
    is_newer = re.fullmatch("[0-9]{1,9}", version) is not None and int(version) > int(newest)
    if metadata.get("format") == f"captum_sdi.{kind}" and is_newer:
        raise ValueError(
            f"{name} was saved by a newer captum_sdi, in version {version} of the format; this one reads {newest}. "
            "Update captum_sdi."
        )
    return tensors, metadata

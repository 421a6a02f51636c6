"""The file of an `InfluenceMap`: tensors, and beside them its axes, labels and tokens as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_sdi.schema import TEXT, Kind, check_fields, is_count, is_text, list_of, object_of, optional, parse_json
from captum_sdi.scores.files import read_tensors, write_tensors

KIND, NEWEST = "InfluenceMap", "1"
TENSORS = ("values", "indices", "errors")
LABEL = Kind("a string or a whole number", lambda label: is_text(label) or is_count(label))
WORDS = {
    "axes": list_of(TEXT),
    "labels": object_of(list_of(LABEL)),
    "test_tokens": optional(list_of(list_of(TEXT))),
    "train_tokens": object_of(list_of(TEXT)),
}


def write_map(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write the fields of a map to one file, whole or not at all."""
    tensors = {name: fields[name] for name in TENSORS if fields[name] is not None}
    words = {name: fields[name] for name in WORDS}
    metadata = {"format": f"captum_sdi.{KIND}", "version": NEWEST, "words": json.dumps(words)}
    write_tensors(path, tensors, metadata)


def read_map(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the fields of a map.

    Returns:
        The arguments of `InfluenceMap`.

    Raises:
        ValueError: If the file holds something else, is damaged, or is of a newer version.
    """
    name = os.fspath(path)
    tensors, metadata = read_tensors(path, KIND, NEWEST)
    missing = {"values", "indices"} - set(tensors)
    unknown = set(tensors) - set(TENSORS)
    if metadata.get("format") != f"captum_sdi.{KIND}" or missing or unknown:
        raise ValueError(
            f"{name} is not a saved {KIND}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}, format "
            f"{metadata.get('format')!r}. Pass a file written by {KIND}.save."
        )
    try:
        words = parse_json(metadata.get("words", ""))
        check_fields(words, WORDS)
        train_tokens = {train_index(key): tuple(tokens) for key, tokens in words["train_tokens"].items()}
        check_numbers(tensors)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}.") from error
    test_tokens = words["test_tokens"]
    return {
        **tensors,
        "axes": tuple(words["axes"]),
        "labels": {axis: tuple(labels) for axis, labels in words["labels"].items()},
        "test_tokens": None if test_tokens is None else tuple(map(tuple, test_tokens)),
        "train_tokens": train_tokens,
    }


def train_index(key: str) -> int:
    """Return the train example that a key of the file names.

    Raises:
        ValueError: If it names none.
    """
    if not (key.isascii() and key.isdigit() and len(key) < 16):
        raise ValueError(f"train_tokens must be under train indices, not {key!r}")
    return int(key)


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Check that indices are positions, and everything else floating point.

    Raises:
        ValueError: If not.
    """
    indices = tensors["indices"]
    if indices.dtype != torch.long or (indices.numel() and int(indices.min()) < 0):
        raise ValueError("indices must be whole numbers of at least 0")
    for name in ("values", "errors"):
        if name in tensors and not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensors[name].dtype}")

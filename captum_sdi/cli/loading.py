"""From a recipe to what it names: the model, the tokenizer, the examples and the `SDIInfluence`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_sdi.checkpoints import find_checkpoints
from captum_sdi.cli.recipe import Recipe
from captum_sdi.cli.rows import Encoder
from captum_sdi.influence import SDIInfluence
from captum_sdi.models import loop_layers  # and registers the looped GPT with AutoModelForCausalLM
from captum_sdi.sketch.tensor_sketch import TensorSketch

ADAPTER = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER)
"""One of them is in every model's folder."""


def load_model(recipe: Recipe, device: str) -> Any:
    """The model, looped where the recipe says so.

    Args:
        recipe: What to load.
        device: Where to, or auto.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: There is no such model or device, or the layers cannot be looped.
    """
    place, dtype = _device(device), recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    _check_place(recipe.model, "--model")
    try:
        model = _model_or_adapter(recipe, dtype)
    except OSError as error:
        unless = "" if os.path.exists(recipe.model) else " is no folder, and the Hub does not give it"
        raise ValueError(f"--model {recipe.model}{unless}: {error}") from error
    return model.to(place).eval()


def load_encoder(recipe: Recipe, model: Any) -> Encoder:
    """What makes the model's inputs of the lines of a file.

    Args:
        recipe: Names the tokenizer, and says how it is used.
        model: Says which tokens it knows, and how many of them it takes.

    Returns:
        The encoder; without a tokenizer where there is none, which is an error only for lines that need one.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    return Encoder(
        vocab_size=model.get_input_embeddings().num_embeddings,
        tokenizer=_tokenizer(recipe),
        max_length=recipe.max_length or longest,
        special_tokens=recipe.special_tokens,
    )


def attribution(recipe: Recipe, model: Any, train: Any, index: Path | None, n_loops: int | None = None) -> SDIInfluence:
    """The object that does the work.

    Args:
        recipe: Its settings.
        model: The model.
        train: The training examples.
        index: The index's folder; None for none.
        n_loops: Loop steps on the test side; None: as on the training side.

    Returns:
        It, before anything is computed.
    """
    depth, test_depth = ({"n_loops": n} if n is not None else None for n in (recipe.n_loops, n_loops))
    layers: Any = {"loop": "loop", "all": None}.get(" ".join(recipe.layers), list(recipe.layers))
    return SDIInfluence(
        model,
        train,
        recipe.checkpoints and list(recipe.checkpoints),
        layers=layers,
        batch_size=recipe.batch_size,
        loop=recipe.loop,
        sketch=TensorSketch(recipe.dim, recipe.seed, recipe.pool),
        forward_kwargs=depth,
        test_forward_kwargs=test_depth,
        activation_checkpointing=recipe.activation_checkpointing,
        index=index,
        index_dtype=None if recipe.index_dtype is None else getattr(torch, recipe.index_dtype),
    )


def resolved_checkpoints(recipe: Recipe) -> tuple[str, ...] | None:
    """The checkpoints one by one, so that those a run adds later are not taken for the index's.

    Args:
        recipe: Names them, or a folder of them.

    Returns:
        Their paths; None for the model's own weights.

    Raises:
        ValueError: One of them is not there.
    """
    if recipe.checkpoints is None:
        return None
    for path in recipe.checkpoints:
        if not os.path.exists(path):
            raise ValueError(f"There is no checkpoint at {path}; say with --checkpoints where it is.")
    found = find_checkpoints(recipe.checkpoints[0] if len(recipe.checkpoints) == 1 else list(recipe.checkpoints))
    return tuple(map(os.path.abspath, found))


def _model_or_adapter(recipe: Recipe, dtype: Any) -> Any:
    adapter = (Path(recipe.model) / ADAPTER).is_file()
    if adapter:
        from peft import PeftConfig, PeftModel  # optional: only adapters need it
    place = PeftConfig.from_pretrained(recipe.model).base_model_name_or_path if adapter else recipe.model
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    if recipe.loop_layers is not None:
        model = loop_layers(model, *recipe.loop_layers, damping=recipe.damping)
    return PeftModel.from_pretrained(model, recipe.model, is_trainable=True) if adapter else model


def _device(name: str) -> torch.device:
    if name == "auto":  # one GPU for each process of a launch
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_place(model: str, option: str) -> None:
    """What a path that is no model's folder should have been."""
    folder = Path(model)
    if not folder.exists():
        if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
            raise ValueError(f"There is no folder {model}; say with {option} where the model is.")
        return
    if any((folder / name).is_file() for name in CONFIGS):
        return
    steps = sorted(
        (file for name in CONFIGS for file in folder.glob(f"checkpoint-*/{name}")),
        key=lambda file: len(file.parent.name),
    )
    advice = f" It holds checkpoints: --model {steps[-1].parent} --checkpoints {model}." if steps else ""
    raise ValueError(f"{model} is no model's folder: there is no {CONFIGS[0]} in it.{advice}")


def _tokenizer(recipe: Recipe) -> Any:
    """The tokenizer; None where the model's folder has none and none was named."""
    folder = Path(recipe.model)
    files = ("tokenizer*", "vocab*", "*.model")
    if recipe.tokenizer is None and folder.is_dir() and not any(any(folder.glob(file)) for file in files):
        return None
    return AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model, trust_remote_code=recipe.trust_remote_code)

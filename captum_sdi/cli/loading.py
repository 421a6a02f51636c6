"""From a recipe to what it names: the model, the tokenizer, the checkpoints and the `SDIInfluence`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from captum_sdi.checkpoints import find_checkpoints
from captum_sdi.cli.places import check_name
from captum_sdi.cli.recipe import Recipe
from captum_sdi.data.encoder import Encoder
from captum_sdi.influence import SDIInfluence
from captum_sdi.model_facts import saved_loop
from captum_sdi.models import loop_layers  # and registers the looped GPT with AutoModelForCausalLM
from captum_sdi.preconditioners import Adam, Fisher, Hessian, Preconditioner
from captum_sdi.sketch.tensor_sketch import TensorSketch

ADAPTER = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER)
"""One of them is in every model's folder."""
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
"""One of them is in every tokenizer's folder."""


class ShellInfluence(SDIInfluence):
    """`SDIInfluence` whose progress bars need not say whose they are: the shell shows no others."""

    @classmethod
    def get_name(cls) -> str:
        """Return no name."""
        return ""


def load_model(recipe: Recipe, device_name: str, *, quiet: bool) -> Any:
    """Load the model, looped where the recipe says so, in evaluation mode."""
    if quiet:
        disable_progress_bar()  # transformers has one for loading weights
    device = usable_device(device_name)
    check_model_folder(recipe.model)
    try:
        model = load_looped_model(recipe)
    except OSError as error:
        unless_folder = "" if os.path.exists(recipe.model) else " is no folder, and the Hub does not give it"
        raise ValueError(f"--model {recipe.model}{unless_folder}: {error}") from error
    return model.to(device).eval()


def load_looped_model(recipe: Recipe) -> Any:
    """Load the model, or the adapters and the model below them, and loop its layers on request."""
    is_adapter = (Path(recipe.model) / ADAPTER).is_file()
    base = recipe.model
    if is_adapter:
        from peft import PeftConfig, PeftModel  # optional: only adapters need it

        base = PeftConfig.from_pretrained(recipe.model).base_model_name_or_path
        check_name("--model", base)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=named_dtype(recipe.dtype), trust_remote_code=recipe.trust_remote_code
    )
    if recipe.loop_layers is not None:
        model = loop_layers(
            model,
            *recipe.loop_layers,
            damping=recipe.damping,
            mode=recipe.loop_mode,
            anchor=recipe.anchor,
        )
    elif saved_loop(model) is not None:
        model = loop_layers(model)
    if is_adapter:
        model = PeftModel.from_pretrained(model, recipe.model, is_trainable=True)
    return model


def load_encoder(recipe: Recipe, model: Any) -> Encoder:
    """Return the encoder of lines; without a tokenizer, it takes only token ids."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return Encoder(
        vocab_size=model.get_input_embeddings().weight.shape[0],  # adapters on it have no num_embeddings
        tokenizer=load_tokenizer(recipe),
        max_length=recipe.max_length or longest,
        special_tokens=recipe.special_tokens,
    )


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer; None where none was named and the model's folder has none."""
    folder = Path(recipe.model)
    if recipe.tokenizer is None and folder.is_dir():
        has_tokenizer = any(next(folder.glob(pattern), None) for pattern in TOKENIZERS)
        if not has_tokenizer:
            return None
    return AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model, trust_remote_code=recipe.trust_remote_code)


def build_influence(
    recipe: Recipe,
    model: Any,
    train: Any,
    index: Path | None,
    n_loops: int | None = None,
    preconditioner: Preconditioner | None = None,
    normalize: Literal["train", "both"] | None = None,
) -> SDIInfluence:
    """Return the `SDIInfluence` of a recipe; `n_loops` sets the depth of the test side alone."""
    layers: Any = list(recipe.layers)
    if layers == ["loop"]:
        layers = "loop"
    elif layers == ["all"]:
        layers = None
    return ShellInfluence(
        model,
        train,
        None if recipe.checkpoints is None else list(recipe.checkpoints),
        layers=layers,
        batch_size=recipe.batch_size,
        loop=recipe.loop,
        sketch=TensorSketch(recipe.dim, recipe.seed, pool=recipe.pool),
        forward_kwargs=depth_kwargs(recipe.n_loops),
        test_forward_kwargs=depth_kwargs(n_loops),
        activation_checkpointing=recipe.activation_checkpointing,
        index=index,
        index_dtype=None if recipe.index_dtype is None else named_dtype(recipe.index_dtype),
        preconditioner=preconditioner,
        normalize=normalize,
    )


def preconditioner_of(options: Namespace) -> Preconditioner | None:
    """Return the preconditioner that was typed.

    Raises:
        ValueError: If a number was typed that it does not have.
    """
    name = options.preconditioner
    numbers = {}
    if options.preconditioner_damping is not None:
        numbers["damping"] = options.preconditioner_damping
    if options.preconditioner_rank is not None:
        numbers["rank"] = options.preconditioner_rank
    known = {"fisher": {"damping"}, "hessian": {"damping", "rank"}}
    strange = sorted(numbers.keys() - known.get(name, set()))
    if strange:
        typed = "no --preconditioner" if name is None else f"--preconditioner {name}"
        raise ValueError(f"--preconditioner-{strange[0]} says nothing beside {typed}.")
    if name is None:
        return None
    kinds: dict[str, Any] = {"fisher": Fisher, "hessian": Hessian, "adam": Adam}
    return kinds[name](**numbers)


def resolve_checkpoints(recipe: Recipe) -> tuple[str, ...] | None:
    """Return the checkpoints one by one: a run that goes on adds none to those of the index."""
    if recipe.checkpoints is None:
        return None
    for path in recipe.checkpoints:
        if not os.path.exists(path):
            raise ValueError(f"There is no checkpoint at {path}; say with --checkpoints where it is.")
    folder_or_list = recipe.checkpoints[0] if len(recipe.checkpoints) == 1 else list(recipe.checkpoints)
    checkpoints = find_checkpoints(folder_or_list)
    return tuple(os.path.abspath(checkpoint) for checkpoint in checkpoints)


def usable_device(name: str) -> torch.device:
    """Return the device of that name, after a tensor was put there."""
    if name == "auto":  # one GPU for each process of a launch
        local_rank = os.environ.get("LOCAL_RANK", 0)
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {first_line}") from error
    return device


def named_dtype(name: str) -> Any:
    """Return the dtype that torch calls so, or ``auto``, which transformers understands."""
    return name if name == "auto" else getattr(torch, name)


def depth_kwargs(n_loops: int | None) -> dict[str, int] | None:
    """Return the forward keywords that set a number of loop steps."""
    return None if n_loops is None else {"n_loops": n_loops}


def check_model_folder(model: str) -> None:
    """Check that a path is a model's folder; a name on the Hub passes."""
    folder = Path(model)
    if not folder.exists():
        check_name("--model", model)  # a recipe named it
        return
    if any((folder / name).is_file() for name in CONFIGS):
        return
    checkpoints: list[Path] = []
    for name in CONFIGS:
        checkpoints += [file.parent for file in folder.glob(f"checkpoint-*/{name}")]
    advice = ""
    if checkpoints:
        latest = max(checkpoints, key=lambda checkpoint: (len(checkpoint.name), checkpoint.name))  # 5, 10, 15
        advice = f" It holds checkpoints: --model {latest} --checkpoints {model}."
    raise ValueError(f"{model} is no model's folder: there is no {CONFIGS[0]} in it.{advice}")

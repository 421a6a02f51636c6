"""Looped models of Hugging Face, tiny, with weights far from initialisation, their data, and how each one loops.

`LAPS` times is every depth loop run unless the model has its own count. Names are spelled out here, by hand: neither
the loop nor the steps nor what is refused is asked of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from reference import aliased_gradients, next_token_loss, spread
from torch import Tensor, nn

from captum_sdi import LoopSpec
from captum_sdi.data.losses import TokenCrossEntropy

LAPS = 3
VOCAB = 13
MLM = TokenCrossEntropy(shift=False)


@dataclass(frozen=True, eq=False)
class Looped:
    """A looped model, and the truth about it."""

    name: str
    make: Callable[[], nn.Module]
    modules: tuple[str, ...]
    """What repeats."""
    anchors: tuple[str, ...]
    """Whose call starts a step."""
    n_steps: int
    beside: tuple[str, ...] = ()
    """Names of parameters that are used once more, beside the calls of their layer: the truth has only their sum."""
    causal: bool = True
    loss_fn: Any = None
    inputs: str = "input_ids"
    without_gradient: tuple[int, ...] = ()
    """Steps that the model runs under no_grad."""
    n_outputs: int = 0
    """Positions of every output, for a model that has its own."""
    container: str = ""
    """The name that stands for all modules in the loop's specification."""

    @property
    def loop(self) -> LoopSpec:
        """What `find_loop` must find, where every module has one name."""
        named = (self.container,) if self.container else ()
        return LoopSpec(named or self.modules, named or self.anchors)

    def loop_of(self, model: nn.Module) -> LoopSpec:
        """What `find_loop` must find: older transformers hold Zamba's transformer as one module with many names."""
        first = {name for name, _ in model.named_modules()}
        kept = ([name for name in names if name in first] for names in (self.loop.modules, self.loop.anchors))
        return LoopSpec(*kept)

    def model(self, dtype: torch.dtype = torch.float64, scale: float = 0.2) -> nn.Module:
        torch.manual_seed(0)
        return spread(self.make(), scale).to(dtype)

    def rows(self, n: int = 3, seed: int = 1, longest: int = 7) -> list[dict[str, Tensor]]:
        """Rows of mixed length; some positions are not predicted."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i in range(n):
            ids = torch.randint(1, VOCAB, (longest - 2 * (i % 3),), generator=generator)
            labels = ids.clone() if self.causal else torch.randint(1, VOCAB, ids.shape, generator=generator)
            labels[: 1 + i % 2] = -100
            if self.n_outputs:
                labels = torch.cat([labels, labels.new_full((self.n_outputs - len(labels),), -100)])
            made.append({self.inputs: ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        return made

    def truth(self, model: nn.Module, row: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """By parameter ``(2 + t, entries)``, of one example alone, without padding."""

        def loss(model: nn.Module) -> Tensor:
            output = model(**{self.inputs: row[self.inputs].unsqueeze(0)}, **_no_cache(model))
            return next_token_loss(output.logits[0], row["labels"], self.causal)

        first = {name for name, _ in model.named_modules()}
        modules, anchors = ([name for name in names if name in first] for names in (self.modules, self.anchors))
        return aliased_gradients(model, loss, names, modules, anchors)

    def sums(self, model: nn.Module, row: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """By parameter ``(entries,)``, the sum over all bins: an ordinary gradient."""
        output = model(**{self.inputs: row[self.inputs].unsqueeze(0)}, **_no_cache(model))
        parameters = [model.get_parameter(name) for name in names]
        grads = torch.autograd.grad(next_token_loss(output.logits[0], row["labels"], self.causal), parameters)
        return {name: grad.flatten() for name, grad in zip(names, grads, strict=True)}

    def in_loop(self, model: nn.Module) -> list[str]:
        """Names of the loop's trainable parameters."""
        inside = tuple(f"{name}." for name in self.modules)
        mine = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n.startswith(inside)}
        return [n for n, p in model.named_parameters() if id(p) in mine and p.requires_grad]

    def trainable(self, model: nn.Module) -> list[str]:
        """Names of all trainable parameters."""
        return [name for name, p in model.named_parameters() if p.requires_grad]


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def family(name: str) -> Any:
    """A class of transformers, or a skip where the installed version is too old to have it."""
    found = getattr(transformers, name, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found


# --- models that repeat some of their layers ---


def _repeated(layers: nn.ModuleList, start: int, stop: int) -> nn.ModuleList:
    """The same modules several times in the list that the model runs through."""
    laps = [layer for _ in range(LAPS) for layer in layers[start:stop]]
    return nn.ModuleList([*layers[:start], *laps, *layers[stop:]])


def gpt2() -> nn.Module:
    config = family("GPT2Config")(vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=4, n_head=2)
    model = family("GPT2LMHeadModel")(config)
    model.transformer.h = _repeated(model.transformer.h, 1, 3)
    config.n_layer = len(model.transformer.h)
    return model


_TINY = {
    "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16,
}  # fmt: skip


def _decoder(kind: str, **changes: Any) -> nn.Module:
    config = family(f"{kind}Config")(**{**_TINY, **changes})
    model = family(f"{kind}ForCausalLM")(config)
    model.model.layers = _repeated(model.model.layers, 1, 3)
    config.num_hidden_layers = len(model.model.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return model


class _KeywordsOnly(nn.Module):
    """Runs its layers several times and hands them everything by keyword."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(LAPS):
            for layer in self.layers:
                output = layer(hidden_states=hidden_states, **kwargs)
                hidden_states = output[0] if isinstance(output, tuple) else output
        return hidden_states


def llama() -> nn.Module:
    """Its layers are called with keywords only, inside a module that is called once."""
    config = family("LlamaConfig")(**_TINY, attention_bias=True, mlp_bias=True)
    model = family("LlamaForCausalLM")(config)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], _KeywordsOnly(layers[1:3]), layers[3]])
    config.num_hidden_layers = 3
    return model


# --- models that loop by themselves ---


def hrm_text(full: bool = False) -> nn.Module:
    settings = {key: value for key, value in _TINY.items() if key != "num_key_value_heads"}
    cycles = {"H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [3, 3] if full else None}
    config = family("HrmTextConfig")(**{**settings, **cycles, "num_hidden_layers": 1, "embedding_scale": 1.0})
    return family("HrmTextForCausalLM")(config)


def albert(groups: int, chunk: int) -> nn.Module:
    config = family("AlbertConfig")(
        vocab_size=VOCAB, embedding_size=6, hidden_size=8, num_hidden_layers=4, num_hidden_groups=groups,
        num_attention_heads=2, intermediate_size=12, inner_group_num=2 if groups == 2 else 1,
        max_position_embeddings=16, chunk_size_feed_forward=chunk,
    )  # fmt: skip
    return family("AlbertForMaskedLM")(config)


def zamba2() -> nn.Module:
    config = family("Zamba2Config")(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=7, intermediate_size=12, num_attention_heads=2,
        layers_block_type=["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
        num_mem_blocks=2, use_shared_attention_adapter=True, adapter_rank=3, mamba_d_state=4, n_mamba_heads=2,
        chunk_size=4, mamba_ngroups=1, max_position_embeddings=16, use_mem_rope=True,
    )  # fmt: skip
    return family("Zamba2ForCausalLM")(config)


def zamba() -> nn.Module:
    config = family("ZambaConfig")(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=6,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        intermediate_size=12, num_attention_heads=2, num_key_value_heads=2, mamba_d_state=4, mamba_dt_rank=2,
        n_mamba_heads=2, use_mamba_kernels=False, max_position_embeddings=16,
    )  # fmt: skip
    return family("ZambaForCausalLM")(config)


def perceiver() -> nn.Module:
    config = family("PerceiverConfig")(
        vocab_size=VOCAB, d_model=8, d_latents=8, num_latents=4, num_blocks=LAPS, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    return family("PerceiverForMaskedLM")(config)


ZOO = [
    Looped("gpt2", gpt2, ("transformer.h.1", "transformer.h.2"), ("transformer.h.1",), LAPS),
    Looped("llama", llama, ("model.layers.1.layers.0", "model.layers.1.layers.1"), ("model.layers.1.layers.0",), LAPS),
    Looped("qwen3", lambda: _decoder("Qwen3"), ("model.layers.1", "model.layers.2"), ("model.layers.1",), LAPS),
    Looped("gemma", lambda: _decoder("Gemma"), ("model.layers.1", "model.layers.2"), ("model.layers.1",), LAPS),
]

_HRM = ("model.L_module", "model.H_module")
ZOO += [
    Looped("hrm_text", hrm_text, _HRM, _HRM, 8, without_gradient=(0, 1, 4)),
    Looped("hrm_text, full", lambda: hrm_text(full=True), _HRM, _HRM, 8),
]

_GROUPS = tuple(f"albert.encoder.albert_layer_groups.{i}" for i in range(2))
ZOO += [
    Looped(
        f"albert, {groups} group(s), chunks of {chunk}",
        lambda groups=groups, chunk=chunk: albert(groups, chunk),  # type: ignore[misc]
        _GROUPS[:groups],
        _GROUPS[:groups],
        4,
        causal=False,
        loss_fn=MLM,
        container="albert.encoder.albert_layer_groups",
    )
    for groups in (1, 2)
    for chunk in (0, 1)
]

_SITES = tuple(f"model.layers.{i}.shared_transformer" for i in (1, 2, 4, 5, 6))
_ZAMBA_SITES = tuple(f"model.layers.{i}.shared_transf" for i in (2, 4, 5))
_SELF_ATTENDS = tuple(f"perceiver.encoder.self_attends.{i}" for i in range(2))
ZOO += [
    Looped("zamba2", zamba2, _SITES, _SITES, 5),
    Looped("zamba", zamba, _ZAMBA_SITES, _ZAMBA_SITES, 3),
    Looped(
        "perceiver",
        perceiver,
        _SELF_ATTENDS,
        _SELF_ATTENDS[:1],
        LAPS,
        beside=("perceiver.input_preprocessor.embeddings.weight",),
        causal=False,
        loss_fn=MLM,
        inputs="inputs",
        n_outputs=8,
    ),
]

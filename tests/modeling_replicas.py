"""Ouro and Huginn in small, with their names and order of calls; copied into folders as code that comes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH = 8


class OuroReplicaConfig(PretrainedConfig):
    model_type = "ouro"

    def __init__(self, vocab_size: int = 16, total_ut_steps: int = 4, **settings: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **settings})  # true by default in some versions
        self.vocab_size, self.total_ut_steps = vocab_size, total_ut_steps


class HuginnReplicaConfig(PretrainedConfig):
    model_type = "huginn_raven"

    def __init__(self, vocab_size: int = 16, n_embd: int = WIDTH, **settings: Any) -> None:
        super().__init__(**settings)
        self.vocab_size, self.n_embd = vocab_size, n_embd


class Mixer(nn.Module):
    """Each position reads the mean of those before it, and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, state: Tensor) -> Tensor:
        places = torch.arange(1, state.shape[1] + 1, device=state.device)
        return state + self.down(torch.tanh(self.up(state.cumsum(1) / places[:, None])))


class OuroReplica(PreTrainedModel):
    """A norm and an exit gate inside the loop; with labels, logits are an expectation over the exits."""

    config_class = OuroReplicaConfig
    _no_split_modules = ()

    def __init__(self, config: OuroReplicaConfig) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, WIDTH)
        self.model.layers = nn.ModuleList([Mixer(), Mixer()])
        self.model.norm, self.model.early_exit_gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        state, mixed, stay = self.model.embed_tokens(input_ids), 0.0, 1.0
        for _ in range(self.config.total_ut_steps):
            for layer in self.model.layers:
                state = layer(state)
            state = self.model.norm(state)
            leave = stay * torch.sigmoid(self.model.early_exit_gate(state))
            mixed, stay = mixed + leave * self.lm_head(state), stay - leave
        if labels is None:
            return CausalLMOutput(logits=self.lm_head(state))
        logits = mixed + stay * self.lm_head(state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class HuginnReplica(PreTrainedModel):
    """A random initial state, an adapter before the core, the first steps without gradient, a norm used twice."""

    config_class = HuginnReplicaConfig
    _no_split_modules = ()

    def __init__(self, config: HuginnReplicaConfig) -> None:
        super().__init__(config)
        parts = {"wte": nn.Embedding(config.vocab_size, WIDTH), "adapter": nn.Linear(2 * WIDTH, WIDTH)}
        blocks = {name: nn.ModuleList([Mixer()]) for name in ("prelude", "core_block", "coda")}
        self.transformer = nn.ModuleDict({**parts, **blocks, "ln_f": nn.RMSNorm(WIDTH)})
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_states: Tensor | None = None,
        num_steps: int | tuple[int, int] = 4,
    ) -> CausalLMOutput:
        parts = self.transformer
        embedded = parts["prelude"][0](parts["wte"](input_ids))
        state = torch.randn_like(embedded) if input_states is None else input_states
        dark, lit = num_steps if isinstance(num_steps, tuple) else (num_steps, 0)
        for step in range(dark + lit):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= dark):
                state = parts["core_block"][0](parts["adapter"](torch.cat([state, embedded], -1)))
        state = parts["coda"][0](parts["ln_f"](state))
        return CausalLMOutput(logits=self.lm_head(parts["ln_f"](state)))

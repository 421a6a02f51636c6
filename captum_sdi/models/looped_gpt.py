"""A looped (weight-tied) GPT: prelude blocks, one core applied `n_loops` times, coda blocks.

    inputs = prelude(wte(tokens) + wpe(positions))
    state  = state_init
    repeat n_loops times:  state = core(state, inputs)
    logits = lm_head(ln_f(coda(state)))

Shapes: `n` examples, `p` token positions, `e` model width, `h` heads, `v` vocabulary.

Every parameter belongs to an `nn.Linear`, `nn.LayerNorm` or `nn.Embedding` called with the example
axis in front, so that whatever reads gradients per example from such layers reads all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

INJECTIONS = ("concat", "add")
STATE_INITS = ("prelude", "zeros", "normal")

# What `self.loss_function` reads beside logits and labels.
LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index")


class LoopedGPTConfig(PretrainedConfig):
    """Settings of a `LoopedGPTForCausalLM`; the defaults are the 135M model of arXiv 2602.10097.

    With `n_prelude=0, n_coda=0, n_loops=1, injection="add", state_init="zeros"` the model is an
    ordinary GPT-2 of `n_core` layers: the core sees `0 + inputs` once, and nothing else happens.
    """

    model_type = "looped_gpt"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 128,
        n_embd: int = 768,
        n_head: int = 12,
        n_prelude: int = 2,
        n_core: int = 4,
        n_coda: int = 2,
        n_loops: int = 32,
        injection: str = "concat",
        state_init: str = "prelude",
        is_causal: bool = True,
        bias: bool = False,
        initializer_range: float = 0.02,
        layer_norm_epsilon: float = 1e-5,
        tie_word_embeddings: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        """Check and keep the settings.

        Args:
            vocab_size: Number of token ids.
            n_positions: Longest sequence, padding included.
            n_embd: Width of the model.
            n_head: Attention heads; must divide `n_embd`.
            n_prelude: Blocks before the loop.
            n_core: Blocks inside the loop.
            n_coda: Blocks after the loop.
            n_loops: How often the core runs; `forward` and `generate` can override it per call.
            injection: How the core mixes state and inputs: "concat" (a linear layer) or "add".
            state_init: The state before the first loop: "prelude" (the prelude's output), "zeros",
                or "normal" (noise of standard deviation `initializer_range`; fresh at every call in
                training mode, always the same in evaluation mode).
            is_causal: Whether a token sees only earlier ones. Only then are labels shifted.
            bias: Whether linear layers other than the head have biases; layer norms always do.
            initializer_range: Standard deviation of the initial weights. Narrow models need more
                than GPT-2's 0.02: of width 64, parity was learnt from 0.1 and not from 0.02.
            layer_norm_epsilon: Added to the variance in layer norms.
            tie_word_embeddings: Whether the head shares the token embedding's matrix.
            use_cache: Must stay False: there is no key-value cache.
            **kwargs: Settings common to all transformers configurations, such as `pad_token_id`.

        Raises:
            ValueError: If a setting is unknown, impossible, or contradicts another one.
        """
        # transformers keeps unknown keywords as attributes: a slip would be ignored silently.
        for name in kwargs:
            if name.startswith("n_"):
                known = ", ".join(sorted(k for k in _SETTINGS if k.startswith("n_")))
                raise ValueError(f"{name}={kwargs[name]!r} is no setting of LoopedGPTConfig; use one of {known}.")
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_head = n_head
        self.n_prelude = n_prelude
        self.n_core = n_core
        self.n_coda = n_coda
        self.n_loops = n_loops
        self.injection = injection
        self.state_init = state_init
        self.is_causal = is_causal
        self.bias = bias
        self.initializer_range = initializer_range
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings  # transformers 4 has a default of its own
        _check_config(self)

    @property
    def num_hidden_layers(self) -> int:
        """Number of different blocks; transformers reads it when it sizes a cache."""
        return self.n_prelude + self.n_core + self.n_coda


_SETTINGS = LoopedGPTConfig.__init__.__annotations__.keys() - {"kwargs", "return"}


def _check_config(config: LoopedGPTConfig) -> None:
    """Raise ValueError if the settings describe no model."""
    for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_core", "n_loops"):
        _check_count(name, getattr(config, name), minimum=1)
    for name in ("n_prelude", "n_coda"):
        _check_count(name, getattr(config, name), minimum=0)
    for name, choices in (("injection", INJECTIONS), ("state_init", STATE_INITS)):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; use one of {choices}.")
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}; "
            "choose a number of heads that divides the width."
        )
    if config.use_cache:
        raise ValueError("use_cache=True: LoopedGPT has no key-value cache; leave it False.")


def _check_count(name: str, value: Any, minimum: int) -> None:
    # bool is an int, and True loops would pass for one.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.is_causal = config.is_causal
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the positions of `hidden` (n, p, e); `mask` as `_attention_pattern` returns it."""
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (n, h, p, e / h)
            for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.is_causal and mask is None
        )
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The two-layer network of a block, four times as wide inside."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position of `hidden` (n, p, e) alone."""
        return self.proj(F.gelu(self.fc(hidden), approximate="tanh"))  # tanh, as in GPT-2


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Map `hidden` (n, p, e) to the same shape."""
        hidden = hidden + self.attn(self.ln_1(hidden), mask)
        return hidden + self.mlp(self.ln_2(hidden))


class Core(nn.Module):
    """What repeats: one call is one loop step."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.adapter: nn.Linear | None = None
        if config.injection == "concat":
            self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias)
        self.blocks = _blocks(config, config.n_core)

    def forward(self, state: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next state; `state` and `inputs` are (n, p, e)."""
        if self.adapter is None:
            hidden = state + inputs
        else:
            hidden = self.adapter(torch.cat([state, inputs], dim=-1))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden


class LoopedGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """A looped GPT with a language-model head.

    Example:
        >>> import torch
        >>> config = LoopedGPTConfig(vocab_size=16, n_positions=8, n_embd=8, n_head=2, n_loops=3,
        ...                          n_prelude=0, n_core=1, n_coda=0)
        >>> model = LoopedGPTForCausalLM(config)
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> out = model(input_ids=tokens, labels=tokens)
        >>> out.logits.shape, out.loss.shape
        (torch.Size([1, 4, 16]), torch.Size([]))
        >>> deeper = model(input_ids=tokens, n_loops=12)
        >>> model.generate(tokens, max_new_tokens=2, do_sample=False, n_loops=12).shape
        torch.Size([1, 6])
    """

    config_class = LoopedGPTConfig
    config: LoopedGPTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _input_embed_layer = "wte"
    # A mapping is what transformers 5 wants; transformers 4 iterates over its keys.
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}

    def __init__(self, config: LoopedGPTConfig) -> None:
        """Build the model with random weights.

        Args:
            config: Its settings.

        Raises:
            ValueError: If settings changed since `config` was made describe no model.
        """
        super().__init__(config)
        # Once more: from_pretrained(folder, n_loops=0) sets attributes after the config was made.
        _check_config(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.prelude = _blocks(config, config.n_prelude)
        self.core = Core(config)
        self.coda = _blocks(config, config.n_coda)
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        n_loops: int | None = None,
        initial_state: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Run the model.

        Args:
            input_ids: Token ids, (n, p).
            attention_mask: 1 at real tokens and 0 at padding, (n, p), padding on either side.
            position_ids: Positions, (n, p) or (p,); by default each row's real tokens count from 0.
            labels: Token ids to predict, (n, p), -100 where nothing is predicted. A causal model
                predicts the label of the next position, a bidirectional one that of the same. With
                left padding leave the first real token out: padding would predict it.
            n_loops: How often the core runs, in place of `config.n_loops`.
            initial_state: The state before the first loop, (n, p, e), if not `config.state_init`.
            use_cache: Accepted because transformers passes it; there is no cache.
            return_dict: False returns a tuple, `(loss, logits)` or `(logits,)`.
            **kwargs: `num_items_in_batch`, the number that divides the summed loss in place of this
                batch's own number of labels, and `ignore_index`.

        Returns:
            `loss` (a scalar, None without labels) and `logits` (n, p, v).

        Raises:
            ValueError: If an argument has an impossible value or shape.
        """
        n_loops = self.config.n_loops if n_loops is None else n_loops
        _check_count("n_loops", n_loops, minimum=1)
        _check_keywords(kwargs)
        self._check_inputs(input_ids, attention_mask, labels)
        position_ids = _positions(input_ids, attention_mask, position_ids)
        mask = _attention_pattern(attention_mask, self.config.is_causal)

        inputs = self.wte(input_ids) + self.wpe(position_ids)
        for block in self.prelude:
            inputs = block(inputs, mask)
        state = self._initial_state(initial_state, inputs, position_ids)
        for _ in range(n_loops):
            state = self.core(state, inputs, mask)
        for block in self.coda:
            state = block(state, mask)
        logits = self.lm_head(self.ln_f(state))

        loss = None if labels is None else self._loss(logits, labels, kwargs)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass the whole sequence to `forward` at every step of `generate`: there is no cache.

        Args:
            input_ids: Token ids so far, (n, p).
            *args: Unused.
            **kwargs: `attention_mask` and `n_loops` as in `forward`, and what a cache would need.

        Returns:
            The keywords of `forward`.

        Raises:
            ValueError: If the model cannot generate, or not with these arguments.
        """
        if not self.config.is_causal:
            raise ValueError("generate needs is_causal=True: this model sees later tokens too.")
        for name in ("initial_state", "labels"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be used in generate, where sequences grow; leave it out.")
        passed_on = {name: kwargs.get(name) for name in ("attention_mask", "n_loops")}
        return {"input_ids": input_ids, **passed_on}

    def _check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (examples, positions).")
        if input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} positions, more than n_positions="
                f"{self.config.n_positions}; shorten the sequences or raise n_positions."
            )
        for name, value in (("attention_mask", attention_mask), ("labels", labels)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; it must be that of input_ids, {tuple(input_ids.shape)}."
                )

    def _initial_state(self, initial_state: Tensor | None, inputs: Tensor, position_ids: Tensor) -> Tensor:
        if initial_state is not None:
            if initial_state.shape != inputs.shape:
                raise ValueError(
                    f"initial_state has shape {tuple(initial_state.shape)}; it must be (examples, "
                    f"positions, n_embd) = {tuple(inputs.shape)}."
                )
            return initial_state.to(inputs)
        if self.config.state_init == "prelude":
            return inputs
        if self.config.state_init == "zeros":
            return torch.zeros_like(inputs)
        if self.training:
            return torch.randn_like(inputs) * self.config.initializer_range
        # One draw for every example, looked up by position: fresh noise would make an example's
        # logits, and so its influence, depend on the batch it is in and on how it is padded.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.config.n_positions, self.config.n_embd, generator=generator)
        return noise.to(inputs)[position_ids] * self.config.initializer_range

    def _loss(self, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> torch.FloatTensor:
        # transformers' causal loss shifts the labels unless it is handed shifted ones.
        shift_labels = None if self.config.is_causal else labels
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            shift_labels=shift_labels,
            **kwargs,
        )


def _attention_pattern(attention_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Return which positions see which: boolean, (n, 1, p, p), True = seen.

    None when no token is padding, because attention is faster without a mask. A padding position
    sees itself, so that no row of the softmax is empty: an empty one is NaN on some backends.
    """
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    real = attention_mask != 0  # (n, p)
    length = real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=real.device)
    if is_causal:
        seen = seen.tril()
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    return (seen & real[:, None, None, :]) | itself


def _blocks(config: LoopedGPTConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(config) for _ in range(count))


def _positions(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Return positions (n, p), never (1, p): `wpe` must keep the example axis."""
    if position_ids is not None:
        return position_ids.expand_as(input_ids)
    if attention_mask is not None:
        return ((attention_mask != 0).cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _check_keywords(kwargs: dict[str, Any]) -> None:
    """Refuse keywords that ask for something and would be ignored, like a misspelt `n_loop=4`."""
    for name, value in kwargs.items():
        # Wrappers such as PEFT pass what they do not need as None or False.
        if name not in LOSS_KEYWORDS and value is not None and value is not False:
            raise ValueError(f"{name} is no argument of LoopedGPTForCausalLM.forward; leave it out.")


AutoConfig.register(LoopedGPTConfig.model_type, LoopedGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopedGPTConfig, LoopedGPTForCausalLM, exist_ok=True)

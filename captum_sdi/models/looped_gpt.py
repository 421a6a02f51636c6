"""A looped (weight-tied) GPT: prelude blocks, one core applied `n_loops` times, coda blocks.

    inputs = prelude(wte(tokens) + wpe(positions))          without wpe where has_positions=False
    state  = state_init
    repeat n_loops times:  state = core(state, inputs)      where examples differ, each keeps its last state
    logits = lm_head(ln_f(coda(state)))

With `feedback="tokens"` the state is handed on from one loop step to the next as soft tokens:

    state  = prelude(wte(softmax(lm_head(ln_f(coda(state))))) + wpe(positions))

Shapes: `n` examples, `p` token positions, `e` model width, `v` vocabulary.

Every parameter belongs to an `nn.Linear`, `nn.LayerNorm` or `nn.Embedding` called with the example
axis in front, so that whatever reads gradients per example from such layers reads all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from captum_sdi.models.looped_gpt_config import LoopedGPTConfig, check_config, check_count
from captum_sdi.models.looped_gpt_layers import Core, SoftEmbedding, attention_pattern, stack_blocks

LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index")
"""The keywords that `self.loss_function` reads beside logits and labels."""


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
    # transformers 5 wants a mapping; transformers 4 iterates over its keys.
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}

    def __init__(self, config: LoopedGPTConfig) -> None:
        """Build the model with random weights.

        Raises:
            ValueError: If settings changed since `config` was made describe no model.
        """
        super().__init__(config)
        # Once more: from_pretrained(folder, n_loops=0) sets attributes after the config was made.
        check_config(config)
        token_embedding = SoftEmbedding if config.feedback == "tokens" else nn.Embedding
        self.wte = token_embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.has_positions else None
        self.prelude = stack_blocks(config, config.n_prelude)
        self.core = Core(config)
        self.coda = stack_blocks(config, config.n_coda)
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        n_loops: int | Tensor | None = None,
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
            n_loops: How often the core runs, in place of `config.n_loops`; or (n,), how often for each
                example, whose state no longer changes after its last loop.
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
        if n_loops is None:
            n_loops = self.config.n_loops
        check_keywords(kwargs)
        check_input_ids(input_ids, self.config.n_positions)
        check_loops(n_loops, len(input_ids))
        check_same_shape("attention_mask", attention_mask, input_ids)
        check_same_shape("labels", labels, input_ids)
        position_ids = token_positions(input_ids, attention_mask, position_ids)
        mask = attention_pattern(attention_mask, is_causal=self.config.is_causal)

        inputs = self.read_in(input_ids, position_ids, mask)
        state = self._initial_state(initial_state, inputs, position_ids)
        state = self._looped(state, inputs, position_ids, mask, n_loops)
        logits = self.read_out(state, mask)

        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def read_in(self, tokens: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Embed token ids (n, p), or probabilities (n, p, v), and run the prelude: (n, p, e)."""
        hidden = self.wte(tokens)
        if self.wpe is not None:
            hidden = hidden + self.wpe(position_ids)
        for block in self.prelude:
            hidden = block(hidden, mask)
        return hidden

    def read_out(self, state: Tensor, mask: Tensor | None) -> Tensor:
        """Run coda and head on a state (n, p, e): logits (n, p, v)."""
        for block in self.coda:
            state = block(state, mask)
        return self.lm_head(self.ln_f(state))

    def _looped(
        self,
        state: Tensor,
        inputs: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        n_loops: int | Tensor,
    ) -> Tensor:
        """Return each example's state after its last loop, (n, p, e)."""
        most_loops = int(n_loops.max()) if isinstance(n_loops, Tensor) else n_loops
        for step in range(most_loops):
            if step > 0 and self.config.feedback == "tokens":
                soft_tokens = self.read_out(state, mask).softmax(-1)
                state = self.read_in(soft_tokens, position_ids, mask)
            new_state = self.core(state, inputs, mask)
            if isinstance(n_loops, Tensor):
                runs = (step < n_loops).to(state.device)
                new_state = torch.where(runs[:, None, None], new_state, state)
            state = new_state
        return state

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass the whole sequence to `forward` at every step of `generate`: there is no cache.

        Returns:
            The keywords of `forward`: the token ids so far, (n, p), `attention_mask` and `n_loops`.

        Raises:
            ValueError: If the model cannot generate, or not with these arguments.
        """
        if not self.config.is_causal:
            raise ValueError("generate needs is_causal=True: this model sees later tokens too.")
        for name in ("initial_state", "labels"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be used in generate, where sequences grow; leave it out.")
        return {
            "input_ids": input_ids,
            "attention_mask": kwargs.get("attention_mask"),
            "n_loops": kwargs.get("n_loops"),
        }

    def _initial_state(
        self,
        initial_state: Tensor | None,
        inputs: Tensor,
        position_ids: Tensor,
    ) -> Tensor:
        if initial_state is None:
            return self._default_state(inputs, position_ids)
        check_initial_state(initial_state, inputs)
        return initial_state.to(inputs)

    def _default_state(self, inputs: Tensor, position_ids: Tensor) -> Tensor:
        """Return the state before the first loop, (n, p, e), that `config.state_init` names."""
        config = self.config
        if config.state_init == "prelude":
            return inputs
        if config.state_init == "zeros":
            return torch.zeros_like(inputs)
        if self.training:
            return torch.randn_like(inputs) * config.initializer_range
        # One draw for every example, looked up by position: fresh noise would make an example's
        # logits, and so its influence, depend on the batch it is in and on how it is padded.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(config.n_positions, config.n_embd, generator=generator)
        return noise.to(inputs)[position_ids] * config.initializer_range

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> torch.FloatTensor:
        # transformers' causal loss shifts the labels unless it is handed shifted ones.
        shift_labels = None if self.config.is_causal else labels
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            shift_labels=shift_labels,
            **kwargs,
        )


def token_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Return positions (n, p), never (1, p): `wpe` must keep the example axis."""
    if position_ids is not None:
        return position_ids.expand_as(input_ids)
    if attention_mask is not None:
        tokens_so_far = (attention_mask != 0).cumsum(dim=1)
        return (tokens_so_far - 1).clamp(min=0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return positions.expand_as(input_ids)


def check_loops(n_loops: int | Tensor, n_examples: int) -> None:
    """Raise ValueError unless `n_loops` is a count of at least 1, or one for each example."""
    if not isinstance(n_loops, Tensor):
        check_count("n_loops", n_loops, minimum=1)
        return
    is_integer = not n_loops.is_floating_point() and n_loops.dtype != torch.bool
    if n_loops.shape != (n_examples,) or not is_integer or bool((n_loops < 1).any()):
        raise ValueError(
            f"n_loops must be an integer of at least 1, or a tensor of {n_examples} of them, one for each example; got "
            f"{n_loops.dtype} of shape {tuple(n_loops.shape)}."
        )


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Refuse keywords that ask for something and would be ignored, like a misspelt `n_loop=4`."""
    for name, value in kwargs.items():
        # Wrappers such as PEFT pass the keywords that they do not need as None or False.
        if name not in LOSS_KEYWORDS and value is not None and value is not False:
            raise ValueError(f"{name} is no argument of LoopedGPTForCausalLM.forward; leave it out.")


def check_input_ids(input_ids: Tensor, n_positions: int) -> None:
    """Raise ValueError unless `input_ids` is (n, p) with at most `n_positions` positions."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (examples, positions).")
    length = input_ids.shape[1]
    if length > n_positions:
        raise ValueError(
            f"input_ids has {length} positions, more than n_positions={n_positions}; "
            "shorten the sequences or raise n_positions."
        )


def check_same_shape(name: str, value: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError naming the argument unless it is None or shaped like `input_ids`."""
    if value is not None and value.shape != input_ids.shape:
        shape = tuple(value.shape)
        expected = tuple(input_ids.shape)
        raise ValueError(f"{name} has shape {shape}; it must be that of input_ids, {expected}.")


def check_initial_state(initial_state: Tensor, inputs: Tensor) -> None:
    """Raise ValueError unless `initial_state` is shaped like the core's `inputs`, (n, p, e)."""
    if initial_state.shape != inputs.shape:
        shape = tuple(initial_state.shape)
        expected = tuple(inputs.shape)
        raise ValueError(f"initial_state has shape {shape}; it must be (examples, positions, n_embd) = {expected}.")


AutoConfig.register(LoopedGPTConfig.model_type, LoopedGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopedGPTConfig, LoopedGPTForCausalLM, exist_ok=True)

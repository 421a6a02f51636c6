"""The settings of a looped GPT, checked when they are made."""

from typing import Any

from transformers import PretrainedConfig

from captum_sdi.words import is_integer

INJECTIONS = ("concat", "add", "none")
FEEDBACKS = ("state", "tokens")
STATE_INITS = ("prelude", "zeros", "normal")

POSITIVE_COUNTS = ("vocab_size", "n_positions", "n_embd", "n_head", "n_core", "n_loops")
OPTIONAL_COUNTS = ("n_prelude", "n_coda")


class LoopedGPTConfig(PretrainedConfig):
    """Settings of a `LoopedGPTForCausalLM`; the defaults are the 135M model of arXiv 2602.10097.

    With `n_prelude=0, n_coda=0, n_loops=1, injection="add", state_init="zeros"` the model is an
    ordinary GPT-2 of `n_core` layers: the core sees `0 + inputs` once, and nothing else happens.

    The noise of `state_init="normal"` has the standard deviation `initializer_range`, fresh at every call in training
    mode and always the same in evaluation mode.

    With `feedback="tokens"` all of the model repeats: in the place of each token the next loop step reads what coda and
    head answered there, a distribution, embedded as tokens are. With `injection="none"` as well a step reads tokens and
    nothing else, so that a model trained at `n_loops=1` can be asked to go on from its own answers.
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
        feedback: str = "state",
        is_causal: bool = True,
        has_positions: bool = True,
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
            injection: How the core mixes state and inputs: "concat" (a linear layer), "add", "none" (state alone).
            state_init: The state before the first loop: "prelude" (its output), "zeros", or "normal" (noise).
            feedback: What a loop step hands on: its "state", or its answers as soft "tokens".
            is_causal: Whether a token sees only earlier ones. Only then are labels shifted.
            has_positions: Whether tokens know their positions; without, `n_positions` limits the length alone.
            bias: Whether linear layers other than the head have biases; layer norms always do.
            initializer_range: Standard deviation of the initial weights; narrow models need more than GPT-2's 0.02.
            layer_norm_epsilon: Added to the variance in layer norms.
            tie_word_embeddings: Whether the head shares the token embedding's matrix.
            use_cache: Must stay False: there is no key-value cache.
            **kwargs: Settings that all transformers configurations have, such as `pad_token_id`.

        Raises:
            ValueError: If a setting is unknown, impossible, or contradicts another one.
        """
        check_no_unknown_count(kwargs)
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
        self.feedback = feedback
        self.is_causal = is_causal
        self.has_positions = has_positions
        self.bias = bias
        self.initializer_range = initializer_range
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings  # transformers 4 has a default of its own
        check_config(self)

    @property
    def num_hidden_layers(self) -> int:
        """Return the number of different blocks; transformers reads it when it sizes a cache."""
        return self.n_prelude + self.n_core + self.n_coda


def check_no_unknown_count(kwargs: dict[str, Any]) -> None:
    """Refuse a misspelt `n_...`: transformers would keep it as an attribute and say nothing."""
    counts = (*POSITIVE_COUNTS, *OPTIONAL_COUNTS)
    known = sorted(count for count in counts if count.startswith("n_"))
    for name, value in kwargs.items():
        if name.startswith("n_"):
            raise ValueError(f"{name}={value!r} is no setting of LoopedGPTConfig; use one of {', '.join(known)}.")


def check_config(config: LoopedGPTConfig) -> None:
    """Raise ValueError if the settings describe no model."""
    for name in POSITIVE_COUNTS:
        check_count(name, getattr(config, name), minimum=1)
    for name in OPTIONAL_COUNTS:
        check_count(name, getattr(config, name), minimum=0)
    check_choice("injection", config.injection, INJECTIONS)
    check_choice("state_init", config.state_init, STATE_INITS)
    check_choice("feedback", config.feedback, FEEDBACKS)
    if config.injection == "none" and config.state_init != "prelude":
        raise ValueError(
            f"injection='none' with state_init={config.state_init!r}: the model would never read its tokens; "
            "take state_init='prelude'."
        )
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}; "
            "choose a number of heads that divides the width."
        )
    if config.use_cache:
        raise ValueError("use_cache=True: LoopedGPT has no key-value cache; leave it False.")


def check_count(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError naming the setting unless it is an integer of at least `minimum`."""
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the setting unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {choices}.")

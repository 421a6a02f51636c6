"""What is measured: models of the paper's shape, examples for them, and the loss.

Axes as in the library: `n` train examples, `q` test examples, `p` token positions, `t` loop steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM, loop_layers

VOCAB = 1024


@dataclass(frozen=True)
class Workload:
    """A model and the examples to score; `influence` of each `train` row on each `test` row."""

    model: nn.Module
    loop: tuple[str, ...]
    """Names of the modules that repeat."""
    entry: str
    """The module whose output enters the loop."""
    train: Tensor
    """`(n, p)` token ids."""
    test: Tensor
    """`(q, p)` token ids."""


def looped_gpt(
    width: int = 768, tau: int = 6, seq: int = 128, batch: int = 4, vocab: int = VOCAB, **settings: Any
) -> Workload:
    """The paper's architecture: two blocks, four looped ones, two blocks; no biases in linear layers."""
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=vocab,
        n_embd=width,
        n_head=max(1, width // 64),
        n_loops=tau,
        n_positions=seq,
        initializer_range=0.05,  # at GPT-2's 0.02 the steps of an untrained loop are nearly alike
        **settings,
    )
    return of_looped_gpt(LoopedGPTForCausalLM(config).eval(), batch, seq)


def of_looped_gpt(model: LoopedGPTForCausalLM, batch: int, seq: int) -> Workload:
    """A given model, and tokens of its own vocabulary."""
    entry, vocab = f"prelude.{model.config.n_prelude - 1}", model.config.vocab_size
    return Workload(model, ("core",), entry, tokens(batch, seq, vocab, 1), tokens(batch, seq, vocab, 2))


def looped_gpt2(width: int = 768, tau: int = 6, seq: int = 128, batch: int = 4) -> Workload:
    """Hugging Face's GPT-2 as it is (Conv1D layers with biases), its middle four layers looped."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=width,
        n_head=max(1, width // 64),
        n_layer=8,
        n_positions=seq,
        initializer_range=0.05,
        use_cache=False,
    )
    model = loop_layers(GPT2LMHeadModel(config).eval(), 2, 6, n_loops=tau)
    loop = tuple(f"transformer.h.{i}" for i in range(2, 6))
    return Workload(model, loop, "transformer.h.1", tokens(batch, seq, VOCAB, 1), tokens(batch, seq, VOCAB, 2))


def tokens(n: int, seq: int, vocab: int, seed: int) -> Tensor:
    """Random token ids `(n, p)`: what they say changes neither time nor memory."""
    return torch.randint(0, vocab, (n, seq), generator=torch.Generator().manual_seed(seed))


def losses(output: Any, ids: Tensor) -> Tensor:
    """Next-token loss of every example, averaged over its tokens `(n,)`: what the library does by default."""
    logits = getattr(output, "logits", output)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


losses.reduction = "none"  # type: ignore[attr-defined]  # as Captum wants it said

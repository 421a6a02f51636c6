"""One table of models, their data and how they come apart; small tests run over all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from reference import Untying, next_token_loss, spread, step_gradients
from torch import Tensor, nn

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

N_LOOPS = 3
VOCAB = 11


@dataclass(frozen=True, eq=False)  # a case is itself: hashable, whatever it holds
class Case:
    """A model with training rows and test rows, and its gradients' truth."""

    name: str
    make: Callable[[], nn.Module]
    untying: Untying
    causal: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return spread(self.make()).to(dtype)

    def names(self, model: nn.Module, layers: str | None) -> list[str]:
        """Targeted parameters, by prefix: the reference does not ask the library."""
        inside = tuple(f"{name}." for name in self.untying.loop)
        return [name for name, _ in model.named_parameters() if layers is None or name.startswith(inside)]

    def gradients(self, model: nn.Module, row: dict[str, Tensor], layers: str | None, **forward: Any) -> Tensor:
        """Bins of one example, alone and without padding: ``(2 + t, entries)``."""

        def loss(untied: nn.Module) -> Tensor:
            output = untied(input_ids=row["input_ids"].unsqueeze(0), **forward)
            return next_token_loss(output.logits[0], row["labels"], self.causal)

        n_steps = forward.get("n_loops", self.untying.n_steps)
        untying = Untying(self.untying.loop, self.untying.anchors, n_steps, self.untying.outside)
        return step_gradients(model, loss, untying, self.names(model, layers))


def rows(n: int, seed: int, longest: int = 9) -> list[dict[str, Tensor]]:
    """Rows of mixed length with some positions that are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(0, VOCAB, (longest - i % 4,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def looped_gpt(**changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        settings = {"vocab_size": VOCAB, "n_positions": 12, "n_embd": 8, "n_head": 2, "n_loops": N_LOOPS}
        blocks = {"n_prelude": 1, "n_core": 2, "n_coda": 1}
        return LoopedGPTForCausalLM(LoopedGPTConfig(**{**settings, **blocks, **changes}))

    return make


_OUTSIDE = {
    "wte": "prelude", "wpe": "prelude", "prelude": "prelude", "coda": "coda", "ln_f": "coda", "lm_head": "coda",
}  # fmt: skip
_GPT = Untying(loop=("core",), anchors=("core",), n_steps=N_LOOPS, outside=_OUTSIDE)

CASES = [
    Case("concat", looped_gpt(injection="concat", bias=True), _GPT),
    Case("add", looped_gpt(injection="add"), _GPT),
    Case("tied", looped_gpt(tie_word_embeddings=True), _GPT),
    Case("bidirectional", looped_gpt(is_causal=False, bias=True), _GPT, causal=False),
    Case("bare loop", looped_gpt(n_prelude=0, n_coda=0, n_core=1, state_init="zeros"), _GPT),
]

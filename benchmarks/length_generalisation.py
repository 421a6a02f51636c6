"""How far does copying come in minutes? `python benchmarks/length_generalisation.py [--small]`.

After Fan et al. (2024, arXiv 2409.15647), in small: one block, as many loops as the string is long and one more, the
input injected in every loop, no positions, a start symbol, and lengths that grow from 1 to 20 as soon as the longest
are solved. The string is written again below the `#` behind it. The loss is that of the answer after the last loop, as
in the paper; or, which says what each loop has to do, of the text moved by one place more after every loop. Strings of
up to 40 bits are then tested. Results go to length_generalisation.json. (Parity and addition are in
tutorials/09_length_generalisation.ipynb.)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import environment
from torch import Tensor
from torch.nn.functional import cross_entropy

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

START, END, BLANK = 2, 3, 4
NOTHING = -100
"""In the place of a target where nothing is predicted."""
LONGEST, BATCH, WIDTH, RATE, MINUTES = 20, 64, 64, 1e-3, 3.0
SOLVED = 0.95
"""Of the longest strings, before longer ones are trained on."""
TESTED = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 25, 30, 35, 40)
RESULTS = Path(__file__).with_suffix(".json")


class Strings(NamedTuple):
    """Strings of one length."""

    tokens: Tensor
    """``(n, p)``."""
    targets: Tensor
    """``(n, p)``."""

    @property
    def n_loops(self) -> int:
        """One for each bit, and one for the sign behind them."""
        return self.tokens.shape[1] // 2

    def moved(self, n_places: int) -> Tensor:
        """Return which bits stand where once the text has moved by some places ``(n, p)``."""
        places = torch.full_like(self.tokens, NOTHING)
        places[:, n_places:] = self.tokens[:, :-n_places]
        return places.where(places < START, NOTHING)


def draw_strings(length: int, n: int, generator: torch.Generator) -> Strings:
    """Draw strings that are written again below blanks."""
    bits = torch.randint(0, 2, (n, length), generator=generator)
    prompt = torch.cat([column(n, START), bits, column(n, END)], dim=1)
    tokens = torch.cat([prompt, torch.full_like(bits, BLANK)], dim=1)
    targets = torch.cat([torch.full_like(prompt, NOTHING), bits], dim=1)
    return Strings(tokens, targets)


def column(n: int, token: int) -> Tensor:
    return torch.full((n, 1), token)


def new_model(seed: int) -> LoopedGPTForCausalLM:
    torch.manual_seed(seed)
    config = LoopedGPTConfig(
        vocab_size=5,
        n_positions=128,
        n_embd=WIDTH,
        n_head=4,
        n_prelude=0,
        n_core=1,
        n_coda=0,
        injection="add",
        state_init="zeros",
        has_positions=False,
        bias=True,
    )
    return LoopedGPTForCausalLM(config)


@torch.no_grad()
def accuracy(model: LoopedGPTForCausalLM, length: int, n: int, seed: int) -> float:
    """The share of strings that are right in every bit."""
    strings = draw_strings(length, n, torch.Generator().manual_seed(seed))
    answers = model(strings.tokens, n_loops=strings.n_loops).logits.argmax(-1)
    is_right = (answers == strings.targets) | (strings.targets == NOTHING)
    return is_right.all(1).float().mean().item()


def loss_at_end(model: LoopedGPTForCausalLM, strings: Strings) -> Tensor:
    logits = model(strings.tokens, n_loops=strings.n_loops).logits
    return cross_entropy(logits.flatten(0, 1), strings.targets.flatten(), ignore_index=NOTHING)


def loss_of_every_loop(model: LoopedGPTForCausalLM, strings: Strings) -> Tensor:
    inputs = model.read_in(strings.tokens, torch.zeros_like(strings.tokens), None)
    state, losses = torch.zeros_like(inputs), []
    for step in range(1, strings.n_loops + 1):
        state = model.core(state, inputs, None)
        logits = model.read_out(state, None)
        losses.append(cross_entropy(logits.flatten(0, 1), strings.moved(step).flatten(), ignore_index=NOTHING))
    return torch.stack(losses).mean()


LOSSES = {"after the last loop": loss_at_end, "after every loop": loss_of_every_loop}


def train(loss_on: str, minutes: float, seed: int) -> tuple[LoopedGPTForCausalLM, dict[str, int]]:
    """Train for some minutes of the processor, on lengths that grow."""
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    generator, lengths = torch.Generator().manual_seed(seed), random.Random(seed)
    longest, n_updates, spent, start = 1, 0, 0.0, time.process_time()
    while spent < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (n_updates + 1) / 100, (1 - spent) / 0.3)
        loss = LOSSES[loss_on](model, draw_strings(lengths.randint(1, longest), BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        n_updates += 1
        if n_updates % 20 == 0 and longest < LONGEST and accuracy(model, longest, BATCH, seed=7) > SOLVED:
            longest += 1
        spent = (time.process_time() - start) / (60 * minutes)
    return model.eval(), {"updates": n_updates, "longest in training": longest}


def measure(loss_on: str, minutes: float, seed: int = 0) -> dict[str, Any]:
    model, how_far = train(loss_on, minutes, seed)
    right = {length: round(accuracy(model, length, 256, seed=8), 3) for length in TESTED}
    return {"loss": loss_on, "minutes": minutes, "seed": seed, **how_far, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    measured = []
    for loss_on in LOSSES:
        measured.append(measure(loss_on, 0.02 if small else MINUTES))
        print(json.dumps(measured[-1]), flush=True)
        if not small:
            RESULTS.write_text(json.dumps({"environment": environment(), "runs": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()

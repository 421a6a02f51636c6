"""The beds: a data set, a looped model and a training by AdamW that can be repeated a few hundred times.

Nothing here was chosen by looking at how well a method predicts retraining, except the documented failure: it is the
setting in which the tutorial on removal found that first-order scores say nothing.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.tasks import parity
from retraining.chain import Chain, follow, random_cycle

Rows = dict[str, Tensor]
"""`input_ids` and `labels`, one example a row."""

N_LOOPS = 4
SMALL_UPDATES = 6


@dataclass(frozen=True)
class Adam:
    """Settings of AdamW; every parameter decays."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Bed:
    """One training run that is repeated without some of its examples."""

    name: str
    seed: int
    train: Rows
    test: Rows
    build: Callable[[], nn.Module]
    """Makes the model; its weights at the start are those after `torch.manual_seed(seed)`."""
    loss: Callable[[Any, Tensor], Tensor]
    """(output, labels) to `(n,)`."""
    rates: tuple[float, ...]
    """One learning rate for each update."""
    batches: tuple[Tensor, ...]
    """Positions in the train set, for each update."""
    loop: str = "core"
    n_steps: int = N_LOOPS
    adam: Adam = field(default_factory=Adam)
    forward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    test_forward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    stack: int = 64
    """How many models are trained at once; 1 where a single one keeps a core busy."""

    @property
    def n(self) -> int:
        return len(self.train["labels"])

    @property
    def q(self) -> int:
        return len(self.test["labels"])

    def start(self) -> nn.Module:
        """Make the model as it is before training, always the same."""
        torch.manual_seed(self.seed)
        return self.build().to(self.dtype).eval()


def as_dataset(rows: Rows) -> TensorDataset:
    """Return rows as Captum takes data sets: what the model is called with, and the labels last."""
    return TensorDataset(*as_batch(rows))


def as_batch(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows["input_ids"], rows["labels"]


def language_model_loss(output: Any, labels: Tensor) -> Tensor:
    """Next-token loss of every example, averaged over its targets `(n,)`; of an output, or of logits alone."""
    logits = getattr(output, "logits", output)[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def negative_log_likelihood(output: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(output, labels, reduction="none")


language_model_loss.reduction = "none"  # type: ignore[attr-defined]  # as Captum wants it said
negative_log_likelihood.reduction = "none"  # type: ignore[attr-defined]


# --- parity ---


def parity_bed(
    name: str,
    seed: int,
    peak: float,
    updates: int,
    batch: int = 40,
    cosine: bool = False,
    warm_up: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Bed:
    """Running parity of 40 strings of 7 bits, by one block of width 32 applied 4 times; 20 strings are tests."""
    tests_and_trains, test = parity(100, min_bits=7, max_bits=7, running=True, seed=0).split(held_out=20)
    _, train = tests_and_trains.split(held_out=40)
    build = looped_gpt(train.vocab_size, train.length, width=32, spread=0.1)
    rates = [peak * schedule(update, updates, cosine, warm_up) for update in range(updates)]
    return Bed(
        name=name,
        seed=seed,
        train={"input_ids": train.input_ids, "labels": train.labels},
        test={"input_ids": test.input_ids, "labels": test.labels},
        build=build,
        loss=language_model_loss,
        rates=tuple(rates),
        batches=epochs(len(train), batch, updates, seed),
        dtype=dtype,
    )


def smooth_parity(seed: int) -> Bed:
    return parity_bed("parity", seed, peak=1e-3, updates=120, batch=8, cosine=True)


def rough_parity(seed: int) -> Bed:
    """The documented failure: three times the rate, constant, on full batches.

    In float64: in float32 the run amplifies rounding, so that two ways to sum a batch end at other weights.
    """
    return parity_bed("parity, 3e-3", seed, peak=3e-3, updates=60, dtype=torch.float64)


def gauge_beds(n_seeds: int) -> list[Bed]:
    """Return trainings from smooth to chaotic, asked about 6 tests; see `rough_parity` on float64."""
    settings = {
        "3e-3, constant, full batches": {"peak": 3e-3, "updates": 60},
        "1e-3, constant, full batches": {"peak": 1e-3, "updates": 60},
        "1e-3, warm-up, cosine, full batches": {"peak": 1e-3, "updates": 120, "cosine": True, "warm_up": 10},
        "1e-3, batches of 8, cosine": {"peak": 1e-3, "updates": 120, "batch": 8, "cosine": True},
        "3e-3, batches of 8, cosine": {"peak": 3e-3, "updates": 120, "batch": 8, "cosine": True},
        "1e-3, batches of 8, cosine, memorised": {"peak": 1e-3, "updates": 300, "batch": 8, "cosine": True},
    }
    beds: list[Bed] = []
    for name, setting in settings.items():
        for seed in range(n_seeds):
            beds.append(parity_bed(f"parity, {name}", seed, **setting, dtype=torch.float64))
    beds += [text_bed(seed) for seed in range(n_seeds)]
    return [with_tests(bed, 6) for bed in beds]


# --- text ---

LINES, LINE_LENGTH, TEXT_TESTS = 256, 32, 8
MODULES = """
json re ast argparse asyncio collections csv datetime decimal difflib email heapq http inspect itertools
logging math os pathlib pickle random shutil socket sqlite3 statistics string subprocess tarfile textwrap
threading typing unittest uuid zipfile calendar code configparser contextlib copy enum fractions functools
gzip html mailbox optparse pprint queue selectors smtplib tempfile trace traceback types warnings wave
"""


def text_bed(seed: int) -> Bed:
    """First characters of docstrings of Python's library, by one block of width 48 applied 4 times; 8 are tests."""
    lines = docstring_lines()
    characters = sorted(set("".join(lines)))
    token_ids = {character: number for number, character in enumerate(characters)}
    ids = torch.tensor([[token_ids[character] for character in line] for line in lines])
    train, test = ids[:LINES], ids[LINES : LINES + TEXT_TESTS]
    updates = 160
    rates = [3e-3 * schedule(update, updates, cosine=True, warm_up=10) + 1e-5 for update in range(updates)]
    return Bed(
        name="text",
        seed=seed,
        train={"input_ids": train, "labels": train},
        test={"input_ids": test, "labels": test},
        build=looped_gpt(len(characters), LINE_LENGTH + 1, width=48, spread=0.08),
        loss=language_model_loss,
        rates=tuple(rates),
        batches=epochs(LINES, 32, updates, seed),
        adam=Adam(betas=(0.9, 0.99)),
        stack=1,
    )


def docstring_lines() -> list[str]:
    """Return different texts of `LINE_LENGTH` + 1 characters each, in an order that is always the same."""
    texts = set()
    for name in MODULES.split():
        for _, member in inspect.getmembers(importlib.import_module(name)):
            if inspect.isfunction(member) or inspect.isclass(member):
                text = re.sub(r"\s+", " ", inspect.getdoc(member) or "").lower()
                texts.add(text[: LINE_LENGTH + 1])
    lines = sorted(text for text in texts if len(text) == LINE_LENGTH + 1)
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    return [lines[position] for position in order]


# --- hops ---


def hop_bed(seed: int, dtype: torch.dtype = torch.float32) -> Bed:
    """64 facts, one document each, before they are saturated; asked five hops, which no document shows."""
    facts = random_cycle(64, seed)
    entities = torch.arange(64)
    updates, hops = 25, 5
    return Bed(
        name="hops" if dtype == torch.float32 else "hops, float64",
        seed=seed,
        train={"input_ids": entities, "labels": facts},
        test={"input_ids": entities, "labels": follow(facts, entities, hops)},
        build=lambda: Chain(64),
        loss=negative_log_likelihood,
        rates=(3e-3,) * updates,
        batches=(entities,) * updates,
        loop="block",
        n_steps=hops,
        forward_kwargs={"n_loops": 1},
        test_forward_kwargs={"n_loops": hops},
        dtype=dtype,
    )


# --- parts ---


def looped_gpt(vocab_size: int, length: int, width: int, spread: float) -> Callable[[], nn.Module]:
    """Return what builds a looped GPT of one block applied `N_LOOPS` times, without prelude and coda blocks."""
    config = LoopedGPTConfig(
        vocab_size=vocab_size,
        n_positions=length,
        n_embd=width,
        n_head=4,
        n_prelude=0,
        n_core=1,
        n_coda=0,
        n_loops=N_LOOPS,
        bias=True,
        initializer_range=spread,
        pad_token_id=0,
    )
    return lambda: LoopedGPTForCausalLM(config)


def schedule(update: int, updates: int, cosine: bool, warm_up: int) -> float:
    """Return the share of the peak rate at an update."""
    warm = min(1.0, (update + 1) / warm_up) if warm_up else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * update / updates)) if cosine else 1.0
    return warm * decay


def epochs(n: int, batch: int, updates: int, seed: int) -> tuple[Tensor, ...]:
    """Return the positions of each update: shuffled epochs of full batches."""
    generator = torch.Generator().manual_seed(100 + seed)
    batches: list[Tensor] = []
    while len(batches) < updates:
        batches.extend(torch.randperm(n, generator=generator).split(batch))
    return tuple(batches[:updates])


def with_tests(bed: Bed, count: int | None) -> Bed:
    """Return a bed asked about its first tests alone; all of them for None."""
    return replace(bed, test={name: column[:count] for name, column in bed.test.items()})


def shortened(bed: Bed, n_train: int = 16, n_test: int = 3) -> Bed:
    """Return a bed of a few examples and updates: does it run?

    In float64, as so little training has small effects; with a large eps, as Adam's first updates know little but
    signs.
    """
    train = {name: column[:n_train] for name, column in bed.train.items()}
    test = {name: column[:n_test] for name, column in bed.test.items()}
    batches = epochs(n_train, min(len(bed.batches[0]), n_train // 2), SMALL_UPDATES, bed.seed)
    rates = bed.rates[:SMALL_UPDATES]
    adam = replace(bed.adam, eps=0.1)
    return replace(bed, train=train, test=test, rates=rates, batches=batches, adam=adam, dtype=torch.float64)

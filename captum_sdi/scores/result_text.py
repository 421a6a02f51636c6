"""A `StepInfluence` as a short text, for terminals: the strongest training examples of the first test examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from captum_sdi.scores.result_tables import train_indices
from captum_sdi.words import counted

if TYPE_CHECKING:
    from captum_sdi.scores.result import StepInfluence

TESTS_SHOWN, TRAINS_SHOWN = 3, 5
LONGEST_TEXT = 60  # characters of an example


def text_table(result: StepInfluence) -> str:
    """Return a heading, and a line for each of the strongest training examples; steps count from 0."""
    totals = result.influence_scores
    row_name = "test example" if result.token_of is None else "target token"
    of_tests = f"{counted(len(totals), row_name)} x " if totals.dim() == 2 else ""
    trains = counted(totals.shape[-1], "training example")
    heading = f"StepInfluence of {of_tests}{trains}, {counted(result.trajectories.shape[-1], 'loop step')}"
    if result.trajectories.numel() == 0:
        return heading
    lines = [heading, "  train      total  ± error  largest step (from 0)"]
    if totals.dim() == 1:
        return "\n".join(lines + strongest(result, None))
    for q in range(min(len(totals), TESTS_SHOWN)):
        lines.append(f"{test_name(result, q)}{text_of(result, 'test', q)}")
        lines += strongest(result, q)
    n_more = len(totals) - TESTS_SHOWN
    if n_more > 0:
        lines.append(f"... and {counted(n_more, f'more {row_name}')}")
    return "\n".join(lines)


def test_name(result: StepInfluence, q: int) -> str:
    """Return which test example a row is of, and which of its tokens."""
    if result.token_of is None:
        return f"test {q}:"
    test, token = result.token_of[q].tolist()
    return f"test {test}, token {token}:"


def strongest(result: StepInfluence, q: int | None) -> list[str]:
    """Return the lines of one test example, in the order of the result's ranking; None: of self-influence."""
    places: slice | int = slice(None) if q is None else q
    totals: Tensor = result.influence_scores[places].detach()
    train = train_indices(result)[places].tolist()
    errors, trajectories = result.score_errors[places], result.trajectories[places].detach()
    is_ranked = result.indices is not None
    order = range(len(totals)) if is_ranked else totals.argsort(descending=True).tolist()
    lines = []
    for place in order[:TRAINS_SHOWN]:
        index = train[place]
        step = int(trajectories[place].abs().argmax())
        numbers = f"{float(totals[place]):>+9.2e}  {float(errors[place]):>7.0e}  {step:>4}"
        lines.append(f"{f'#{index}':>7}  {numbers}{text_of(result, 'train', index)}")
    n_more = len(totals) - TRAINS_SHOWN
    if n_more > 0:
        lines.append(f"         and {n_more:,} more")
    return lines


def text_of(result: StepInfluence, side: str, position: int) -> str:
    """Return two blanks and the beginning of what an example says; nothing where that is not known."""
    known = None if result.words is None else getattr(result.words, side)
    if known is None:
        return ""
    if side == "test" and result.token_of is not None:
        position = int(result.token_of[position, 0])
    example = known[position]
    text = example if isinstance(example, str) else str(example.get("text", ""))
    plain = "".join(char if char.isprintable() else " " for char in text)
    is_long = len(plain) > LONGEST_TEXT
    return f"  {plain[: LONGEST_TEXT - 1]}…" if is_long else f"  {plain}"

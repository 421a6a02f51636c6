"""A `StepInfluence` as a table: of pandas, which is imported where it is used, or of HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_sdi.scores.words import Example

if TYPE_CHECKING:
    from captum_sdi.scores.result import StepInfluence

ROWS_SHOWN = 5
"""Of test examples, and of training examples of each, in a notebook."""
CURVE_WIDTH, CURVE_HEIGHT = 96, 22  # pixels


# --- pandas ---


def data_frame(
    result: StepInfluence,
    texts: Sequence[Example] | None,
    test_texts: Sequence[Example] | None,
) -> Any:
    """Return a DataFrame with a row for each pair; see `StepInfluence.to_pandas`.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install pandas.") from error
    totals = result.influence_scores
    ranges = [torch.arange(size) for size in totals.shape]
    places = torch.cartesian_prod(*ranges)
    places = places.view(-1, totals.dim())  # of one axis alone there are no columns
    train = train_indices(result).flatten()
    columns: dict[str, Any] = {}
    if totals.dim() == 2:
        columns |= test_columns(result, places[:, 0])
        columns["rank"] = places[:, 1].numpy()
    columns["train"] = train.numpy()
    columns |= number_columns(result)
    frame = pandas.DataFrame(columns)
    if test_texts is not None and totals.dim() == 2:
        frame = frame.join(example_frame(test_texts, columns["test"], "test_"))
    if texts is not None:
        frame = frame.join(example_frame(texts, columns["train"], ""))
    return frame


def test_columns(result: StepInfluence, rows: Tensor) -> dict[str, Any]:
    """Return the test example of each pair, and its target token where a row of the result is one."""
    if result.token_of is None:
        return {"test": rows.numpy()}
    token_rows = result.token_of.cpu()[rows]
    tests, tokens = token_rows.unbind(1)
    return {"test": tests.numpy(), "token": tokens.numpy()}


def number_columns(result: StepInfluence) -> dict[str, Any]:
    """Return the numbers of every pair, one column each; NaN at the steps that a test example did not run."""
    trajectories = result.trajectories.cpu()
    trajectory_errors = result.trajectory_errors.cpu()
    n_steps = result.n_steps.cpu()
    step_numbers = torch.arange(trajectories.shape[-1])
    ran = step_numbers < n_steps[..., None]  # (q, t)
    if result.influence_scores.dim() == 2:
        ran = ran[:, None].expand(trajectories.shape)
    steps = rows_of(trajectories.masked_fill(~ran, torch.nan))
    errors = rows_of(trajectory_errors.masked_fill(~ran, torch.nan))
    columns = {
        "total": result.influence_scores,
        "error": result.score_errors,
        "prelude": result.prelude,
        "coda": result.coda,
    }
    numbers = {}
    for name, column in columns.items():
        flat_column = column.detach().cpu().flatten()
        numbers[name] = flat_column.float().numpy()
    for step, values in enumerate(steps.unbind(-1)):
        numbers[f"step_{step}"] = values.float().numpy()
    for step, values in enumerate(errors.unbind(-1)):
        numbers[f"step_{step}_error"] = values.float().numpy()
    return numbers


def rows_of(trajectories: Tensor) -> Tensor:
    """Return trajectories ``(pairs, t)``."""
    return trajectories.detach().flatten(0, -2)


def example_frame(
    examples: Sequence[Example],
    positions: Sequence[int],
    prefix: str,
) -> Any:
    """Return the texts and the other fields of the examples at some positions, a column for each."""
    import pandas

    chosen_examples = [examples[int(position)] for position in positions]
    rows = [{"text": example} if isinstance(example, str) else dict(example) for example in chosen_examples]
    return pandas.DataFrame(rows, dtype=object).add_prefix(prefix)  # its own strings refuse half a surrogate pair


def train_indices(result: StepInfluence) -> Tensor:
    """Return the train example of each pair, in the shape of the totals."""
    if result.indices is not None:
        return result.indices.cpu()
    shape = result.influence_scores.shape
    in_order = torch.arange(shape[-1])
    return in_order.expand(shape)


# --- notebooks ---


def html_table(result: StepInfluence) -> str:
    """Return the strongest training examples of the first test examples; steps count from 0, as ``rank_by`` does."""
    summary = html.escape(repr(result))
    totals = result.influence_scores.detach().cpu()
    steps = result.trajectories.detach().cpu()
    if totals.dim() != 2 or 0 in steps.shape:
        return f"<pre>{summary}</pre>"
    names = ("test", "train", "total", "± error", "by step", "largest step (from 0)")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    train = train_indices(result)
    for q, row in enumerate(totals[:ROWS_SHOWN]):
        largest = steps[q].abs().max()
        bound = float(largest) or 1.0
        strongest = row.argsort(descending=True)[:ROWS_SHOWN]
        for place in strongest.tolist():
            n_steps = int(result.n_steps[q])
            trajectory = steps[q, place, :n_steps]
            largest_step = int(trajectory.abs().argmax())
            score_error = float(result.score_errors[q, place])
            cells = (
                str(q),
                f"#{int(train[q, place])}",
                f"<b>{float(row[place]):+.3e}</b>",
                f"{score_error:.0e}",
                curve(trajectory.tolist(), bound),
                str(largest_step),
            )
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<p><code>{summary}</code></p><table>{body}</table>"


def curve(numbers: Sequence[float], bound: float) -> str:
    """Return a trajectory as a small picture, symmetric about its line of zero.

    Example:
        >>> curve([1.0, -1.0], bound=1.0).count("<rect")
        2
    """
    middle = CURVE_HEIGHT / 2
    width = CURVE_WIDTH / len(numbers)
    bars = [f'<line x2="{CURVE_WIDTH}" y1="{middle}" y2="{middle}" stroke="#999"/>']
    for step, number in enumerate(numbers):
        height = middle * abs(number) / bound
        top = middle - height if number > 0 else middle
        colour = "#1f6fb8" if number > 0 else "#c4561c"
        shape = f'x="{step * width:.1f}" y="{top:.1f}" width="{0.8 * width:.1f}" height="{height:.1f}"'
        bars.append(f'<rect {shape} fill="{colour}"/>')
    return f'<svg width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}">{"".join(bars)}</svg>'

"""The computer against an interpreter of this file's own, and influence against what is known without a gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_sdi import Exact, SDIInfluence, TensorSketch, coverage_check, find_loop
from captum_sdi.models.programs import ComputerOutput, Instruction, ProgramComputer, assemble, interpret

CELLS = ["a", "b", "c", "one"]
TEXT = """
square:   copy a b               # b = a, and on into multiply: c = a * b
multiply: subtract c c c
again:    add c a c
          subtract b one b
          branch b again
          halt
larger:   subtract a b c         # c = the larger one of a and b
          branch c first
          copy b c
          halt
first:    copy a c
          halt
"""
N_STEPS = 24


def executed(instructions: list[Instruction], start: int, memory: list[int]) -> tuple[list[int | None], list[int]]:
    """The line that each of `N_STEPS` steps executes, None after the end, and the memory: plain Python."""
    lines: list[int | None] = []
    here, cells = start, list(memory)
    for _ in range(N_STEPS):
        name, left, right, target, jump = instructions[here]
        if name == "halt":
            lines.append(None)
            continue
        lines.append(here)
        if name == "branch" and cells[left] > 0:
            here = jump
            continue
        if name == "copy":
            cells[target] = cells[left]
        elif name == "add":
            cells[target] = cells[left] + cells[right]
        elif name == "subtract":
            cells[target] = cells[left] - cells[right]
        here += 1
    return lines, cells


class Cost:
    """The summed costs of the lines that were executed: the loss whose influence is known."""

    reduction = "none"

    def __call__(self, output: ComputerOutput, labels: Tensor) -> Tensor:
        return output.cost


class Answer:
    """The squared error of the cell c."""

    reduction = "none"

    def __call__(self, output: ComputerOutput, labels: Tensor) -> Tensor:
        return (output.memory[:, 2] - labels) ** 2


def random_programs(n: int, n_lines: int, n_cells: int, seed: int) -> list[Instruction]:
    """Programs one after the other in one table; each branches within itself and ends with halt."""
    rng = random.Random(seed)
    table = []
    for first in range(0, n * n_lines, n_lines):
        for _ in range(n_lines - 1):
            name = rng.choice(["copy", "add", "subtract", "branch", "branch", "halt"][: rng.choice([5, 6])])
            cells = [rng.randrange(n_cells) for _ in range(3)]
            table.append(Instruction(name, *cells, jump=first + rng.randrange(n_lines)))
        table.append(Instruction("halt"))
    return table


def test_thousands_of_random_programs_come_out_exactly() -> None:
    n, n_lines, n_cells = 4000, 8, 4
    table = random_programs(n, n_lines, n_cells, seed=0)
    memory = torch.randint(-5, 6, (n, n_cells), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(n) * n_lines
    with torch.no_grad():
        output = ProgramComputer(table, n_cells).double()(starts, memory, n_loops=N_STEPS)
    truths = [executed(table, start, cells) for start, cells in zip(starts.tolist(), memory.tolist(), strict=True)]
    assert output.memory.tolist() == [cells for _, cells in truths]
    counts = [sum(line is not None for line in lines) for lines, _ in truths]
    assert output.cost.tolist() == counts
    assert len({tuple(lines) for lines, _ in truths}) > n / 2  # they are programs of many kinds
    assert 0.2 < sum(count == N_STEPS for count in counts) / n < 0.9  # that halt and that do not


def test_the_interpreter_says_the_same() -> None:
    table = random_programs(300, 8, 4, seed=1)
    for start in range(0, len(table), 8):
        lines, cells = executed(table, start, [3, -1, 2, 0])
        run = interpret(table, start, [3, -1, 2, 0], N_STEPS)
        assert run.memory == cells
        assert [line for line in run.lines if table[line].operation != "halt"] == [
            line for line in lines if line is not None
        ]
        assert run.n_executed == sum(line is not None for line in lines)


# --- the known answer ---


def library() -> tuple[list[Instruction], dict[str, int]]:
    return assemble(TEXT, CELLS)


RUNS = [("square", 3, 0), ("multiply", 4, 2), ("multiply", 2, 5), ("larger", 2, 7), ("larger", 9, 4), ("square", 2, 0)]


def batch_of(runs: list[tuple[str, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    _, labels = library()
    starts = torch.tensor([labels[name] for name, _, _ in runs])
    memory = torch.tensor([[a, b, 0, 1] for _, a, b in runs])
    return starts, memory, torch.zeros(len(runs))


def indicator(train: list[tuple[str, int, int]], test: list[tuple[str, int, int]]) -> Tensor:
    """Where both execute the same line: ``(q, n, s, t)``, from traces alone."""
    table, labels = library()

    def traces(runs: list[tuple[str, int, int]]) -> Tensor:
        lines = [executed(table, labels[name], [a, b, 0, 1])[0] for name, a, b in runs]
        return torch.tensor([[-1 if line is None else line for line in trace] for trace in lines])

    train_lines, test_lines = traces(train)[None, :, :, None], traces(test)[:, None, None, :]
    return ((train_lines == test_lines) & (test_lines >= 0)).double()


def sdi_of(model: nn.Module, train: Any, **settings: Any) -> SDIInfluence:
    settings = {"loss_fn": Cost(), "sketch": Exact(), "forward_kwargs": {"n_loops": N_STEPS}, **settings}
    return SDIInfluence(model, train, batch_size=4, **settings)


@pytest.fixture(scope="module")
def computer() -> ProgramComputer:
    return ProgramComputer(library()[0], len(CELLS)).double()


def test_programs_compute_what_they_are_called(computer: ProgramComputer) -> None:
    output = computer(*batch_of(RUNS)[:2], n_loops=N_STEPS)
    assert output.memory[:, 2].tolist() == [9, 8, 10, 7, 9, 4]


def test_the_step_matrix_is_the_known_indicator(computer: ProgramComputer) -> None:
    """With nothing said: every trainable parameter counts, and zeros are exact."""
    expected = indicator(RUNS[:4], RUNS)
    assert 0 < expected.mean() < 0.1
    sdi = sdi_of(computer, batch_of(RUNS[:4]))
    assert torch.equal(sdi.step_matrix(batch_of(RUNS)), expected)
    result = sdi.step_influence(batch_of(RUNS))
    assert torch.equal(result.trajectories, expected.sum(2))
    assert torch.equal(result.influence_scores, expected.sum((2, 3)))
    assert not result.prelude.any()
    assert not result.coda.any()
    own = sdi.step_self_influence()
    mine = torch.stack([indicator([run], [run])[0, 0].sum(1) for run in RUNS[:4]])
    assert torch.equal(own.trajectories, mine)


def test_runs_of_other_programs_have_no_influence(computer: ProgramComputer) -> None:
    """Two programs without a common line."""
    matrix = sdi_of(computer, batch_of(RUNS[3:5])).step_matrix(batch_of(RUNS[:3]))
    assert not matrix.any()


def test_the_influence_on_an_answer_is_zero_where_no_line_is_common(computer: ProgramComputer) -> None:
    """Of a size that depends on the numbers, but never where the lines differ."""
    sdi = sdi_of(computer, batch_of(RUNS[:4]), loss_fn=Answer(), layers=["core.instructions"])
    matrix = sdi.step_matrix(batch_of(RUNS))
    expected = indicator(RUNS[:4], RUNS)
    assert not matrix[expected == 0].any()
    assert (matrix[expected == 1] != 0).double().mean() > 0.6


def test_a_sketch_finds_it_within_its_errors(computer: ProgramComputer) -> None:
    """Of fewer numbers than the table has lines, so that lines collide; without bias over seeds."""
    expected = indicator(RUNS[:4], RUNS).sum(2)
    draws = []
    within = []
    for seed in range(8):
        sketch = TensorSketch(dim=8, seed=seed)
        result = sdi_of(computer, batch_of(RUNS[:4]), sketch=sketch).step_influence(batch_of(RUNS))
        draws.append(result.trajectories - expected)
        within.append((result.trajectories - expected).abs() <= 2 * result.trajectory_errors + 1e-12)
    means = torch.stack([draw.mean() for draw in draws])
    assert means.std() > 0.01
    assert means.mean().abs() < 4 * means.std() / len(means) ** 0.5
    assert torch.stack(within).double().mean() > 0.9


def test_the_loop_is_found_and_covered(computer: ProgramComputer) -> None:
    loop = find_loop(computer, batch_of(RUNS), forward_kwargs={"n_loops": N_STEPS})
    assert (loop.modules, loop.n_steps) == (("core",), N_STEPS)
    coverage = coverage_check(computer, batch_of(RUNS), loss_fn=Answer(), forward_kwargs={"n_loops": N_STEPS})
    assert max(coverage.differences) < 1e-9


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("times a b c", r"'times a b c': there is no operation 'times'; use one of \('copy', 'add'"),
        ("add a b", "'add a b': 'add' takes 3 operands: left, right, target"),
        ("copy a z", r"'copy a z': there is no cell 'z'; use one of \['a', 'b', 'c', 'one'\]"),
        ("branch a away", r"'branch a away': there is no label 'away'"),
    ],
)
def test_a_line_without_meaning_is_named(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        assemble(f"start: {text}\nhalt", CELLS)


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        ([], "must end with 'halt'"),
        ([Instruction("add")], "must end with 'halt'"),
        ([Instruction("jump"), Instruction("halt")], "line 0, .*there is no such operation"),
        ([Instruction("copy", left=4), Instruction("halt")], "line 0, .*the cells go from 0 to 3"),
        ([Instruction("branch", jump=2), Instruction("halt")], "line 0, .*the lines go from 0 to 1"),
    ],
)
def test_a_table_that_a_run_could_leave_is_refused(instructions: list[Instruction], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ProgramComputer(instructions, n_cells=4)

"""The computer: a table of instructions, an arithmetic unit, and a step that both repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_sdi.models.programs.assembly import OPERATIONS, WRITING, Instruction

ARITHMETIC = ((1.0, 0.0), (1.0, 1.0), (1.0, -1.0))
"""What each of `WRITING` makes of the left and the right cell."""


class ComputerOutput(NamedTuple):
    """What is in the computer after its last step."""

    memory: Tensor
    """``(n, c)`` the cells."""
    cost: Tensor
    """``(n,)`` the summed costs of the lines that were executed: their number while every line costs one."""


class ProgramComputer(nn.Module):
    r"""A looped model that executes one instruction a loop step, with weights that are set by hand.

    A step reads its line of the table (an embedding of the program counter), reads two cells of the memory (attention
    whose query is an address, and whose keys are all addresses), computes copy, sum and difference of the two (a linear
    layer), writes the chosen one, and sets the program counter to the line after it, or to where a branch goes. Whole
    numbers up to 2²⁴ in float32, 2⁵³ in float64, come out exactly.

    **A known answer.** Let r(t) be the line that a run reads at step t. The cost of a run, by which
    `captum_sdi.SDIInfluence` may be asked, is ``Σ_t costs[r(t)]`` over the steps before "halt": the program counter is
    a whole number, through which no gradient flows. So the gradient through step t is the unit vector of row r(t), and
    the influence of a train run's step s on a test run's step t is the product of two unit vectors:

        M[s, t] = 1 if both execute the same line there, else 0.

    That is written down from two traces of `interpret`, without any gradient, and `SDIInfluence.step_matrix` must find
    it. The loss is ``output.cost``; for a loss of the memory, M is a number of any size where the lines are the same,
    and still zero everywhere else.

    Args:
        instructions: The table, of one program or of several.
        n_cells: How many cells the memory has.

    Raises:
        ValueError: If an instruction names a cell or a line that is not there, or the last line may be run past.

    Example:
        >>> from captum_sdi.models.programs import assemble
        >>> instructions, labels = assemble("sum: add a b c \n halt", cells="abc")
        >>> computer = ProgramComputer(instructions, n_cells=3)
        >>> output = computer(torch.tensor([labels["sum"]]), torch.tensor([[2.0, 3.0, 0.0]]), n_loops=4)
        >>> output.memory.tolist(), output.cost.tolist()
        ([[2.0, 3.0, 5.0]], [1.0])
    """

    def __init__(self, instructions: Sequence[Instruction], n_cells: int) -> None:
        super().__init__()
        check_instructions(instructions, n_cells)
        self.core = ComputerStep(instructions, n_cells)

    def forward(
        self,
        start: Tensor,
        memory: Tensor,
        n_loops: int = 32,
    ) -> ComputerOutput:
        """Run `n_loops` steps from the lines `start` (n,) and the cells `memory` (n, c)."""
        counter = start.unsqueeze(-1)
        memory = memory.to(self.core.costs.weight)
        cost = memory.new_zeros(len(memory))
        for _ in range(n_loops):
            counter, memory, cost = self.core(counter, memory, cost)
        return ComputerOutput(memory, cost)


class ComputerStep(nn.Module):
    """One instruction: fetch, read, compute, write, and go on."""

    def __init__(self, instructions: Sequence[Instruction], n_cells: int) -> None:
        super().__init__()
        self.n_cells = n_cells
        table = encoded(instructions, n_cells)
        self.instructions = nn.Embedding.from_pretrained(table, freeze=False)
        unit_costs = torch.ones(len(table), 1)
        self.costs = nn.Embedding.from_pretrained(unit_costs, freeze=False)
        self.arithmetic = nn.Linear(2, len(WRITING), bias=False)
        weight = torch.tensor(ARITHMETIC)
        self.arithmetic.weight = nn.Parameter(weight, requires_grad=False)  # of the machine, not of a program

    def forward(
        self,
        counter: Tensor,
        memory: Tensor,
        cost: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next `counter` (n, 1), `memory` (n, c) and `cost` (n,)."""
        line = self.instructions(counter).squeeze(1)  # (n, fields)
        sizes = [len(OPERATIONS), self.n_cells, self.n_cells, self.n_cells, 1]
        operation, left, right, target, jump = line.split(sizes, dim=-1)

        left_cell = (left * memory).sum(-1)
        right_cell = (right * memory).sum(-1)
        operands = torch.stack([left_cell, right_cell], dim=-1)
        computed = self.arithmetic(operands)  # (n, one for each of WRITING)

        choices = operation[:, : len(WRITING)]
        chosen = (choices * computed).sum(-1, keepdim=True)
        old = (target * memory).sum(-1, keepdim=True)
        writes = choices.sum(-1, keepdim=True)
        memory = memory + writes * target * (chosen - old)

        operation_index = operation.detach().argmax(-1, keepdim=True)
        halts = operation_index == OPERATIONS.index("halt")
        is_branch = operation_index == OPERATIONS.index("branch")
        is_positive = left_cell.detach().unsqueeze(-1) > 0
        branches = is_branch & is_positive
        line_cost = self.costs(counter).squeeze(1)
        line_cost = line_cost.masked_fill(halts, 0)
        following = torch.where(halts, counter, counter + 1)
        jump_line = jump.detach().round().long()
        counter = torch.where(branches, jump_line, following)
        return counter, memory, cost + line_cost.squeeze(-1)


def encoded(instructions: Sequence[Instruction], n_cells: int) -> Tensor:
    """Return the table ``(lines, fields)``: the operation and three cells as unit vectors, and the line of a jump."""
    codes = [OPERATIONS.index(line.operation) for line in instructions]
    operations = torch.tensor(codes)
    operands = torch.tensor([line[1:] for line in instructions])
    lefts, rights, targets, jumps = operands.unbind(-1)
    fields = [F.one_hot(operations, len(OPERATIONS))]
    for cells in (lefts, rights, targets):
        one_hot_cells = F.one_hot(cells, n_cells)
        fields.append(one_hot_cells)
    fields.append(jumps.unsqueeze(-1))
    table = torch.cat(fields, dim=-1)
    return table.to(torch.get_default_dtype())


def check_instructions(instructions: Sequence[Instruction], n_cells: int) -> None:
    """Refuse a table that a run could leave.

    Raises:
        ValueError: If an instruction names a cell or a line that is not there, or the last line may be run past.
    """
    n_lines = len(instructions)
    if not instructions or instructions[-1].operation != "halt":
        raise ValueError("instructions= must end with 'halt', or a run could go on past the last line.")
    for number, line in enumerate(instructions):
        if line.operation not in OPERATIONS:
            raise ValueError(f"line {number}, {line}: there is no such operation; use one of {OPERATIONS}.")
        if not all(0 <= cell < n_cells for cell in (line.left, line.right, line.target)):
            raise ValueError(f"line {number}, {line}: the cells go from 0 to {n_cells - 1}.")
        if not 0 <= line.jump < n_lines:
            raise ValueError(f"line {number}, {line}: the lines go from 0 to {n_lines - 1}.")

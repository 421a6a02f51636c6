"""A looped model that is a computer: hand-set weights run programs, one instruction a loop step.

After Looped Transformers as Programmable Computers (Giannou et al. 2023). The influence of one run on another by loop
step is known without any gradient; see `ProgramComputer`.
"""

from captum_sdi.models.programs.assembly import Instruction, Run, assemble, interpret
from captum_sdi.models.programs.computer import ComputerOutput, ProgramComputer

__all__ = ["ComputerOutput", "Instruction", "ProgramComputer", "Run", "assemble", "interpret"]

"""The processes of one `accelerate launch` or `torchrun`: how many there are, and what they tell each other.

A thin face on `accelerate`, which is imported only where there are several.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Processes:
    """This process among those of its launch; alone when there was none.

    Args:
        device: Where the model is: processes whose models are on the CPU talk through gloo, even beside a GPU.

    Raises:
        ImportError: If there are several processes, and `accelerate` is not installed.

    Example:
        >>> Processes(torch.device("cpu")).gather("alone")
        ['alone']
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError(
                    "WORLD_SIZE says that there are several processes; an index is shared among them through "
                    "accelerate: pip install 'captum-sdi[train]'."
                ) from error
            self._state = PartialState(cpu=device.type == "cpu")
            self.rank, self.count = self._state.process_index, self._state.num_processes

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def gather(self, value: T) -> list[T]:
        """Exchange one value per process.

        Args:
            value: This process's; anything that can be pickled.

        Returns:
            The values of all processes, in the order of their ranks.
        """
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


class Turns:
    """Assign batches round-robin; deterministic, so no communication.

    Args:
        processes: Who takes turns.
        batches_per_turn: How many batches a process takes in a row.
    """

    def __init__(self, processes: Processes, batches_per_turn: int) -> None:
        self._processes, self._batches_per_turn = processes, batches_per_turn
        self._n_batches = 0

    def take(self) -> bool:
        """Assign the next batch, and say whether it is this process's."""
        turn = self._n_batches // self._batches_per_turn
        self._n_batches += 1
        return turn % self._processes.count == self._processes.rank

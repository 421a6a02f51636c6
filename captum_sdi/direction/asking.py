"""`direction` as a method of whatever puts questions."""

from __future__ import annotations

from typing import Any

from captum.log import log_usage

from captum_sdi.direction.direction import Direction
from captum_sdi.direction.gradients import group_gradients
from captum_sdi.direction.groups import Groups
from captum_sdi.study import PutsQuestions


class AsksForDirections(PutsQuestions):
    """The part of `SDIInfluence` that sums training gradients to directions."""

    @log_usage(part_of_slo=True)
    def direction(self, groups: Any, show_progress: bool = False) -> Direction:
        """Sum the gradients of groups of training examples, each to one direction in parameter space.

        Its `Direction.step_influence` is the sum of the group's scores with `Exact`, token by token, by forward passes
        alone. The sketch and the index are not used.

        Args:
            groups: Positions of training examples, ``[3, 7]``; or weights of all of them, floats ``(n,)`` or
                ``(g, n)``; or a mapping of names to either, such as a source, a label or a length.
            show_progress: Show a progress bar for each checkpoint.

        Returns:
            The directions of all groups.

        Raises:
            ValueError: If a group is no such thing, or the scores are not products of plain gradients.

        Example:
            >>> from captum_sdi import SDIInfluence
            >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
            >>> from captum_sdi.tasks import parity
            >>> train, test = parity(12, max_bits=4).split(held_out=2)
            >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
            >>> sdi = SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4)
            >>> direction = sdi.direction({"first": [0, 1, 2], "others": range(3, 10)})
            >>> direction.step_influence(test).trajectories.shape  # (q, g, t)
            torch.Size([2, 2, 3])
        """
        named = Groups.of(groups)
        study = self.study(show_progress=show_progress, with_index=False)
        return Direction(named, group_gradients(study, named), self._question)

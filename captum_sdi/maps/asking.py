"""`influence_map` as a method of whatever puts questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum.log import log_usage
from torch import Tensor

from captum_sdi.maps.axes import MapAxes
from captum_sdi.maps.compute import influence_map
from captum_sdi.maps.words import words_by
from captum_sdi.rehearsal import arguments
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.sketch.base import Sketch
from captum_sdi.sketch.exact import Exact
from captum_sdi.study import PutsQuestions


class AsksForMaps(PutsQuestions):
    """The part of `SDIInfluence` that splits the influence of chosen pairs."""

    @log_usage(part_of_slo=True)
    def influence_map(
        self,
        inputs: Any,
        indices: Sequence[int] | Tensor,
        axes: Sequence[str] = ("layer", "step"),
        sketch: Sketch | None = None,
        tokenizer: Any = None,
    ) -> InfluenceMap:
        """Split the influence of chosen pairs along any axes; the parts sum to the influence of the pair.

        Args:
            inputs: As for `influence`.
            indices: Positions of training examples, ``(k,)``, or ``(q, k)`` as in ``StepInfluence.indices``.
            axes: Names of axes, in any order; `captum_sdi.maps.axes` describes them.
            sketch: How gradients are represented; None: `Exact`, since pairs are few. An index is not used.
            tokenizer: Writes tokens as text: something with ``decode``, or a function from ids to strings.

        Returns:
            Values ``(q, k, *axes)`` with their labels.

        Raises:
            ValueError: If an axis is unknown, a loss does not tell tokens apart, a layer does not read positions, or
                the map does not fit into the memory.
        """
        question = self._question(inputs)
        pairs = arguments.checked_pairs(indices)
        arguments.check_sketch(Exact() if sketch is None else sketch)
        return influence_map(
            question,
            pairs,
            MapAxes.of(axes),
            sketch or Exact(),
            words_by(tokenizer),
        )

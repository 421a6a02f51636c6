"""Captum's progress bars, or none."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from captum._utils.progress import NullProgress, progress

from captum_sdi.words import warn_user

LONGEST = 40
"""Characters before a bar that does not say whose it is."""


@dataclass(frozen=True)
class Progress:
    """What the user is shown of a question's passes."""

    owner: str
    """Who does the work, as Captum's bars begin; empty where nobody asks, and the bar has more room."""
    is_shown: bool

    def bar(self, purpose: str, total: int | None) -> AbstractContextManager[Any]:
        """Return a bar to be used in a ``with`` block, with an ``update()``.

        Args:
            purpose: What the work is for, as in "compute influence for training batches".
            total: How many updates there will be; None where nobody knows.
        """
        if not self.is_shown:
            return NullProgress()
        text = f"Using {self.owner} to {purpose}" if self.owner else purpose[:LONGEST]
        return progress(desc=text, total=total, mininterval=0.0)


HIDDEN = Progress("", is_shown=False)
"""No bar at all."""


def warn_of_unknown_length() -> None:
    """Warn, in Captum's words, that a bar over batches has no end."""
    warn_user(
        "Unable to determine the number of batches in `inputs`. Therefore, if showing the progress of the "
        "computation of self influence scores, only the number of batches processed can be displayed, and not "
        "the percentage completion of the computation, nor any time estimates."
    )

"""`StepInfluence`: the result, saved and loaded without a model. The formula of its errors is in `contract`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.features import Columns
from captum_sdi.scores import result_tables
from captum_sdi.scores.checkpoint_shares import CheckpointShares
from captum_sdi.scores.contract import Scores
from captum_sdi.scores.files import read_tensors, write_tensors
from captum_sdi.scores.hubs import Hubs, find_hubs
from captum_sdi.scores.result_text import text_table
from captum_sdi.scores.words import Example, Words, as_note, from_note

_FORMAT, _NEWEST = "captum_sdi.StepInfluence", "2"
_NORMALIZED = "normalized"
_OPTIONAL = {"indices", "token_of"}
_NOT_TENSORS = {"words", "checkpoints", "is_normalized"}
"""Fields that a file keeps beside its tensors."""


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no one truth value, and too many numbers
class StepInfluence:
    """Influence split by the loop step of the test side at which it acts.

    ``influence_scores = trajectories.sum(-1) + prelude + coda``, up to rounding. Positive values are proponents: a
    gradient step on the training example lowers the loss of the test example. `SDIInfluence.step_self_influence`
    returns the same fields with one leading axis ``(n,)`` in place of ``(q, n)``.

    Example:
        >>> import torch
        >>> steps = torch.tensor([[[0.5, 0.25]]])  # one test example, one training example, two loop steps
        >>> zero = torch.zeros(1, 1)
        >>> result = StepInfluence(
        ...     indices=None, influence_scores=steps.sum(-1), trajectories=steps, prelude=zero, coda=zero,
        ...     n_steps=torch.tensor([2]), score_errors=zero, trajectory_errors=torch.zeros_like(steps))
        >>> print(result)
        StepInfluence of 1 test example x 1 training example, 2 loop steps
          train      total  ± error  largest step (from 0)
        test 0:
             #0  +7.50e-01    0e+00     0
    """

    indices: Tensor | None
    """``(q, k)`` the training examples, best first; None when all are given in order."""
    influence_scores: Tensor
    """``(q, n)`` or ``(q, k)`` the totals: TracIn."""
    trajectories: Tensor
    """``(q, n, t)`` or ``(q, k, t)`` one number per loop step; zero after a test example's last step."""
    prelude: Tensor
    """``(q, n)`` or ``(q, k)`` through uses of the parameters before the first loop step."""
    coda: Tensor
    """``(q, n)`` or ``(q, k)`` through uses of the parameters after the last loop step."""
    n_steps: Tensor
    """``(q,)`` how many loop steps each test example's batch ran."""
    score_errors: Tensor
    """``(q, n)`` or ``(q, k)`` the sketch's standard error of each total; zero with `Exact`.

    Estimated from the sketched norms: for one token per example and a small ``dim``, two of them cover less than 95%
    (93% at dim 128, 91% at 32, where measured).
    """
    trajectory_errors: Tensor
    """``(q, n, t)`` or ``(q, k, t)`` the sketch's standard error of each trajectory point.

    The best by one step (``k=``, ``rank_by=``) are chosen for being high: two errors cover 86% to 97% of them, and
    their scores exceed the exact ones by 4% at dim 2048 (13% pooled), 16% (50%) at 512, where measured; ``rerank=`` is
    the cure.
    """
    checkpoints: CheckpointShares | None = None
    """Which checkpoint speaks: each one's share of the scores; None where it is not known, as in older files."""
    words: Words | None = None
    """What the examples say, where their data sets remember it (`captum_sdi.texts`)."""
    token_of: Tensor | None = None
    """``(q, 2)`` with ``per="token"``: the test example of each row, and the position of its target token in the text;
    None where a row is a whole example."""
    is_normalized: bool = False
    """Whether gradients had unit norm: scores then have no unit, where they are drops in the test loss else."""

    @classmethod
    def from_sums(
        cls,
        scores: Scores,
        n_steps: Tensor,
        indices: Tensor | None = None,
        checkpoints: CheckpointShares | None = None,
    ) -> StepInfluence:
        """Build a result from columns of scores.

        Args:
            scores: Values and variances ``(..., b)`` in the order of `captum_sdi.features.Columns`.
            n_steps: ``(q,)`` how many loop steps each test example ran.
            indices: ``(q, k)`` the train examples; None when all are given in order.
            checkpoints: What each checkpoint contributed.

        Returns:
            The result, its errors the square roots of the variances.
        """
        values = scores.values
        errors = scores.variances.clamp(min=0).sqrt()
        return cls(
            indices=indices,
            influence_scores=values[..., Columns.TOTAL],
            trajectories=Columns.steps(values),
            prelude=values[..., Columns.PRELUDE],
            coda=values[..., Columns.CODA],
            n_steps=n_steps.to(values.device),
            score_errors=errors[..., Columns.TOTAL],
            trajectory_errors=Columns.steps(errors),
            checkpoints=checkpoints,
        )

    def hubs(self, k: int | None = None) -> Hubs:
        """Count which train examples fill the top lists of all test examples.

        A few examples with large gradients can be the top proponents of everything: such hubs say little about any one
        test example.

        Args:
            k: The length of the lists; None: that of the result, and 10 where it holds all train examples.

        Returns:
            The train examples in any list, those in most lists first.

        Raises:
            ValueError: If k is less than 1, or more than the result holds; or the result is of self-influence.

        Example:
            >>> steps = torch.tensor([[[3.0], [1.0], [2.0]], [[9.0], [5.0], [6.0]]])  # (q, n, t) = (2, 3, 1)
            >>> zero = torch.zeros(2, 3)
            >>> result = StepInfluence(None, steps.sum(-1), steps, zero, zero, torch.tensor([1, 1]), zero, 0 * steps)
            >>> print(result.hubs(k=2))
            2 of 3 training examples fill the top 2 of 2 test examples: #0 is in 2 lists, #2 in 2
        """
        return find_hubs(self.influence_scores, self.indices, k)

    def to(self, *args: object, **kwargs: object) -> StepInfluence:
        """Return the result on another device, or with its floating point fields in another dtype.

        Args:
            *args: As `torch.Tensor.to`: a device, a dtype, or both.
            **kwargs: As `torch.Tensor.to`.

        Returns:
            A new result; index fields keep their integer dtype.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)  # type: ignore[call-overload]
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        fields: dict[str, Any] = {}
        for name, tensor in self._fields():
            fields[name] = None if tensor is None else move(tensor)
        checkpoints = None if self.checkpoints is None else self.checkpoints.to(*args, **kwargs)
        return dataclasses.replace(self, **fields, checkpoints=checkpoints)

    def with_words(self, words: Words | None) -> StepInfluence:
        """Return the result with the words of its examples; those of a side of another length are left out.

        Args:
            words: Of both sides; None for none.

        Returns:
            A new result.
        """
        if words is None or self.influence_scores.dim() != 2:
            test_words = None
        else:
            n_tests = len(self.influence_scores)
            if self.token_of is not None:
                n_tests = 1 + int(self.token_of[:, 0].max())
            is_complete = words.test is not None and len(words.test) == n_tests
            test_words = words.test if is_complete else None
        known = None if words is None else Words(test_words, words.train)
        return dataclasses.replace(self, words=known)

    def save(self, path: str | os.PathLike[str], **notes: str) -> None:
        """Write every field to one safetensors file, whole or not at all, on the CPU and without pickle.

        Args:
            path: The file to write; an existing one is replaced, and a link stays one.
            **notes: Kept beside the fields, for programs that know of them.

        Raises:
            FileNotFoundError: If its folder does not exist.
            ValueError: If the path is a folder, a pipe or a device.
        """
        tensors = {name: value for name, value in self._fields() if value is not None}
        metadata = {**notes, **self._words_note(), "format": _FORMAT}
        if self.checkpoints is not None:
            share_tensors, names = self.checkpoints.as_saved()
            tensors |= share_tensors
            metadata |= names
        if self.is_normalized:
            metadata[_NORMALIZED] = "yes"
        is_plain = self.token_of is None and self.checkpoints is None and not self.is_normalized
        metadata["version"] = "1" if is_plain else _NEWEST  # an older library reads all that it knows
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepInfluence:
        """Read what `save` wrote.

        Args:
            path: A file written by `save`.

        Returns:
            The result, on the CPU.

        Raises:
            ValueError: The file holds something else, or is of a newer version.
        """
        name = os.fspath(path)
        tensors, metadata = read_tensors(path, cls.__name__, _NEWEST)
        checkpoints = CheckpointShares.from_saved(tensors, metadata, name)
        names = {field.name for field in dataclasses.fields(cls)} - _NOT_TENSORS
        missing = sorted(names - _OPTIONAL - set(tensors))
        unknown = sorted(set(tensors) - names)
        if missing or unknown or metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{name} is not a saved StepInfluence: missing fields {missing}, unknown fields {unknown}, format "
                f"{metadata.get('format')!r}. Pass a file written by StepInfluence.save."
            )
        fields: dict[str, Any] = {"indices": None, **tensors}
        is_normalized = metadata.get(_NORMALIZED) == "yes"
        result = cls(**fields, checkpoints=checkpoints, words=from_note(metadata), is_normalized=is_normalized)
        _check_agreement(name, result)
        return result

    def __repr__(self) -> str:
        shapes = (f"{name}={value if value is None else tuple(value.shape)}" for name, value in self._fields())
        return f"StepInfluence({', '.join(shapes)})"

    def __str__(self) -> str:
        return text_table(self)

    def to_pandas(
        self,
        texts: Sequence[Example] | None = None,
        test_texts: Sequence[Example] | None = None,
    ) -> Any:
        """Return a DataFrame with a row for each pair: tidy, for sorting, grouping and writing to other files.

        Args:
            texts: The training examples' texts by index, or mappings whose fields become columns, such as an ``id``;
                None: ``words``, if the result has any.
            test_texts: The test examples', likewise; their columns begin with ``test_``.

        Returns:
            Columns ``test`` (and ``token``, the position of the target, where each row is of one), ``rank``, ``train``,
            ``total``, ``error``, ``prelude``, ``coda``, ``step_0`` and so on, ``step_0_error`` and so on, counted from
            0 as ``rank_by`` is, and those of the texts. Of self-influence there is no ``test`` and no ``rank``.

        Raises:
            ImportError: If pandas is not installed.
        """
        words = self.words or Words(test=None, train=None)
        train_texts = words.train if texts is None else texts
        test_texts = words.test if test_texts is None else test_texts
        return result_tables.data_frame(self, train_texts, test_texts)

    def _repr_html_(self) -> str:
        """Return the strongest examples as a table, for notebooks."""
        return result_tables.html_table(self)

    def _fields(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and values of the fields that are tensors, or None."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _NOT_TENSORS]
        return ((name, getattr(self, name)) for name in names)

    def _words_note(self) -> dict[str, str]:
        """Return the words of the examples in the result, as `save` writes them."""
        if self.indices is None:
            n_train = self.influence_scores.shape[-1]
            return as_note(self.words, range(n_train))
        examples = self.indices.unique().tolist()
        return as_note(self.words, examples)


def _check_agreement(name: str, result: StepInfluence) -> None:
    """Check that the fields of a file belong together, and that indices are positions."""
    pairs, steps = result.influence_scores.shape, result.trajectories.shape
    shapes = {
        "trajectories": (*pairs, *steps[-1:]),
        "prelude": pairs,
        "coda": pairs,
        "n_steps": pairs[:1],
        "score_errors": pairs,
        "trajectory_errors": steps,
        "indices": pairs,
        "token_of": (*pairs[:1], 2),
    }
    for field, shape in shapes.items():
        tensor = getattr(result, field)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is damaged: {field} must be of shape {tuple(shape)}, not {tuple(tensor.shape)}.")
    if len(pairs) not in (1, 2) or len(steps) != len(pairs) + 1:
        raise ValueError(f"{name} is damaged: influence_scores must be of shape (q, n), not {tuple(pairs)}.")
    for field, tensor in result._fields():
        is_index = field in ("indices", "n_steps", "token_of")
        if tensor is not None and (tensor.dtype != torch.long if is_index else not tensor.is_floating_point()):
            raise ValueError(f"{name} is damaged: {field} must not be of {tensor.dtype}.")
    limits = {"indices": 2**48, "n_steps": steps[-1] + 1, "token_of": 2**48}
    for field, limit in limits.items():
        tensor = getattr(result, field)
        if tensor is None or not tensor.numel():
            continue
        smallest, largest = int(tensor.min()), int(tensor.max())
        if not 0 <= smallest <= largest < limit:
            raise ValueError(f"{name} is damaged: {field} must be from 0 to {limit - 1}.")

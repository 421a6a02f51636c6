"""`SDIInfluence`: the only file that knows Captum.

Checkpoints are the outermost loop, each loaded once per call. At a checkpoint the test side's features are computed
and kept; the training side's are never held: a batch is sketched, scored and forgotten, or read from an index.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from captum._utils.progress import NullProgress, progress
from captum.influence import TracInCPBase
from captum.influence._utils.common import KMostInfluentialResults
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from captum_sdi.checkpoints import checkpoint_names, find_checkpoints, load_checkpoint
from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import LossFn, default_loss
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import Columns, LoopSpec, StepFeatures
from captum_sdi.index import Faiss, SketchIndex, TrainIndex
from captum_sdi.index.search import Search
from captum_sdi.loop.parameters import as_loop
from captum_sdi.passes import Engine, Receive
from captum_sdi.scores.collect import Running, TopK, pick_winners, step_influence, top_k
from captum_sdi.scores.contract import Scores, pair_scores, self_scores, step_matrices, with_total
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.base import Sketch
from captum_sdi.sketch.exact import Exact
from captum_sdi.sketch.tensor_sketch import TensorSketch


class CaptumError(AssertionError, TypeError, ValueError):
    """A wrong argument for which Captum raises AssertionError, with its sentence; ours are ValueError or TypeError."""


class SDIInfluence(TracInCPBase):
    """Step-Decomposed Influence: which training examples shaped an output, and at which loop step.

    For checkpoints c with learning rates η_c, a test example z' and a training example z,

        SDI_t(z, z') = Σ_c η_c ⟨ Σ_s φ_s(w_c; z), φ_t(w_c; z') ⟩            (Kaissis et al., arXiv 2602.10097)

    where φ_t is the part of the gradient that flows through the t-th use of the looped block. The sum over t is
    TracIn (Pruthi et al. 2020), Captum's ``TracInCP``, whose arguments come first, in its order. Positive values are
    proponents: a gradient step on z lowers the loss of z'.

    Args:
        model: The model; every call gives it back exactly as it was.
        train_dataset: A Dataset, or a DataLoader that keeps its order; batches as in `captum_sdi.data`.
        checkpoints: A directory, a list of paths or an iterator of anything ``checkpoints_load_func`` takes, as in
            Captum. None: the model's current weights with η = 1.
        checkpoints_load_func: ``(model, checkpoint)`` to the learning rate; loads in place.
        layers: ``"loop"``: the loop's trainable parameters. None: every trainable parameter, as in Captum; uses before
            and after the loop are reported as prelude and coda. Or a list of module names, whose parameters count in
            full, frozen ones too.
        loss_fn: ``(output, labels)`` to losses; see `captum_sdi.data`. None: next-token cross-entropy, averaged
            over each example's targets and compared once with the model's own loss where it has one.
        batch_size: Examples per batch of a Dataset. It changes the time and the memory, never a score. ``"auto"``: the
            largest that fits, up to 256 on a GPU; on a CPU 16, which does not say when it runs out of memory.
        test_loss_fn: The test side's loss; None: ``loss_fn``.
        loop: What repeats: a module's name, names, a `LoopSpec`; None finds it.
        sketch: `TensorSketch` or `Exact`.
        collate_fn: Collates the rows of a Dataset; None pads ragged rows (`captum_sdi.data.Collator`).
        forward_kwargs: Further keywords for the model's forward, or a function of the batch that returns them.
        test_forward_kwargs: The test side's, e.g. another number of loop steps; None: ``forward_kwargs``.
        activation_checkpointing: Recompute the looped blocks in the backward pass instead of keeping their
            activations.
        index: A folder. The train side's sketches are written to it once (`build_index`, or the first call, by all
            processes of an `accelerate launch` or `torchrun`) and read from it ever after.
        index_dtype: How a new index stores them: float32, or float16 or bfloat16 at half the size; None: as they
            are computed, float32 with `TensorSketch`.
        search: `Faiss` to find the top ``k`` of a large index; None compares every row.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument cannot be right: an unknown layer, no trainable parameter, no checkpoint, a loader that
            shuffles, a model on the meta device or on several devices.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> sdi = SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4)
        >>> result = sdi.step_influence(test, k=5)
        >>> result.indices.shape, result.trajectories.shape  # (q, k) and (q, k, t)
        (torch.Size([2, 5]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any = None,
        checkpoints_load_func: Callable[[nn.Module, Any], float] = load_checkpoint,
        layers: str | Sequence[str] | None = "loop",
        loss_fn: nn.Module | LossFn | None = None,
        batch_size: int | Literal["auto"] | None = 1,
        test_loss_fn: nn.Module | LossFn | None = None,
        *,
        loop: str | Sequence[str] | LoopSpec | None = None,
        sketch: Sketch = TensorSketch(dim=2048, seed=0),
        collate_fn: Callable[[Any], Any] | None = None,
        forward_kwargs: ForwardKwargs | None = None,
        test_forward_kwargs: ForwardKwargs | None = None,
        activation_checkpointing: bool = False,
        index: str | os.PathLike[str] | None = None,
        index_dtype: torch.dtype | None = None,
        search: Faiss | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if not isinstance(sketch, Sketch):
            raise TypeError(f"sketch= must be TensorSketch(...) or Exact(), got {sketch!r}.")
        if search is not None and (index is None or not isinstance(search, Faiss)):
            raise TypeError(f"search= must be Faiss(...), beside index=; got {search!r}, index={index!r}.")
        _check_placement(model)
        self._collate = collate_fn or Collator(_pad_token_id(model))
        auto = batch_size == "auto"
        batch_size = _most_examples(model) if batch_size == "auto" else batch_size
        train_loader = self._loader(train_dataset, batch_size, "train_dataset")
        super().__init__(model, train_loader, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn)
        self.layers, self.sketch = _checked_layers(layers), sketch
        self._activation_checkpointing = activation_checkpointing
        train_loss = _checked_loss(loss_fn, "loss_fn") or default_loss(model)
        test_loss = _checked_loss(test_loss_fn, "test_loss_fn") or train_loss
        test_kwargs = forward_kwargs if test_forward_kwargs is None else test_forward_kwargs
        self._train = Side("train", train_loss, forward_kwargs)
        test_argument = "loss_fn" if test_loss_fn is None else "test_loss_fn"
        self._test = Side("test", test_loss, test_kwargs, test_argument)
        self._engine = Engine(model, self._load, layers, as_loop(loop), sketch, activation_checkpointing)
        self._index = None if index is None else TrainIndex(index, index_dtype, self._engine, self._train, search)
        if auto and not isinstance(train_dataset, DataLoader):
            self.batch_size = self._engine.largest_batch(self._trains(), self._train)
            self.train_dataloader = self._loader(train_dataset, self.batch_size, "train_dataset")

    @property
    def loop(self) -> LoopSpec | None:
        """What repeats; None until the first call when it has to be found."""
        return self._engine.loop

    @property
    def checkpoints(self) -> list[Any]:
        """The checkpoints in order; ``[None]`` stands for the model's current weights."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        self._checkpoints = find_checkpoints(checkpoints)

    # --- public methods ---

    def build_index(self, show_progress: bool = False) -> SketchIndex:
        """Writes the train side's sketches under ``index=``, as far as they are not there.

        Killed at any moment, it goes on from there the next time. Every train example is read and compared with what
        the index says of it.

        Args:
            show_progress: Show a progress bar for each checkpoint.

        Returns:
            The index; ``print`` shows its summary.

        Raises:
            ValueError: No ``index=`` was given, or it is of something else.
            OSError: Another process is building it, the folder is read-only, or the disk is full.
        """
        if self._index is None:
            raise ValueError("build_index() needs a folder to write to: SDIInfluence(..., index='folder').")
        trains, names = self._trains(), checkpoint_names(self.checkpoints)

        def visit(i: int, eta: float) -> None:
            self._complete(trains, names[i], eta, show_progress, thorough=i == 0)

        self._engine.sweep(self.checkpoints, (trains, self._train), visit)
        return self._index.opened

    @log_usage(part_of_slo=True)
    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        rerank: int | None = None,
    ) -> Tensor | KMostInfluentialResults:
        """Total influence of every training example on every test example: TracIn.

        Args:
            inputs: Test examples: a batch (tuple or mapping), a DataLoader, or a Dataset.
            k: None for all training examples, or how many of the most influential ones; clipped to n.
            proponents: With ``k``: the highest influences first; False: the lowest.
            show_progress: Show a progress bar.
            aggregate: Influence on the sum of the test losses: q becomes 1.
            rerank: With ``k``: so many candidates by sketch, at least k, are ordered anew by exact gradients.

        Returns:
            ``(q, n)``, or ``KMostInfluentialResults(indices, influence_scores)``, each ``(q, k)``.
        """
        stream = self._stream(inputs)
        _check_k(k, rerank)
        if k is None:
            totals = Running()

            def receive(i: int, _: Tensor, eta: float, scores: Scores) -> None:
                totals.add(i, eta * scores.values[..., 0])

            what = "compute influence for training batches" if show_progress else None
            self._pairs(stream, receive, False, aggregate, what)
            return totals.result()
        what = _top_k_text(proponents) if show_progress else None
        if rerank is not None:
            best = self._reranked(stream, k, rerank, proponents, 0, aggregate, what)
            assert best.indices is not None
            return KMostInfluentialResults(best.indices, best.influence_scores)
        return KMostInfluentialResults(*self._ranked(stream, k, proponents, 0, aggregate, what))

    def _influence(self, inputs: Any, show_progress: bool = False, aggregate: bool = False) -> Tensor:
        """Captum's abstract method: `influence` without ``k``."""
        return self.influence(inputs, show_progress=show_progress, aggregate=aggregate)

    def _get_k_most_influential(
        self, inputs: Any, k: int = 5, proponents: bool = True, show_progress: bool = False, aggregate: bool = False
    ) -> KMostInfluentialResults:
        """Captum's abstract method: `influence` with ``k``."""
        return self.influence(inputs, k, proponents, show_progress, aggregate)

    @log_usage(part_of_slo=True)
    def step_influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        rank_by: int | None = None,
        rerank: int | None = None,
    ) -> StepInfluence:
        """Influence of every training example on every test example, one number per loop step, with standard errors.

        Args:
            inputs: As for `influence`.
            k: As for `influence`. Memory then grows by one number per pair, never by trajectories.
            proponents: As for `influence`.
            show_progress: As for `influence`.
            aggregate: As for `influence`.
            rank_by: With ``k``: a 0-based loop step to rank by, instead of the total.
            rerank: As for `influence`; what is returned is then exact, its errors zero.

        Returns:
            Totals, trajectories, their standard errors; ``(q, n, t)`` or ``(q, k, t)``.

        Raises:
            ValueError: ``rank_by`` without ``k``, or beyond the deepest test example's last step.
        """
        stream = self._stream(inputs)
        _check_k(k, rerank)
        if rank_by is not None and (k is None or not _is_int(rank_by) or rank_by < 0):
            raise ValueError(
                f"rank_by={rank_by!r} is a 0-based loop step to rank the top k by: pass k=, and an int of 0 or more."
            )
        if k is None:
            return self._all_steps(stream, aggregate, show_progress)
        column = 0 if rank_by is None else Columns.of_step(rank_by)
        what = _top_k_text(proponents) if show_progress else None
        if rerank is not None:
            return self._reranked(stream, k, rerank, proponents, column, aggregate, what)
        if self._index is not None:
            return self._top_steps_of_index(stream, k, proponents, column, aggregate, what)
        if len(self.checkpoints) == 1:
            return self._top_steps_in_one_pass(stream, k, proponents, column, aggregate, what)
        return self._top_steps(stream, k, proponents, column, aggregate, what)

    @log_usage(part_of_slo=True)
    def step_matrix(self, inputs: Any, indices: Sequence[int] | None = None) -> Tensor:
        """Influence of every training step on every test step, ``SDI_{s,t}``.

        Args:
            inputs: As for `influence`.
            indices: Positions of the training examples to compute; None: all.

        Returns:
            ``(q, n, s, t)`` over loop steps; summed over s it is the trajectory less what comes from outside the loop.

        Raises:
            ValueError: An index is not in the training set.
        """
        tests = self._stream(inputs)
        trains = self._trains()
        wanted = None if indices is None else _as_indices(indices)
        matrices, found = Running(), Running()

        def visit(position: int, eta: float) -> None:
            tested = self._engine.features(tests, self._test, by_step=True)
            blocks = self._engine.blocks(trains, self._train, by_step=True, only=wanted)
            for i, (positions, trained) in enumerate(blocks):
                matrix = eta * step_matrices(tested, trained)
                matrices.add(i, matrix)
                if position == 0:
                    found.add(i, positions.unsqueeze(0))

        self._engine.sweep(self.checkpoints, (trains, self._train), visit)
        if wanted is None:
            return matrices.result()
        places = {index: place for place, index in enumerate(found.result()[0].tolist())}
        missing = [index for index in wanted.tolist() if index not in places]
        if missing:
            raise ValueError(f"indices= names training examples {missing}, which train_dataset does not have.")
        return matrices.result()[:, [places[index] for index in wanted.tolist()]]

    @log_usage(part_of_slo=True)
    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """Influence of every example on itself, with the training side's loss and settings.

        Args:
            inputs: As for `influence`; None: the training set.
            show_progress: Show a progress bar over batches.
            outer_loop_by_checkpoints: Show one over checkpoints, too. Each checkpoint is loaded once in any case.

        Returns:
            ``(n,)``.
        """
        values, _, _ = self._self(inputs, False, show_progress, outer_loop_by_checkpoints)
        return values[:, 0]

    @log_usage(part_of_slo=True)
    def step_self_influence(self, inputs: Any = None, show_progress: bool = False) -> StepInfluence:
        """Influence of every example on itself, one number per loop step.

        Args:
            inputs: As for `self_influence`.
            show_progress: As for `self_influence`.

        Returns:
            A result with one leading axis ``(n,)``.
        """
        return step_influence(None, *self._self(inputs, True, show_progress, False))

    @log_usage(part_of_slo=True)
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False, test: bool = False) -> Tensor:
        """Vectors whose dot products are influences: of a training row with a test row, √η on each side.

        Args:
            inputs: As for `influence`.
            aggregate: Return the sum over the examples: n becomes 1.
            test: Use the test side's loss and settings.

        Returns:
            ``(n, D)``, D = checkpoints x parameters x d with `TensorSketch` (rows of parameters kept exactly are
            padded with zeros), checkpoints x all targeted parameters' entries with `Exact`.

        Raises:
            ValueError: A learning rate is negative.
        """
        side = self._test if test else self._train
        stream = self._stream(inputs, side)
        width = self.sketch.dim if isinstance(self.sketch, TensorSketch) else 0
        columns: list[Tensor] = []

        def visit(_: int, eta: float) -> None:
            if eta < 0:
                raise ValueError(f"A learning rate of {eta} has no square root; influence() takes it.")
            features = self._engine.features(stream, side, False, aggregate)
            rows = [F.pad(row[:, 0], (0, max(0, width - row.shape[-1]))) for row in features.rows.values()]
            columns.append(math.sqrt(eta) * torch.cat([row.to(rows[0].device) for row in rows], 1))

        self._engine.sweep(self.checkpoints, (stream, side), visit)
        return torch.cat(columns, dim=1)

    # --- pairs: all of them, or the top k ---

    def _pairs(
        self,
        tests: Stream,
        receive: Receive,
        by_step: bool,
        aggregate: bool,
        what: str | None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Scores of all pairs, under a progress bar when ``what`` says what for; from the index where there is one."""
        if self._index is not None:
            search, n_steps = self._search(tests, by_step, aggregate, what is not None)
            for i, positions, scores in search.scores():
                receive(i, positions, 1.0, scores)
            return n_steps
        trains = self._trains()
        total = None if self.train_dataloader_len is None else self.train_dataloader_len * len(self.checkpoints)
        with self._bar(what, total) as bar:

            def counted(i: int, positions: Tensor, eta: float, scores: Scores) -> None:
                receive(i, positions, eta, scores)
                bar.update()

            sides = (trains, self._train), (tests, self._test)
            return self._engine.pairs(self.checkpoints, *sides, counted, by_step, aggregate, only)

    def _all_steps(self, tests: Stream, aggregate: bool, show_progress: bool) -> StepInfluence:
        values, variances = Running(), Running()

        def receive(i: int, _: Tensor, eta: float, scores: Scores) -> None:
            values.add(i, eta * scores.values)
            variances.add(i, eta**2 * scores.variances)

        what = "compute step influence for training batches" if show_progress else None
        n_steps = self._pairs(tests, receive, True, aggregate, what)
        return step_influence(None, values.result(), variances.result(), n_steps)

    def _top_steps_in_one_pass(
        self, tests: Stream, k: int, proponents: bool, column: int, aggregate: bool, what: str | None
    ) -> StepInfluence:
        """With one checkpoint the running top k carries its trajectories along."""
        best = TopK(k, proponents)

        def receive(_: int, positions: Tensor, eta: float, scores: Scores) -> None:
            values = eta * scores.values
            best.add(positions, _column(values, column), values, eta**2 * scores.variances)

        n_steps = self._pairs(tests, receive, True, aggregate, what)
        indices, _, values, variances = best.result()
        return step_influence(indices, values, variances, n_steps)

    def _top_steps(
        self, tests: Stream, k: int, proponents: bool, column: int, aggregate: bool, what: str | None
    ) -> StepInfluence:
        """With several, one pass finds the winners by one number per pair, a short one computes their trajectories."""
        indices, _ = self._ranked(tests, k, proponents, column, aggregate, what)
        values, variances = Running(), Running()

        def collect(_: int, positions: Tensor, eta: float, scores: Scores) -> None:
            values.add(0, eta * pick_winners(indices, positions, scores.values))
            variances.add(0, eta**2 * pick_winners(indices, positions, scores.variances))

        what = None if what is None else "compute the winners' trajectories for training batches"
        n_steps = self._pairs(tests, collect, True, aggregate, what, only=indices.unique().cpu())
        return step_influence(indices, values.result(), variances.result(), n_steps)

    def _ranked(
        self, tests: Stream, k: int, proponents: bool, column: int, aggregate: bool, what: str | None
    ) -> tuple[Tensor, Tensor]:
        """Positions and scores ``(q, k)`` of the winners by one number per pair."""
        if self._index is not None:
            search, _ = self._search(tests, column > 0, aggregate, what is not None)
            _check_column(search.n_columns, column)
            return search.top(column, k, proponents)
        ranked, widths = Running(), set()

        def rank(i: int, _: Tensor, eta: float, scores: Scores) -> None:
            widths.add(scores.values.shape[-1])
            inside = column < scores.values.shape[-1]  # a checkpoint may make the test side run fewer steps
            ranked.add(i, eta * scores.values[..., column] if inside else torch.zeros_like(scores.values[..., 0]))

        self._pairs(tests, rank, column > 0, aggregate, what)
        _check_column(max(widths), column)
        return top_k(ranked.result(), k, proponents)

    def _reranked(
        self, tests: Stream, k: int, rerank: int, proponents: bool, column: int, aggregate: bool, what: str | None
    ) -> StepInfluence:
        """Sketches shortlist, exact gradients of the shortlisted train examples decide."""
        shortlist = self._ranked(tests, rerank, proponents, column, aggregate, what)[0].sort(dim=1).values
        exact = Engine(self.model, self._load, self.layers, self.loop, Exact(), self._activation_checkpointing)
        trains, values, depths = self._trains(), Running(axis=0), Running(axis=0)

        def visit(position: int, eta: float) -> None:
            start = 0
            for i, tested in enumerate(exact.parts(tests, self._test, aggregate)):
                mine = shortlist[start : start + tested.size]
                for positions, trained in exact.blocks(trains, self._train, False, mine.unique().cpu()):
                    values.add(i, eta * pick_winners(mine, positions, pair_scores(with_total(tested), trained).values))
                if position == 0:
                    depths.add(i, tested.n_steps)
                start += tested.size

        exact.sweep(self.checkpoints, (trains, self._train), visit)
        scores = values.result()
        order, _ = top_k(_column(scores, column), k, proponents)
        best = scores.gather(1, order.unsqueeze(-1).expand(-1, -1, scores.shape[-1]))
        return step_influence(shortlist.gather(1, order), best, torch.zeros_like(best), depths.result())

    # --- the index ---

    def _complete(self, trains: Stream, name: str, eta: float, show_progress: bool, thorough: bool = False) -> None:
        """`TrainIndex.complete`, under a progress bar if there is something to compute."""
        assert self._index is not None
        what = f"index training batches at {name}" if show_progress else None
        self._index.complete(trains, name, eta, thorough, lambda: self._bar(what, self.train_dataloader_len))

    def _search(self, tests: Stream, by_step: bool, aggregate: bool, show_progress: bool) -> tuple[Search, Tensor]:
        """The test examples beside the index, completed where rows are missing, and their depths ``(q,)``."""
        assert self._index is not None
        trains, names = self._trains(), checkpoint_names(self.checkpoints)
        tested: list[StepFeatures] = []
        etas: list[float] = []

        def visit(i: int, eta: float) -> None:
            self._complete(trains, names[i], eta, show_progress)
            tested.append(with_total(self._engine.features(tests, self._test, by_step, aggregate)))
            etas.append(eta)

        self._engine.sweep(self.checkpoints, (trains, self._train), visit)
        search = self._index.search(names, etas, tested)
        return search, torch.stack([test.n_steps for test in tested]).amax(0)

    def _top_steps_of_index(
        self, tests: Stream, k: int, proponents: bool, column: int, aggregate: bool, what: str | None
    ) -> StepInfluence:
        """The index finds the winners; of them alone trajectories are computed."""
        search, n_steps = self._search(tests, True, aggregate, what is not None)
        _check_column(search.n_columns, column)
        indices, _ = search.top(column, k, proponents)
        scores = search.winners(indices)
        return step_influence(indices, scores.values, scores.variances, n_steps)

    def _self(self, inputs: Any, by_step: bool, show_progress: bool, outer_bar: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Values and variances ``(n, b)`` of every example against itself, and depths ``(n,)``."""
        stream = self._trains() if inputs is None else self._stream(inputs, self._train)
        indexed = self._index if inputs is None and not by_step else None
        names = checkpoint_names(self.checkpoints)
        values, variances, depths = Running(axis=0), Running(axis=0), Running(axis=0)
        n_checkpoints, n_batches = len(self.checkpoints), _length(stream) if show_progress else None
        text = "compute self influence. Processing"
        total = n_batches if outer_bar or n_batches is None else n_batches * n_checkpoints

        def visit(position: int, eta: float) -> None:
            with self._bar(f"{text} batch" if show_progress and outer_bar else None, total) as batches:
                if indexed is None:
                    blocks = self._engine.blocks(stream, self._train, by_step)
                else:
                    self._complete(stream, names[position], eta, False)
                    blocks = indexed.blocks(names[position])
                for i, (_, features) in enumerate(blocks):
                    scores = self_scores(features)
                    values.add(i, eta * scores.values)
                    variances.add(i, eta**2 * scores.variances)
                    if position == 0:
                        depths.add(i, features.n_steps)
                    (batches if outer_bar else outer).update()
            outer.update(int(outer_bar))

        outer_text, outer_total = (f"{text} checkpoint", n_checkpoints) if outer_bar else (f"{text} batch", total)
        with self._bar(outer_text if show_progress else None, outer_total) as outer:
            self._engine.sweep(self.checkpoints, (stream, self._train), visit)
        return values.result(), variances.result(), depths.result()

    # --- what the user passed ---

    def _bar(self, what: str | None, total: int | None) -> Any:
        if what is None:
            return NullProgress()
        return progress(desc=f"Using {self.get_name()} to {what}", total=total, mininterval=0.0)

    def _load(self, model: nn.Module, checkpoint: Any) -> float:
        return self.checkpoints_load_func(model, checkpoint)

    def _loader(self, data: Any, batch_size: int | None, argument: str) -> DataLoader[Any]:
        """A DataLoader as it is, a Dataset in batches and in order."""
        if isinstance(data, DataLoader):
            Stream(data, argument)  # refuses a shuffled one
            return data
        if not _is_int(batch_size):
            raise CaptumError(f"since the `{argument}` argument was a `Dataset`, `batch_size` must be an int.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not isinstance(data, IterableDataset) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(
                f"{argument} must be a Dataset or a DataLoader, got {type(data).__name__}. Of rows that come one after "
                "the other make a list, or an IterableDataset that can be read again."
            )
        return DataLoader(data, batch_size, shuffle=False, collate_fn=self._collate)

    def _trains(self) -> Stream:
        return Stream(self.train_dataloader, "train_dataset", self._train.loss_fn)

    def _stream(self, inputs: Any, side: Side | None = None) -> Stream:
        """Examples in any of the forms they come in, for the test side if no other is named."""
        if inputs is None:
            raise CaptumError(
                "`inputs` argument is required. If you wish to calculate self influence scores, please use the "
                "`self_influence` method instead."
            )
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if isinstance(ids, Tensor) and ids.ndim == 1:
            raise ValueError("inputs is one row of a dataset, not a batch of rows: pass it in a list, [row].")
        if isinstance(inputs, tuple | Mapping) or (isinstance(inputs, list) and not _are_rows(inputs)):
            loader: Iterable[Any] = [inputs]
        else:
            loader = self._loader(inputs, self.batch_size or 1, "inputs")
        return Stream(loader, "inputs", (side or self._test).loss_fn)


def _check_placement(model: nn.Module) -> None:
    """Refuses a model whose parameters are nowhere, or in several places."""
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), name)
    if "meta" in places:
        raise ValueError(
            f"The model has no weights: {places['meta']!r} is on the meta device. Load it first; if a device_map "
            "offloaded it to the CPU or to disk, load the model on one device instead."
        )
    if len(places) > 1:
        raise ValueError(
            f"The model is spread over several devices: {places}. Put it on one, with model.to(device), or load it "
            "without device_map."
        )


def _most_examples(model: nn.Module) -> int:
    """Where the search for a batch size begins."""
    return 256 if any(parameter.is_cuda for parameter in model.parameters()) else 16


def _pad_token_id(model: nn.Module) -> int:
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    return getattr(config, "pad_token_id", None) or 0


def _checked_layers(layers: Any) -> str | Sequence[str] | None:
    if layers is None or layers == "loop":
        return layers
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise CaptumError(
            f"`layers` should be a list! It is {layers!r}; pass layers=[{layers!r}] for one layer, 'loop' for the "
            "loop's trainable parameters, or None for every trainable parameter."
        )
    if len(layers) == 0:
        raise CaptumError("`layers` cannot be empty! Pass None for every trainable parameter, or name some modules.")
    if not all(isinstance(layer, str) for layer in layers):
        raise CaptumError(f"`layers` should contain str layer names. It is {layers!r}.")
    return layers


def _checked_loss(loss_fn: Any, argument: str) -> LossFn | None:
    if loss_fn is None:
        return None
    if not callable(loss_fn):
        raise CaptumError(f"{argument} must be a function of (output, labels), got {type(loss_fn).__name__}.")
    if not hasattr(loss_fn, "reduction"):
        warnings.warn(  # begins with Captum's sentence
            f'Since `{argument}` has no "reduction" attribute, the implementation assumes that `{argument}` is a '
            '"per-example" loss function if it returns one value per example, and calls it on one example at a time '
            "if it returns a scalar. Please ensure that this is the case.",
            stacklevel=3,
        )
    return loss_fn


def _check_k(k: Any, rerank: Any) -> None:
    if k is not None and (not _is_int(k) or k < 1):
        raise ValueError(f"k must be an int of at least 1, or None for all training examples; got {k!r}.")
    if rerank is None:
        return
    if k is None or not _is_int(rerank) or rerank < k:
        raise ValueError(
            f"rerank={rerank!r} is how many candidates exact gradients decide among: pass k=, and at least k."
        )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _top_k_text(proponents: bool) -> str:
    found = "proponents" if proponents else "opponents"
    return f"perform computation for getting {found}. Processing training batches"


def _column(values: Tensor, column: int) -> Tensor:
    _check_column(values.shape[-1], column)
    return values[..., column]


def _check_column(n_columns: int, column: int) -> None:
    if column >= n_columns:
        deepest = Columns.n_steps(n_columns)
        raise ValueError(f"rank_by={Columns.n_steps(column)}, but the test side runs {deepest} loop steps (0-based).")


def _as_indices(indices: Sequence[int]) -> Tensor:
    wanted = torch.as_tensor(indices).cpu()
    if wanted.ndim != 1 or wanted.is_floating_point() or len(wanted) == 0 or bool((wanted < 0).any()):
        raise ValueError(f"indices must be a list of positions in train_dataset, 0 or more; got {indices!r}.")
    return wanted


def _are_rows(inputs: list[Any]) -> bool:
    """A list of a dataset's rows, as opposed to a batch given as a list of tensors."""
    return all(isinstance(row, Mapping | tuple) for row in inputs)


def _length(stream: Stream) -> int | None:
    try:
        return len(stream)
    except TypeError:
        warnings.warn(  # Captum's sentence
            "Unable to determine the number of batches in `inputs`. Therefore, if showing the progress of the "
            "computation of self influence scores, only the number of batches processed can be displayed, and not "
            "the percentage completion of the computation, nor any time estimates.",
            stacklevel=3,
        )
        return None

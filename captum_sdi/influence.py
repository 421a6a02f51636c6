"""`SDIInfluence`: Captum's interface. Arguments in, results out; what is computed is in `captum_sdi.queries`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from captum.influence import TracInCPBase
from captum.influence._utils.common import KMostInfluentialResults
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from captum_sdi import queries
from captum_sdi.checkpoints import check_checkpoints, find_checkpoints, listed_checkpoints, load_checkpoint
from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.collate import Collator
from captum_sdi.data.examples import Examples
from captum_sdi.data.losses import LossFn, default_loss
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.direction.asking import AsksForDirections
from captum_sdi.features import Columns, LoopSpec
from captum_sdi.index import Faiss, SketchIndex, TrainIndex
from captum_sdi.inputs import as_batches, as_loader, padding_token
from captum_sdi.loop.parameters import as_loop
from captum_sdi.maps.asking import AsksForMaps
from captum_sdi.maps.per_checkpoint import checkpoint_step_influence
from captum_sdi.maps.per_token import token_step_influence
from captum_sdi.passes import Engine, largest_batch, most_examples
from captum_sdi.preconditioners import Identity, Preconditioner, summed_checkpoints
from captum_sdi.preconditioners.shelf import Shelf
from captum_sdi.progress import Progress, warn_of_unknown_length
from captum_sdi.rehearsal import arguments
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.ranking import Ranking
from captum_sdi.scores.result import StepInfluence
from captum_sdi.scores.words import with_words, words_of
from captum_sdi.sketch.base import Sketch
from captum_sdi.sketch.tensor_sketch import TensorSketch
from captum_sdi.study import Normalize, Question, Study


class SDIInfluence(AsksForMaps, AsksForDirections, TracInCPBase):
    """Step-Decomposed Influence: which training examples shaped an output, and at which loop step.

    For checkpoints c with learning rates η_c, a test example z' and a training example z,

        SDI_t(z, z') = Σ_c η_c ⟨ Σ_s φ_s(w_c; z), φ_t(w_c; z') ⟩            (Kaissis et al., arXiv 2602.10097)

    where φ_t is the part of the gradient that flows through the t-th use of the looped block. The sum over t is
    TracIn (Pruthi et al. 2020), Captum's ``TracInCP``, whose arguments come first, in its order. Positive values are
    proponents: a gradient step on z lowers the loss of z'.

    Args:
        model: The model. Every call gives it back exactly as it was.
        train_dataset: A Dataset, or a DataLoader that keeps its order; batches as in `captum_sdi.data.batch`.
        checkpoints: A directory, a list of paths or an iterator of anything ``checkpoints_load_func`` takes, as in
            Captum. None: the model's current weights with η = 1.
        checkpoints_load_func: ``(model, checkpoint)`` to the learning rate; loads in place.
        layers: ``"loop"``: the loop's trainable parameters. None: every trainable parameter, as in Captum; uses before
            and after the loop are reported as prelude and coda. Or a list of module names, whose parameters count in
            full, frozen ones too.
        loss_fn: ``(output, labels)`` to losses; see `captum_sdi.data.batch`. None: next-token cross-entropy, averaged
            over each example's targets and compared once with the model's own loss where it has one.
        batch_size: Examples per batch of a Dataset. It changes no score, or an error says so. ``"auto"``: the
            largest that fits, up to 256 on a GPU; on a CPU 16, which does not say when it runs out of memory.
        test_loss_fn: The test side's loss; None: ``loss_fn``.
        sample_wise_grads_per_batch: Captum's promise that both losses reduce over a batch (True) or do not. Gradients
            are per example either way.
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
        preconditioner: A linear map on the test side's gradients, such as ``Fisher()`` or ``Hessian()`` of
            `captum_sdi.preconditioners`, which say what a score then is; None: the identity.
        normalize: ``"train"``: divide every training example's gradient at each checkpoint by its norm, so that large
            gradients do not win everything; ``"both"``: the test side's too, behind the preconditioner: cosines. Norms
            are those of whole gradients, so that loop steps still sum.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument cannot be right: an unknown layer, no trainable parameter, no checkpoint, a loader
            that shuffles, a model on the meta device or on several devices.
        AssertionError: As in Captum: if ``batch_size`` is no int beside a Dataset, or a loss breaks the promise.

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
        sample_wise_grads_per_batch: bool | None = None,
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
        preconditioner: Preconditioner | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        self.preconditioner = Identity() if preconditioner is None else preconditioner
        arguments.check_model(model)
        arguments.check_methods(sketch, self.preconditioner, search, index)
        self._collate = collate_fn or Collator(padding_token(model))
        first_size = most_examples(model) if batch_size == "auto" else batch_size
        loader = as_loader(train_dataset, first_size, self._collate, "train_dataset")
        super().__init__(model, loader, checkpoints, checkpoints_load_func, loss_fn, first_size, test_loss_fn)
        arguments.check_layers(layers)
        arguments.check_normalize(normalize)
        self.layers, self.sketch, self.normalize = layers, sketch, normalize
        train_loss = arguments.checked_loss(loss_fn, "loss_fn", sample_wise_grads_per_batch) or default_loss(model)
        test_loss = arguments.checked_loss(test_loss_fn, "test_loss_fn", sample_wise_grads_per_batch) or train_loss
        test_kwargs = forward_kwargs if test_forward_kwargs is None else test_forward_kwargs
        test_argument = "loss_fn" if test_loss_fn is None else "test_loss_fn"
        self._train_side = Side("train", train_loss, forward_kwargs)
        self._test_side = Side("test", test_loss, test_kwargs, test_argument)
        self._engine = Engine(
            model, self._load, layers, as_loop(loop), sketch, activation_checkpointing=activation_checkpointing
        )
        self._index = None if index is None else TrainIndex(index, index_dtype, sketch, self._train_side, search)
        self._shelf = Shelf(self._index.path if self._index else None)
        if batch_size == "auto" and not isinstance(train_dataset, DataLoader):
            self.batch_size = largest_batch(self._engine, self._train_examples())
            self.train_dataloader = as_loader(train_dataset, self.batch_size, self._collate, "train_dataset")

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

    def build_index(self, show_progress: bool = False) -> SketchIndex:
        """Write the train side's sketches under ``index=``, as far as they are not there.

        Killed at any moment, it goes on from there the next time. Every train example is read and compared with what
        the index says of it.

        Args:
            show_progress: Show a progress bar for each checkpoint.

        Returns:
            The index; ``print`` shows its summary.

        Raises:
            ValueError: If no ``index=`` was given, or it is of something else.
            OSError: If another process is building it, the folder is read-only, or the disk is full.
        """
        if self._index is None:
            raise ValueError("build_index() needs a folder to write to: SDIInfluence(..., index='folder').")
        return self.study(show_progress=show_progress).complete_index(self._index)

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
        """Compute the total influence of every training example on every test example: TracIn.

        Args:
            inputs: Test examples: a batch (tuple or mapping), a DataLoader, or a Dataset.
            k: None for all training examples, or how many of the most influential ones; clipped to n.
            proponents: With ``k``: the highest influences first; False: the lowest.
            show_progress: Show a progress bar.
            aggregate: Influence on the sum of the test losses: q becomes 1.
            rerank: With ``k``: how many candidates by sketch, at least k, are ordered anew by exact gradients.

        Returns:
            ``(q, n)``, or ``KMostInfluentialResults(indices, influence_scores)``, each ``(q, k)``.
        """
        question = self._question(inputs, aggregate=aggregate, show_progress=show_progress)
        arguments.check_top_k(k, rerank, proponents)
        if k is None:
            return queries.total_influence(question)
        ranking = Ranking(k, proponents)
        if rerank is None:
            return KMostInfluentialResults(*queries.top_examples(question, ranking))
        best = queries.reranked(question, ranking, rerank)
        return KMostInfluentialResults(best.indices, best.sums.scores.values[..., Columns.TOTAL])

    def _influence(self, inputs: Any, show_progress: bool = False, aggregate: bool = False) -> Tensor:
        """Implement Captum's abstract method: `influence` without ``k``."""
        return self.influence(inputs, show_progress=show_progress, aggregate=aggregate)

    def _get_k_most_influential(
        self,
        inputs: Any,
        k: int = 5,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> KMostInfluentialResults:
        """Implement Captum's abstract method: `influence` with ``k``."""
        return self.influence(inputs, k, proponents, show_progress, aggregate)

    @overload
    def step_influence(self, inputs: Any, *args: Any, per: Literal["checkpoint"], **kwargs: Any) -> InfluenceMap: ...
    @overload
    def step_influence(self, inputs: Any, *args: Any, **kwargs: Any) -> StepInfluence: ...
    @with_words
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
        per: Literal["token", "checkpoint"] | None = None,
    ) -> StepInfluence | InfluenceMap:
        """Compute the influence of training on test examples, one number per loop step, with standard errors.

        Args:
            inputs: As for `influence`.
            k: As for `influence`. Memory then grows by one number per pair, never by trajectories.
            proponents: As for `influence`.
            show_progress: As for `influence`.
            aggregate: As for `influence`.
            rank_by: With ``k``: a loop step to rank by, not the total; from 0, as ``trajectories`` are indexed.
            rerank: As for `influence`; what is returned is then exact, its errors zero.
            per: "token": a row for every target token of the test examples, which ``token_of`` names, from one pass
                over the train set. "checkpoint": every checkpoint's share, as an `InfluenceMap`.

        Returns:
            Totals, trajectories, their standard errors; ``(q, n, t)`` or ``(q, k, t)``.

        Raises:
            ValueError: If ``rank_by`` comes without ``k``, or is beyond the deepest test example's last step.
        """
        question = self._question(inputs, aggregate=aggregate, show_progress=show_progress)
        arguments.check_top_k(k, rerank, proponents, rank_by)
        arguments.check_per(per, rerank, aggregate=aggregate)
        column = Columns.TOTAL if rank_by is None else Columns.of_step(rank_by)
        ranking = None if k is None else Ranking(k, proponents, column)
        if per == "token":
            return token_step_influence(question, ranking)
        if per == "checkpoint":
            return checkpoint_step_influence(question, ranking)
        if ranking is None:
            return queries.step_influence(question)
        if rerank is None:
            return queries.top_step_influence(question, ranking)
        return queries.reranked_step_influence(question, ranking, rerank)

    @log_usage(part_of_slo=True)
    def step_matrix(self, inputs: Any, indices: Sequence[int] | None = None) -> Tensor:
        """Compute the influence of every training step on every test step, ``SDI_{s,t}``.

        Args:
            inputs: As for `influence`.
            indices: Positions of the training examples to compute; None: all.

        Returns:
            ``(q, n, s, t)`` over loop steps; summed over s it is the trajectory less what comes from outside the loop.
        """
        question = self._question(inputs)
        return queries.step_matrix(question, arguments.checked_positions(indices))

    @log_usage(part_of_slo=True)
    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """Compute the influence of every example on itself, with the training side's loss and settings.

        Args:
            inputs: As for `influence`; None: the training set.
            show_progress: Show a progress bar over batches.
            outer_loop_by_checkpoints: Show one over checkpoints, too. Each checkpoint is loaded once in any case.

        Returns:
            ``(n,)``.
        """
        examples = self._self_examples(inputs, show_progress=show_progress)
        study = self.study(show_progress=show_progress, with_index=inputs is None)
        if outer_loop_by_checkpoints:
            sums = queries.self_influence_by_checkpoints(study, examples)
        else:
            sums = queries.self_influence(study, examples, by_step=False)
        return sums.scores.values[:, Columns.TOTAL]

    @log_usage(part_of_slo=True)
    def step_self_influence(self, inputs: Any = None, show_progress: bool = False) -> StepInfluence:
        """Compute the influence of every example on itself, one number per loop step.

        Args:
            inputs: As for `self_influence`.
            show_progress: As for `self_influence`.

        Returns:
            A result with one leading axis ``(n,)``.
        """
        examples = self._self_examples(inputs, show_progress=show_progress)
        study = self.study(show_progress=show_progress, with_index=False)
        result = queries.step_self_influence(study, examples)
        return result.with_words(words_of(None, self.train_dataloader if inputs is None else inputs))

    @log_usage(part_of_slo=True)
    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False, test: bool = False) -> Tensor:
        """Compute vectors whose dot products are influences: of a training row with a test row, √η on each side.

        Args:
            inputs: As for `influence`.
            aggregate: Return the sum over the examples: n becomes 1.
            test: Use the test side's loss and settings.

        Returns:
            ``(n, D)``, D = checkpoints x parameters x d with `TensorSketch` (rows of parameters kept exactly are
            padded with zeros), checkpoints x all targeted parameters' entries with `Exact`.

        Raises:
            ValueError: If a learning rate is negative.
        """
        examples = self._examples(inputs, self._test_side if test else self._train_side)
        return queries.gradient_vectors(self.study(with_index=False), examples, aggregate=aggregate, as_tests=test)

    # --- what questions are made of ---

    def study(self, *, show_progress: bool = False, with_index: bool = True) -> Study:
        """Return the train set, the checkpoints and the methods, as `captum_sdi.queries` takes them."""
        checkpoints = summed_checkpoints(self.preconditioner, listed_checkpoints(self.checkpoints))
        if self.checkpoints_load_func is load_checkpoint:
            check_checkpoints(self.model, checkpoints)
        return Study(
            engine=self._engine,
            checkpoints=checkpoints,
            train=self._train_examples(),
            index=self._index if with_index else None,
            preconditioner=self.preconditioner,
            normalize=self.normalize,
            shelf=self._shelf,
            progress=Progress(self.get_name(), show_progress),
        )

    def _question(self, inputs: Any, *, aggregate: bool = False, show_progress: bool = False) -> Question:
        return Question(self.study(show_progress=show_progress), self._examples(inputs, self._test_side), aggregate)

    def _train_examples(self) -> Examples:
        return Examples(Stream(self.train_dataloader, "train_dataset", self._train_side.loss_fn), self._train_side)

    def _examples(self, inputs: Any, side: Side) -> Examples:
        arguments.check_inputs(inputs)
        batches = as_batches(inputs, self.batch_size or 1, self._collate)
        return Examples(Stream(batches, "inputs", side.loss_fn), side)

    def _self_examples(self, inputs: Any, *, show_progress: bool) -> Examples:
        examples = self._train_examples() if inputs is None else self._examples(inputs, self._train_side)
        if show_progress and examples.n_batches is None:
            warn_of_unknown_length()
        return examples

    def _load(self, model: nn.Module, checkpoint: Any) -> float:
        return self.checkpoints_load_func(model, checkpoint)

"""`UnrolledInfluence`: the exact derivative of test losses through a training run, on Captum's contract."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from captum.influence import DataInfluence
from captum.influence._utils.common import KMostInfluentialResults
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.collate import Collator
from captum_sdi.data.examples import Examples
from captum_sdi.data.losses import LossFn, default_loss
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import Columns, LoopSpec
from captum_sdi.inputs import as_batches, as_loader, padding_token
from captum_sdi.loop.parameters import as_loop
from captum_sdi.passes import Engine
from captum_sdi.rehearsal import arguments
from captum_sdi.scores.contract import Scores
from captum_sdi.scores.ranking import Ranking, gather_pairs
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.exact import Exact
from captum_sdi.unrolled.asking import AsksForUpdates
from captum_sdi.unrolled.derivative import Derivative, load_vector
from captum_sdi.unrolled.estimate import UnrolledEstimate, estimated
from captum_sdi.unrolled.gauge import Gauge
from captum_sdi.unrolled.replay import Keep, Replay
from captum_sdi.unrolled.run import TrainingRun
from captum_sdi.unrolled.run_files import check_folder, read_start
from captum_sdi.unrolled.seeds import Seeds, loss_gradients
from captum_sdi.unrolled.train_steps import StepMatrices
from captum_sdi.unrolled.updates import TrainRows, Updates
from captum_sdi.weighted_loss import BatchLoss
from captum_sdi.words import is_integer

_TESTS_AT_ONCE = 8


class UnrolledInfluence(AsksForUpdates, DataInfluence):
    """Influence that is true for AdamW: the derivative of a test loss through training, by loop step.

    Let w_i be the weight of training example i wherever it was trained on, θ_T(w) the end of training, and φ_t the part
    of the test loss's gradient that flows through loop step t. Influence is what taking the example away would add to
    the test loss, to first order:

        influence_t(z', z_i) = -⟨ φ_t(θ_T; z'), dθ_T / dw_i ⟩,     Σ_t influence_t + prelude + coda = -dL(z') / dw_i

    It is computed exactly, backwards through every update of the run (`captum_sdi.unrolled.backward`). Positive values
    are proponents, as everywhere in this library; the unit is that of the test loss.

    Args:
        model: The trained model, at the weights the run ended with. Every call gives it back exactly as it was.
        train_dataset: A Dataset with a row at every position.
        run: What fixed the weights; see `TrainingRun` and `record_training`.
        start: The weights before the first update: a state dict, or a folder that holds them beside the run.
        layers: Which parameters of the test side count, as in `SDIInfluence`; training always moves all trainable ones.
        loss_fn: ``(output, labels)`` to losses, as in `SDIInfluence`.
        test_loss_fn: The test side's loss; None: ``loss_fn``.
        loop: What repeats; None finds it.
        collate_fn: Collates rows; None pads ragged ones.
        forward_kwargs: Further keywords for the model's forward, or a function of the batch that returns them.
        test_forward_kwargs: The test side's; None: ``forward_kwargs``.
        keep: Which states of the run are kept: "all", 3 T parameters with AdamW; "sqrt", √T of them at the price of one
            more training; or a number.
        folder: Where states and unfinished scores are written, so that a killed process is gone on from; None: they
            stay in memory.
        check: Measure the `Gauge` before the first scores, and warn where they are not to be trusted.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument cannot be right, or the model is in half precision.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> from captum_sdi.unrolled import SGD
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> model = LoopedGPTForCausalLM(config).eval()
        >>> start = {name: weights.clone() for name, weights in model.state_dict().items()}
        >>> batches, rates = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]], [0.1, 0.1, 0.05]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for rate, batch in zip(rates, batches):  # training, as ever
        ...     optimizer.param_groups[0]["lr"] = rate
        ...     rows = torch.utils.data.default_collate([train[i] for i in batch])
        ...     loss = default_loss(model)(model(rows["input_ids"]), rows["labels"]).mean()
        ...     optimizer.zero_grad(), loss.backward(), optimizer.step()  # doctest: +ELLIPSIS
        (...
        >>> unrolled = UnrolledInfluence(model, train, TrainingRun(SGD(), rates, batches), start, check=False)
        >>> unrolled.step_influence(test).trajectories.shape  # (q, n, t)
        torch.Size([2, 10, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        run: TrainingRun,
        start: Mapping[str, Tensor] | str | os.PathLike[str],
        layers: str | Sequence[str] | None = "loop",
        loss_fn: nn.Module | LossFn | None = None,
        test_loss_fn: nn.Module | LossFn | None = None,
        *,
        loop: str | Sequence[str] | LoopSpec | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        forward_kwargs: ForwardKwargs | None = None,
        test_forward_kwargs: ForwardKwargs | None = None,
        keep: Keep = "sqrt",
        folder: str | os.PathLike[str] | None = None,
        check: bool = True,
    ) -> None:
        arguments.check_model_in_one_place(model)
        arguments.check_layers(layers)
        if not isinstance(run, TrainingRun):
            raise TypeError(f"run= must be a TrainingRun, got {type(run).__name__}.")
        if folder is not None:
            check_folder("folder", folder)
        self.model, self.run = model, run
        self.train_dataset: Any = train_dataset
        self._collate = collate_fn or Collator(padding_token(model))
        train_loss = arguments.checked_loss(loss_fn, "loss_fn") or default_loss(model)
        test_loss = arguments.checked_loss(test_loss_fn, "test_loss_fn") or train_loss
        test_kwargs = forward_kwargs if test_forward_kwargs is None else test_forward_kwargs
        test_argument = "loss_fn" if test_loss_fn is None else "test_loss_fn"
        train_side = Side("training", train_loss, forward_kwargs)
        self._test_side = Side("test", test_loss, test_kwargs, test_argument)
        loader = as_loader(train_dataset, _TESTS_AT_ONCE, self._collate, "train_dataset")
        engine = Engine(model, load_vector, layers, as_loop(loop), Exact())
        updates = Updates(BatchLoss(model, train_side), TrainRows(loader), run)
        states = None if folder is None else Path(folder)
        replay = Replay(updates, start_vector(start, updates), keep, states)
        self._derivative = Derivative(
            replay,
            engine,
            loader,
            is_gauged=check,
            owner=self.get_name(),
            test_side=self._test_side,
        )

    # --- before the work ---

    def estimate(self, n_seeds: int) -> UnrolledEstimate:
        """Measure one update, and multiply: how long will a question take, and how much memory?

        Args:
            n_seeds: Test examples, for `step_influence` times their loop steps and two, for prelude and coda.

        Returns:
            The estimate, which says where retraining without each example is cheaper; ``print`` shows it.

        Raises:
            ValueError: If ``n_seeds`` is below 1.
        """
        if not is_integer(n_seeds) or n_seeds < 1:
            raise ValueError(f"n_seeds must be an int of at least 1, got {n_seeds!r}.")
        return estimated(self._derivative.replay, n_seeds)

    def check(self, show_progress: bool = False) -> Gauge:
        """Measure when this run's influence can be believed, once: a replay, two further trainings, one way back.

        Args:
            show_progress: Show a progress bar.

        Returns:
            Replay error, metasmoothness, growth, the share of noise, and a verdict; ``print`` shows them.

        Raises:
            ValueError: If the replay does not end at the model's weights.
        """
        return self._derivative.measure_gauge(show_progress=show_progress)

    # --- questions ---

    @log_usage(part_of_slo=True)
    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """Compute the total influence of every training example on every test example.

        Args:
            inputs: Test examples: a batch (tuple or mapping), a DataLoader, or a Dataset.
            k: None for all training examples, or how many of the most influential ones; clipped to n.
            proponents: With ``k``: the highest influences first; False: the lowest.
            show_progress: Show a progress bar.
            aggregate: Influence on the sum of the test losses: q becomes 1.

        Returns:
            ``(q, n)``, or ``KMostInfluentialResults(indices, influence_scores)``, each ``(q, k)``.
        """
        arguments.check_top_k(k, None, proponents)
        sums, _ = self._scored(inputs, by_step=False, aggregate=aggregate, show_progress=show_progress)
        totals = sums.values[..., Columns.TOTAL]
        if k is None:
            return totals
        return KMostInfluentialResults(*Ranking(k, proponents).best(totals))

    @log_usage(part_of_slo=True)
    def step_influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        rank_by: int | None = None,
    ) -> StepInfluence:
        """Compute the influence of training on test examples, one number per loop step of the test side.

        Args:
            inputs: As for `influence`.
            k: As for `influence`.
            proponents: As for `influence`.
            show_progress: As for `influence`.
            aggregate: As for `influence`.
            rank_by: With ``k``: a loop step to rank by, not the total; from 0, as ``trajectories`` are indexed.

        Returns:
            Totals and trajectories, ``(q, n, t)`` or ``(q, k, t)``; their errors are zero.

        Raises:
            ValueError: If ``rank_by`` comes without ``k``, or is beyond the deepest test example's last step.
        """
        arguments.check_top_k(k, None, proponents, rank_by)
        sums, n_steps = self._scored(inputs, by_step=True, aggregate=aggregate, show_progress=show_progress)
        if k is None:
            return StepInfluence.from_sums(sums, n_steps)
        ranking = Ranking(k, proponents, Columns.TOTAL if rank_by is None else Columns.of_step(rank_by))
        ranking.check_column(sums.values.shape[-1])
        order, _ = ranking.best(ranking.column_of(sums.values))
        values = gather_pairs(sums.values, order)
        return StepInfluence.from_sums(Scores(values, torch.zeros_like(values)), n_steps, order)

    @log_usage(part_of_slo=True)
    def step_matrix(
        self,
        inputs: Any,
        indices: Sequence[int] | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Compute the influence of every training step on every test step.

        At update k the gradient of a training example splits by its own loop steps s: ``-Σ_k a_i ⟨φ_s(θ_{k-1}; z_i),
        c_t⟩`` over the parameters that ``layers`` names.

        Args:
            inputs: As for `influence`.
            indices: Positions of the training examples to compute; None: all.
            show_progress: As for `influence`.

        Returns:
            ``(q, n, s, t)`` over loop steps, in the order of the indices.

        Raises:
            ValueError: If an index is not in the train set, or the run has dropout.
        """
        positions = arguments.checked_positions(indices)
        if positions is None:
            positions = torch.arange(self._derivative.n_examples)
        examples, updates = self._derivative.train_examples(), self._derivative.updates
        matrices = StepMatrices(self._derivative.engine, examples, updates, positions)
        seeds = self._seeds(inputs, by_step=True, show_progress=show_progress)
        for visit in self._derivative.visits(seeds.flat, show_progress=show_progress):
            matrices.add(visit, seeds)
        return matrices.result()

    @log_usage(part_of_slo=True)
    def predicted_losses(
        self,
        inputs: Any,
        kept: Tensor,
        show_progress: bool = False,
    ) -> Tensor:
        """Predict test losses of runs on subsets of the train set, to first order: what Simfluence simulates.

        ``loss(kept) ≈ loss(all) + Σ_{i not kept} influence(z', z_i)``, over all trainable parameters whatever
        ``layers`` says. An update keeps its divisor: without an example its loss counts as zero.

        Args:
            inputs: As for `influence`.
            kept: ``(m, n)`` booleans: the examples of each subset.
            show_progress: As for `influence`.

        Returns:
            ``(m, q)``.

        Raises:
            ValueError: If ``kept`` has another shape or dtype.
        """
        derivative = self._derivative
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape[1:] != (derivative.n_examples,):
            raise ValueError(
                f"kept must be booleans of shape (m, {derivative.n_examples}), one column for each example."
            )
        tests = self._tests(inputs)
        derivative.prepare(show_progress=show_progress)
        test_loss = BatchLoss(self.model, self._test_side)
        with derivative.updates.borrowed(), test_loss.evaluated() as vector:
            losses, gradients = loss_gradients(test_loss, vector, (raw for _, raw in tests.batches()))
        influence = -derivative.example_scores(gradients, show_progress=show_progress)
        left_out = (~kept).to(influence)
        return losses + left_out @ influence.T

    # --- what they are made of ---

    def _scored(
        self,
        inputs: Any,
        *,
        by_step: bool,
        aggregate: bool,
        show_progress: bool,
    ) -> tuple[Scores, Tensor]:
        """Return influence ``(q, n, 1 + b)``, the total first, and the depths ``(q,)``."""
        seeds = self._seeds(inputs, by_step=by_step, aggregate=aggregate, show_progress=show_progress)
        scores = self._derivative.example_scores(seeds.flat, show_progress=show_progress)
        return seeds.columns(scores), seeds.n_steps

    def _seeds(
        self,
        inputs: Any,
        *,
        by_step: bool,
        show_progress: bool,
        aggregate: bool = False,
    ) -> Seeds:
        """Prepare the run, and compute the gradients of test losses at its end."""
        tests = self._tests(inputs)
        # The seeds first: what cannot work with the model is said of them, before it is trained again.
        seeds = self._derivative.seeds(tests, by_step=by_step, aggregate=aggregate)
        self._derivative.prepare(show_progress=show_progress)
        return seeds

    def _tests(self, inputs: Any) -> Examples:
        arguments.check_inputs(inputs)
        batches = as_batches(inputs, _TESTS_AT_ONCE, self._collate)
        return Examples(Stream(batches, "inputs", self._test_side.loss_fn), self._test_side)


def start_vector(start: Mapping[str, Tensor] | str | os.PathLike[str], updates: Updates) -> Tensor:
    """Return the parameters before the first update.

    Args:
        start: A state dict, or a folder that holds one.
        updates: Of the model.

    Raises:
        TypeError: If it is neither.
        ValueError: If parameters are missing, or of another shape.
    """
    if isinstance(start, str | os.PathLike):
        start = read_start(start)
    if not isinstance(start, Mapping):
        raise TypeError(f"start= must be a state dict or a folder, got {type(start).__name__}.")
    layout = updates.loss.layout
    wrong = [name for name, shape in layout.shapes.items() if name not in start or start[name].shape != shape]
    if wrong:
        raise ValueError(f"start= lacks these trainable parameters, or has them in another shape: {wrong[:5]}.")
    coarse = [name for name in layout.shapes if start[name].dtype != layout.dtype]
    if coarse:
        raise ValueError(
            f"start= holds {coarse[0]!r} as {start[coarse[0]].dtype}, the model as {layout.dtype}: convert one of them."
        )
    return layout.flat(start)

"""What sketching the training set will cost, from one measured batch: `estimate`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from captum_sdi.data.batch import batch_size
from captum_sdi.data.examples import Examples
from captum_sdi.data.stream import Stream
from captum_sdi.influence import SDIInfluence
from captum_sdi.model_facts import model_device
from captum_sdi.passes import Point
from captum_sdi.preconditioners import Hessian
from captum_sdi.study import Study
from captum_sdi.train_side import TrainSide
from captum_sdi.words import readable_size


@dataclass(frozen=True)
class Estimate:
    """The cost of sketching every training example at every checkpoint; prints as a short table.

    ``seconds = n_checkpoints * (checkpoint_seconds + n_batches * batch_seconds) + curvature_seconds``;
    ``disk_bytes = n_checkpoints * n_examples * row_bytes``.
    """

    n_examples: int
    """Training examples."""
    n_batches: int
    """Batches they come in."""
    n_checkpoints: int
    """Checkpoints, the current weights counting as one."""
    device: str
    """Where the model is."""
    batch_seconds: float
    """One batch, forward, backward and sketch; measured."""
    checkpoint_seconds: float
    """Loading a checkpoint and drawing its hashes; measured."""
    model_bytes: int
    """Parameters and buffers."""
    peak_bytes: int
    """Most memory in use at once, the model included: what torch had allocated on a GPU, the whole process on a CPU."""
    row_bytes: int
    """One example's sketch in an index, at one checkpoint."""
    curvature_seconds: float = 0.0
    """The products of a `captum_sdi.preconditioners.Hessian`, once; one of them, with one batch, is measured."""

    @property
    def seconds(self) -> float:
        """Time in all."""
        rows = self.n_checkpoints * (self.checkpoint_seconds + self.n_batches * self.batch_seconds)
        return rows + self.curvature_seconds

    @property
    def disk_bytes(self) -> int:
        """Size of the index, but for a few numbers per example."""
        return self.n_checkpoints * self.n_examples * self.row_bytes

    def __str__(self) -> str:
        batch, checkpoint = readable_time(self.batch_seconds), readable_time(self.checkpoint_seconds)
        model, row = readable_size(self.model_bytes), readable_size(self.row_bytes)
        memory_owner = "the whole process" if self.device == "cpu" else "of the GPU"
        curvatures = f"; {readable_time(self.curvature_seconds)} for curvatures" if self.curvature_seconds else ""
        return "\n".join(
            (
                f"{_count(self.n_examples, 'example')} at {_count(self.n_checkpoints, 'checkpoint')} on {self.device}",
                f"time    {readable_time(self.seconds):>11}  {batch} a batch, {_count(self.n_batches, 'batch', 'es')}, "
                f"and {checkpoint} a checkpoint{curvatures}",
                f"memory  {readable_size(self.peak_bytes):>11}  {memory_owner} at the peak of a batch; "
                f"the model is {model}",
                f"disk    {readable_size(self.disk_bytes):>11}  {row} an example and checkpoint",
            )
        )


def estimate(
    sdi: SDIInfluence,
    n_examples: int | None = None,
    *,
    longest: int | None = None,
) -> Estimate:
    """Measure one batch, and multiply: how long will it take, how much memory and how much disk?

    After a warm-up, a batch of examples from all over the training set is timed at the first checkpoint. Nothing is
    written, and the model comes back as it was. Memory is that of the batches which ran: pass ``longest`` for the most
    that any will need. The curvatures of a `captum_sdi.preconditioners.Hessian` are counted as if none were kept.
    Writing rows to the disk, and scoring test examples with them, are not counted.

    Args:
        sdi: The object that will do the work.
        n_examples: How many training examples to count on; None: as many as there are, where ``train_dataset`` tells.
        longest: Position of the longest training example. A batch full of it is run as well, since padding makes all
            the examples of a batch as long as its longest.

    Returns:
        The estimate.

    Raises:
        ValueError: If the number of examples is not known, or below 1, or ``longest`` is no position.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.sketch import TensorSketch
        >>> from captum_sdi.tasks import parity
        >>> train = parity(12, max_bits=4)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> sdi = SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4, sketch=TensorSketch(dim=64))
        >>> cost = estimate(sdi, n_examples=1_000_000)
        >>> print(cost)
        1,000,000 examples at 1 checkpoint on cpu
        ...
    """
    study = sdi.study()
    n = _checked_size(study.train.stream, n_examples)
    typical, largest = _batches(sdi, study.train.stream, longest)
    device = model_device(sdi.model)
    with _peak_memory(device) as peak:
        _timed(study, [typical], device)  # finds the loop, rehearses the first example, warms up
        timing = _timed(study, [typical] * _REPEATS + largest, device)
        peak_bytes = peak()
    return Estimate(
        n_examples=n,
        n_batches=math.ceil(n / batch_size(typical)),
        n_checkpoints=len(study.checkpoints),
        device=str(device),
        batch_seconds=(timing.batch_ends[_REPEATS - 1] - timing.loaded) / _REPEATS,
        checkpoint_seconds=timing.loaded - timing.begun,
        model_bytes=sum(tensor.nbytes for tensor in (*sdi.model.parameters(), *sdi.model.buffers())),
        peak_bytes=peak_bytes,
        row_bytes=timing.row_bytes,
        curvature_seconds=_curvature_seconds(study, typical, n, device),
    )


def readable_time(seconds: float) -> str:
    """Write a duration with two digits, or in its two largest units.

    Returns:
        Such as "2 h 1 min".

    Example:
        >>> readable_time(0.0123), readable_time(7.63), readable_time(7_260), readable_time(200_000)
        ('12 ms', '7.6 s', '2 h 1 min', '2 d 8 h')
    """
    if seconds < 0.995:
        return f"{_two_digits(1000 * seconds)} ms"
    if seconds < 59.5:
        return f"{_two_digits(seconds)} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _two_digits(value: float) -> str:
    rounded = float(f"{value:.2g}")
    return f"{rounded:g}"


_REPEATS = 3  # a batch of a small model takes milliseconds, as does whatever else the machine does


@dataclass(frozen=True)
class _Timing:
    """When a pass over some batches at the first checkpoint began, had loaded, and had done each."""

    begun: float
    loaded: float
    batch_ends: list[float]
    row_bytes: int
    """Of one example at one checkpoint, in the index's numbers."""


def _timed(study: Study, batches: list[Any], device: torch.device) -> _Timing:
    """Sketch batches at the first checkpoint, and look at the clock behind each."""
    side = study.train.side
    examples = Examples(Stream(batches, "train_dataset"), side)
    begun = _now(device)
    with study.engine.points(study.checkpoints[:1], examples) as points:
        point = next(points)
        loaded = _now(device)
        batch_ends = []
        for raw in batches:
            point.batch(raw, side, range(batch_size(raw)), by_step=False)
            batch_ends.append(_now(device))
        row_bytes = _row_bytes(study, point)
    return _Timing(begun, loaded, batch_ends, row_bytes)


def _curvature_seconds(
    study: Study,
    raw: Any,
    n_examples: int,
    device: torch.device,
) -> float:
    """Measure a product with a batch's Hessian at the last checkpoint, and multiply; 0 where none is asked for."""
    hessian = study.preconditioner
    if not isinstance(hessian, Hessian):
        return 0.0
    size = batch_size(raw)
    examples = Examples(Stream([raw], "train_dataset"), study.train.side)
    with study.engine.points(study.checkpoints[-1:], examples) as points:
        point = next(points)
        clock = []
        for n_products in (1, 1, 1 + _REPEATS):  # the first warms up
            short = replace(hessian, rank=n_products, examples=None)
            short.curvatures(point, TrainSide(examples), size)
            clock.append(_now(device))
    one_product, several = clock[1] - clock[0], clock[2] - clock[1]
    n_batches = math.ceil(min(n_examples, hessian.examples or n_examples) / size)
    return hessian.rank * n_batches * (several - one_product) / _REPEATS


def _row_bytes(study: Study, point: Point) -> int:
    stored = None if study.index is None else study.index.dtype
    n_bytes = 0
    for row in point.capture.blank().rows.values():
        dtype = stored or row.dtype
        n_bytes += row.shape[-1] * dtype.itemsize
    return n_bytes


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _checked_size(stream: Stream, n_examples: int | None) -> int:
    """How many examples to count on."""
    if n_examples is None:
        n_examples = stream.n_examples
        if n_examples is None:
            raise ValueError("train_dataset does not tell its length: pass n_examples=, how many to count on.")
    if not isinstance(n_examples, int) or n_examples < 1:
        raise ValueError(f"n_examples must be an int of at least 1, or None for all; got {n_examples!r}.")
    return n_examples


def _batches(
    sdi: SDIInfluence,
    stream: Stream,
    longest: int | None,
) -> tuple[Any, list[Any]]:
    """Collate a batch of examples from all over the training set, and, when asked for, one of the longest."""
    loader: Any = sdi.train_dataloader
    n = stream.n_examples
    if n is None and longest is not None:
        raise ValueError("longest= needs a train_dataset whose examples can be picked by position.")
    if n is None:
        return stream.peek(), []
    size = min(loader.batch_size, n)
    typical = loader.collate_fn([loader.dataset[i * n // size] for i in range(size)])
    if longest is None:
        return typical, []
    if not 0 <= longest < n:
        raise ValueError(f"longest={longest!r} must be a position in train_dataset, 0 to {n - 1}.")
    return typical, [loader.collate_fn([loader.dataset[longest]] * size)]


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that says the most bytes in use since it began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on, not since the process began
    except OSError:
        yield _peak_of_process
    else:
        yield _peak_since_cleared


def _peak_since_cleared() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _peak_of_process() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{plural if number != 1 else ''}"

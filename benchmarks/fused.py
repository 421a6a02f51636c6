"""Would a fused sketch pay? `python benchmarks/fused.py` from a checkout; a C++ compiler is needed.

On the paper's shape (tau = 6, sketches of 2048) calls take turns: the package as it is; the same with count sketches
and products compiled by `torch.compile`, the FFTs between them as they are; the same with no sketch of a matrix at all,
which no kernel can be faster than; the limit, forward and backward with frozen weights. Times are the processor's, of
one thread. Rows of the compiled sketch are compared with those of the plain one first. Results go to fused.json;
`--small` is a smoke test.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from environment import environment
from peers import Call, limit, ours
from subjects import looped_gpt
from timing import interleaved, quartiles, ratio
from torch import Tensor

from captum_sdi import TensorSketch
from captum_sdi.features import Gradient, Outer
from captum_sdi.sketch.hashes import FactorHash, PermutationHash, RotationHash
from captum_sdi.sketch.tensor_sketch import MatrixProjection

RESULTS = Path(__file__).with_suffix(".json")
DIM = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # every shape and every table of shifts is a function of its own
    layers = [(96, 64)] if options.small else [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
    results: dict[str, Any] = {"environment": environment(), "sketch, ms": {}}
    for rows, cols in layers:
        results["sketch, ms"][f"{rows} x {cols}"] = one_sketch(rows, cols)
    print(json.dumps(results["sketch, ms"], indent=1), flush=True)
    work = looped_gpt(**({"width": 128, "seq": 32} if options.small else {}))
    plain = ours(work, DIM)
    calls: dict[str, Call] = {
        "plain": plain,
        "compiled": lambda: inside(compiled_sketch, plain),
        "no sketch": lambda: inside(no_sketch, plain),
        "limit": limit(work),
    }
    seconds = interleaved(calls, 1 if options.small else options.rounds, time.process_time)
    results["seconds"] = {name: quartiles(spent) for name, spent in seconds.items()}
    results["ratios"] = {f"{name} / plain": ratio(seconds, name, "plain") for name in calls if name != "plain"}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def one_sketch(rows: int, cols: int) -> dict[str, float]:
    """Milliseconds of one layer's sketch, four examples of 128 tokens."""
    torch.manual_seed(0)
    gradient = Outer(torch.randn(4, 128, rows), torch.randn(4, 128, cols))
    sketch = TensorSketch(DIM).projection("layer", torch.empty(rows, cols))
    expected = sketch(gradient)
    with compiled_sketch():
        torch.testing.assert_close(sketch(gradient), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        compiled = milliseconds(lambda: sketch(gradient))
    return {"plain": milliseconds(lambda: sketch(gradient)), "compiled": compiled}


def milliseconds(call: Callable[[], object], times: int = 20) -> float:
    spent = []
    for _ in range(times):
        start = time.process_time()
        call()
        spent.append(1000 * (time.process_time() - start))
    return quartiles(spent)[1]


def inside(block: Callable[[], Any], call: Call) -> Any:
    with block():
        return call()


# --- the sketch, compiled ---


def rotated(values: Tensor, signs: Tensor, shifts: tuple[int, ...], n_buckets: int, n_parts: int, chunk: int) -> Tensor:
    """Count-sketch a long factor."""
    signed = values.float() * signs
    by_part = signed.unflatten(-1, (-1, n_parts, chunk)).transpose(-3, -2).flatten(-2)
    padded = torch.nn.functional.pad(by_part, (0, len(shifts) * n_buckets - by_part.shape[-1]))
    total = padded[..., :n_buckets]
    for block, shift in enumerate(shifts[1:], start=1):
        total = total + padded[..., block * n_buckets : (block + 1) * n_buckets].roll(shift, -1)
    return total


def permuted(values: Tensor, sources: Tensor, signs: Tensor, n_parts: int) -> Tensor:
    """Count-sketch a short factor."""
    return (values.float()[..., sources] * signs).sum(-2).unflatten(-1, (n_parts, -1))


def summed_products(rows: Tensor, cols: Tensor) -> Tensor:
    """Σ over tokens of the products of two spectra, real and imaginary parts apart."""
    rows, cols = rows.unsqueeze(-3), cols.unsqueeze(-4)
    real = rows[..., 0] * cols[..., 0] - rows[..., 1] * cols[..., 1]
    imaginary = rows[..., 0] * cols[..., 1] + rows[..., 1] * cols[..., 0]
    return torch.stack([real.sum(1), imaginary.sum(1)], -1)


ROTATED, PERMUTED, SUMMED = (torch.compile(each, dynamic=False) for each in (rotated, permuted, summed_products))


def count_sketch(factor: FactorHash, values: Tensor) -> Tensor:
    if isinstance(factor, RotationHash):
        return ROTATED(values, factor.signs, shifts_of(factor), factor._n_buckets, factor.n_parts, factor._chunk)
    assert isinstance(factor, PermutationHash)
    return PERMUTED(values, *gathers_of(factor), factor.n_parts)


@functools.lru_cache(maxsize=256)
def shifts_of(factor: RotationHash) -> tuple[int, ...]:
    first_of_block = factor.buckets[factor.parts == 0][:: factor._n_buckets]
    return tuple(first_of_block.tolist())


@functools.lru_cache(maxsize=256)
def gathers_of(factor: PermutationHash) -> tuple[Tensor, Tensor]:
    sources, signs = zip(*factor._gathers, strict=True)
    return torch.stack(sources), torch.stack(signs)


def compiled_product(self: MatrixProjection, rows: Tensor, cols: Tensor) -> Tensor:
    with torch.compiler.set_stance("default"):  # a pass through the model is eager
        row_sketch, col_sketch = count_sketch(self._row_hash, rows), count_sketch(self._col_hash, cols)
        row_spectrum = torch.view_as_real(torch.fft.rfft(row_sketch, norm="ortho"))
        col_spectrum = torch.view_as_real(torch.fft.rfft(col_sketch))
        return torch.view_as_complex(SUMMED(row_spectrum, col_spectrum)).flatten(1, 2)


def no_rows(self: MatrixProjection, gradient: Gradient) -> Tensor:
    n = len(gradient.cols if isinstance(gradient, Outer) else gradient.entries(self._shape))
    return torch.zeros(n, self.width)


@contextmanager
def compiled_sketch() -> Iterator[None]:
    with standing_for("_product", compiled_product):
        yield


@contextmanager
def no_sketch() -> Iterator[None]:
    with standing_for("__call__", no_rows):
        yield


@contextmanager
def standing_for(name: str, method: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(MatrixProjection, name)
    setattr(MatrixProjection, name, method)
    try:
        yield
    finally:
        setattr(MatrixProjection, name, original)


if __name__ == "__main__":
    main()

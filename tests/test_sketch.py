"""The sketches: inner products in expectation, their variance, and what must not change a single number.

Statements about random hashes are checked over draws (seeds of the sketch) and allow four *measured* standard errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import looped_gpt, rows
from hypothesis import given
from hypothesis import strategies as st
from reference import spread
from torch import Tensor

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.features import Dense, Gradient, Noise, Outer, canonical_name
from captum_sdi.sketch.tensor_sketch import pack_spectrum

DRAWS = 800


# --- gradients to sketch, and what they are entry by entry --------------------------------------------------------


def factors(n: int, p: int, r: int, c: int, seed: int) -> Outer:
    """Examples that share half of their tokens, so that inner products are neither zero nor those of equal ones."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(n, p, r, generator=generator), torch.randn(n, p, c, generator=generator)
    u[:, ::2], v[:, ::2] = u[:1, ::2], v[:1, ::2]
    return Outer(u, v)


def one_hot(n: int, p: int, r: int, c: int, seed: int) -> Outer:
    """An embedding's gradient: ids of tokens, some of them repeated, and what flowed back."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, r, (n, p), generator=generator)
    ids[:, ::2] = ids[:1, ::2]
    return Outer(ids, factors(n, p, r, c, seed).cols)


def entries(gradient: Gradient, r: int) -> Tensor:
    """The gradient itself, ``(n, r, c)`` or ``(n, length)``, in float64."""
    if isinstance(gradient, Dense):
        return gradient.grads.double()
    left = gradient.rows.double() if gradient.rows.is_floating_point() else F.one_hot(gradient.rows, r).double()
    return torch.einsum("npr,npc->nrc", left, gradient.cols.double())


def dense(n: int, p: int, r: int, c: int, seed: int) -> Dense:
    return Dense(entries(factors(n, p, r, c, seed), r).float())


def vector(n: int, p: int, r: int, c: int, seed: int) -> Dense:
    return Dense(dense(n, p, r, c, seed).grads.flatten(1))


@dataclass(frozen=True)
class Case:
    """Parameters of one shape, their gradients for two examples, and the sketch's dimension."""

    name: str
    make: Callable[[int, int, int, int, int], Gradient]
    r: int
    c: int
    dim: int
    tokens: int = 3
    pool: bool = False
    tight: bool = False
    """Nothing makes the variance's bound conservative here: a much smaller variance would be suspicious, too."""
    parts: int = 1
    """Chunks of 16 entries of the longer factor take turns at so many parts of a row."""

    @property
    def parameter(self) -> Tensor:
        return torch.empty(self.r * self.c) if self.make is vector else torch.empty(self.r, self.c)

    def gradients(self) -> dict[str, Gradient]:
        names = ["first", "second"] if self.pool else ["only"]
        return {name: self.make(2, self.tokens, self.r, self.c, 7 + i) for i, name in enumerate(names)}

    def noise(self) -> float:
        """The stated bound, in units of ‖g‖²‖φ‖² + ⟨g,φ⟩²: written out here, not read from the library."""
        lengths = () if self.make is vector else (self.r, self.c)
        return (1 + sum(1 - 1 / -(-length // self.dim) for length in lengths)) / self.dim

    def scale(self, truth: Tensor) -> Tensor:
        """‖g‖²‖φ‖² + ⟨g,φ⟩² of `inner_products`; each part of a row has a share of the numbers, and of the entries."""
        axis = (self.r, self.c).index(max(self.r, self.c))
        of = torch.arange(max(self.r, self.c)) // 16 % self.parts
        shares = [
            truth.view(2, self.r, self.c).index_select(1 + axis, (of == k).nonzero()[:, 0]) for k in range(self.parts)
        ]
        found = torch.zeros(2, dtype=torch.float64)
        for share in shares:
            norms = share.flatten(1).square().sum(1)
            found += self.parts * (norms[0] * norms[[1, 0]] + inner_products(share).square())
        return found

    def sketched(self, sketch: TensorSketch, gradients: dict[str, Gradient]) -> Tensor:
        """Rows of both examples; with ``pool=True`` those of the parameters added up, as in `captum_sdi.features`."""
        rows = [sketch.projection(name, self.parameter)(gradient) for name, gradient in gradients.items()]
        return torch.stack(rows).sum(0)


CASES = [
    Case("below both", factors, 40, 50, 16),
    Case("below one", factors, 12, 50, 20),
    Case("equal to both", factors, 24, 24, 24, tight=True),
    Case("equal to one", factors, 16, 24, 24, tight=True),
    Case("above both", factors, 20, 12, 64),
    Case("odd and above", factors, 20, 12, 33),
    Case("odd and below", factors, 30, 23, 7),
    Case("one bucket", factors, 5, 4, 1),
    Case("one token", factors, 96, 60, 24, tokens=1, tight=True),
    Case("two parts", factors, 64, 24, 64, tight=True, parts=2),
    Case("two parts below", factors, 12, 96, 64, parts=2),
    Case("two parts, one token", factors, 96, 30, 64, tokens=1, parts=2),
    Case("one-hot in two parts", one_hot, 32, 20, 64, tokens=6, parts=2),
    Case("dense in two parts", dense, 20, 64, 64, parts=2),
    Case("four parts", factors, 32, 20, 64, parts=2),  # the shorter factor's halves are drawn anew each time
    Case("one-hot", one_hot, 30, 20, 32),
    Case("one-hot below", one_hot, 100, 20, 13, tokens=6),
    Case("dense", dense, 20, 12, 33),
    Case("dense below", dense, 40, 50, 16),
    Case("vector", vector, 10, 15, 16, tight=True),
    Case("pool", factors, 20, 12, 33, pool=True),
    Case("pool below", factors, 40, 50, 16, pool=True),
    Case("pool of vectors", vector, 10, 4, 64, pool=True),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def inner_products(rows: Tensor) -> Tensor:
    """Of the first example with the second, and of the first with itself."""
    flat = rows.double().flatten(1)
    return torch.stack([flat[0] @ flat[1], flat[0] @ flat[0]])


def draws(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sketched inner products ``(draws, 2)``, the exact ones ``(2,)``, and ‖g‖²‖φ‖² + ⟨g,φ⟩² ``(2,)``."""
    gradients = case.gradients()
    truth = torch.cat([entries(gradient, case.r).flatten(1) for gradient in gradients.values()], dim=1)
    exact, norms = inner_products(truth), truth.square().sum(1)
    scale = case.scale(truth) if case.parts > 1 else norms[0] * norms[[1, 0]] + exact.square()
    seeds = range(seed * DRAWS, (seed + 1) * DRAWS)
    sketched = [inner_products(case.sketched(TensorSketch(case.dim, s, case.pool), gradients)) for s in seeds]
    return torch.stack(sketched), exact, scale


# --- what the sketch promises in expectation ----------------------------------------------------------------------


def test_inner_products_are_unbiased_and_their_variance_within_the_stated_bound(case: Case, seed: int) -> None:
    sketched, exact, scale = draws(case, seed)
    standard_error = sketched.std(0) / DRAWS**0.5
    assert ((sketched.mean(0) - exact).abs() <= 4 * standard_error).all(), (
        f"off by {((sketched.mean(0) - exact) / standard_error).tolist()} standard errors: a ratio of "
        f"{(sketched.mean(0) / exact).tolist()}; a constant one is a normalisation, else two hashes are not independent"
    )
    squares = (sketched - exact).square() / (case.noise() * scale)
    ratio, standard_error = squares.mean(0), squares.std(0) / DRAWS**0.5
    message = f"variance is {ratio.tolist()} ± {standard_error.tolist()} times the bound"
    assert (ratio - 4 * standard_error <= 1).all(), message
    assert not case.tight or (ratio + 4 * standard_error >= 0.8).all(), message


def test_gradients_in_different_blocks_stay_below_the_hard_bound(seed: int) -> None:
    """1 − 1/m supposes that both examples' mass lies alike in a factor's m blocks; 1 is the most it can ever be."""
    d, n_draws = 32, 1000
    generator = torch.Generator().manual_seed(5)
    u = torch.randn(1, 1, d, generator=generator).expand(2, 1, d)
    v = torch.zeros(2, 1, 2 * d)
    v[0, :, :d], v[1, :, d:] = torch.randn(2, 1, d, generator=generator)
    squares = []
    for s in range(seed * n_draws, (seed + 1) * n_draws):
        left, right = TensorSketch(d, s).projection("weight", torch.empty(d, 2 * d))(Outer(u, v)).double()
        squares.append((left @ right).square())  # exactly, they are orthogonal
    scale = entries(Outer(u, v), d).square().sum((1, 2)).prod()
    ratio = torch.stack(squares) / (2 / d * scale)
    assert ratio.mean() - 4 * ratio.std() / n_draws**0.5 <= 1


# --- the sketch is what it says: slow truth, Parseval, linearity --------------------------------------------------


def slow_tensor_sketch(gradient: Gradient, rows: Any, cols: Any, dim: int) -> np.ndarray:
    """Entry by entry in the time domain: (r, c) goes to bucket h(r) + h'(c) of its part with sign s(r) s'(c)."""
    matrices = entries(gradient, len(rows.signs)).numpy()
    sketched = np.zeros((len(matrices), rows.n_parts * cols.n_parts, dim // (rows.n_parts * cols.n_parts)))
    for n, r, c in np.ndindex(*matrices.shape):
        bucket = (rows.buckets[r] + cols.buckets[c]) % sketched.shape[-1]
        sketched[n, rows.parts[r] * cols.n_parts + cols.parts[c], bucket] += (
            rows.signs[r] * cols.signs[c] * matrices[n, r, c]
        )
    return sketched.reshape(len(matrices), dim)


@pytest.mark.parametrize("make", [factors, one_hot, dense])
@pytest.mark.parametrize(
    ("r", "c", "dim"),
    [(9, 14, 4), (9, 14, 11), (9, 14, 64), (5, 4, 1), (5, 4, 2), (12, 12, 12), (96, 9, 64), (9, 96, 64), (32, 32, 64)],
)
def test_fourier_path_equals_a_slow_sketch_in_the_time_domain(
    make: Callable[[int, int, int, int, int], Gradient], r: int, c: int, dim: int
) -> None:
    gradient = make(3, 5, r, c, 1)
    projection = TensorSketch(dim, seed=3).projection("weight", torch.empty(r, c))
    assert projection.noise.variance > 0
    assert projection.noise.parts == {32: 4, 96: 2}.get(max(r, c), 1)
    slow = slow_tensor_sketch(gradient, projection._row_hash, projection._col_hash, dim)
    fast = projection(gradient).double().numpy()
    assert fast.shape == slow.shape == (3, dim)
    np.testing.assert_allclose(fast @ fast.T, slow @ slow.T, rtol=0, atol=1e-5 * np.abs(slow @ slow.T).max())


def test_vectors_are_count_sketched() -> None:
    values = torch.randn(2, 30)
    projection = TensorSketch(7, seed=3).projection("bias", torch.empty(30))
    slow = np.zeros((2, 7))
    for n, i in np.ndindex(2, 30):
        slow[n, projection._hash.buckets[i]] += projection._hash.signs[i] * values[n, i]
    np.testing.assert_allclose(projection(Dense(values)).numpy(), slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 2047, 2048])
def test_packed_spectra_keep_inner_products(dim: int) -> None:
    signals = torch.randn(4, dim, dtype=torch.float64)
    packed = pack_spectrum(torch.fft.rfft(signals, norm="ortho"), dim)
    assert packed.shape == signals.shape
    assert packed.dtype == torch.float64
    expected = signals @ signals.T
    assert (packed @ packed.T - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_packing_leaves_the_spectrum_as_it_was() -> None:
    spectrum = torch.fft.rfft(torch.randn(3, 8))
    before = spectrum.clone()
    pack_spectrum(spectrum, 8)
    assert torch.equal(spectrum, before)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Up to rounding in float32, relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * max(theirs.abs().max().item(), 1e-3)


lengths = st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96]))
dims = st.one_of(st.integers(1, 60), st.sampled_from([64, 96, 128]))


@given(lengths, lengths, dims, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_linear_in_tokens_and_gradients(r: int, c: int, dim: int, p: int, split: int, pool: bool) -> None:
    """Tokens may come in any portions, entry by entry or as factors: the sketch is that of their sum."""
    projection = TensorSketch(dim, pool=pool).projection("weight", torch.empty(r, c))
    gradient = factors(3, p, r, c, 0)
    whole = projection(gradient)
    parts = [Outer(gradient.rows[:, s], gradient.cols[:, s]) for s in (slice(split), slice(split, None))]
    assert_same(sum(projection(part) for part in parts if part.rows.shape[1]), whole)
    assert_same(projection(Dense(entries(gradient, r).float())), whole)
    scaled = projection(Outer(gradient.rows, -0.5 * gradient.cols))
    assert_same(scaled, -0.5 * whole)


@given(lengths, lengths, dims, st.integers(1, 9), st.booleans())
def test_token_ids_are_one_hot_rows(r: int, c: int, dim: int, p: int, pool: bool) -> None:
    projection = TensorSketch(dim, pool=pool).projection("weight", torch.empty(r, c))
    gradient = one_hot(3, p, r, c, 0)
    assert_same(projection(gradient), projection(Outer(F.one_hot(gradient.rows, r).float(), gradient.cols)))


@pytest.mark.parametrize("make", [lambda p: torch.randn(2, p, 40), lambda p: torch.zeros(2, p, dtype=torch.long)])
def test_no_token_is_a_gradient_of_zeros(make: Callable[[int], Tensor]) -> None:
    project = TensorSketch(64).projection("w", torch.empty(40, 50))
    assert torch.equal(project(Outer(make(0), torch.randn(2, 0, 50))), torch.zeros(2, 64))


def test_a_parameter_with_more_axes_is_a_matrix_of_its_first_axis_and_the_others() -> None:
    grads = torch.randn(2, 6, 3, 4)
    sketch = TensorSketch(16)
    flat = sketch.projection("conv", torch.empty(6, 12))(Dense(grads.flatten(2)))
    assert torch.equal(sketch.projection("conv", torch.empty(6, 3, 4))(Dense(grads)), flat)


@pytest.mark.parametrize("make", [factors, one_hot])
@pytest.mark.parametrize(("n", "p"), [(3, 7), (2, 16), (5, 17), (1, 50)])
def test_long_inputs_are_processed_in_portions(
    make: Callable[[int, int, int, int, int], Gradient], n: int, p: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens and more examples than one portion holds, on either side of its edges."""
    monkeypatch.setattr("captum_sdi.sketch.tensor_sketch.tokens_at_once", lambda *_: 16)
    projection = TensorSketch(4096).projection("weight", torch.empty(80, 90))
    gradient = make(n, p, 80, 90, 0)
    one_by_one = [projection(Outer(gradient.rows[i : i + 1], gradient.cols[i : i + 1])) for i in range(n)]
    assert_same(projection(gradient), torch.cat(one_by_one))
    assert_same(projection(gradient), projection(Dense(entries(gradient, 80).float())))


# --- hashes: collision-free, reproducible, independent ------------------------------------------------------------


@pytest.mark.parametrize(("length", "dim"), [(20, 64), (64, 64), (100, 64), (128, 64), (30, 7), (5, 1)])
def test_entries_of_one_block_never_collide(length: int, dim: int) -> None:
    """Sketches of unit gradients that differ in one factor only: orthogonal within a block of d entries."""
    units = torch.eye(length)
    other = torch.eye(70)[3].expand(length, 1, 70)
    sketches = [
        TensorSketch(dim, pool=True).projection("rows", torch.empty(length, 70))(Outer(units.unsqueeze(1), other)),
        TensorSketch(dim, pool=True).projection("cols", torch.empty(70, length))(Outer(other, units.unsqueeze(1))),
        TensorSketch(dim, pool=True).projection("vector", torch.empty(length))(Dense(units)),
    ]
    for sketch in sketches:
        for block in sketch.split(dim):
            assert (block @ block.T - torch.eye(len(block))).abs().max() <= 1e-5


def test_full_blocks_are_permutations() -> None:
    projection = TensorSketch(64).projection("weight", torch.empty(150, 200))
    for factor in (projection._row_hash, projection._col_hash):
        blocks = factor.buckets[: len(factor.buckets) // 64 * 64].view(-1, 64)
        assert torch.equal(blocks.sort(1).values, torch.arange(64).expand(len(blocks), -1))
        assert not torch.equal(blocks[0], blocks[1])
        assert factor.signs.unique().tolist() == [-1, 1]


def test_small_parameters_are_kept_exactly() -> None:
    gradient = factors(3, 4, 8, 8, 0)
    for name, parameter, given_ in (
        ("matrix", torch.empty(8, 8), gradient),
        ("ids", torch.empty(8, 8), one_hot(3, 4, 8, 8, 0)),
        ("vector", torch.empty(64), Dense(torch.randn(3, 64))),
        ("scalar", torch.empty(()), Dense(torch.randn(3))),
    ):
        projection = TensorSketch(64).projection(name, parameter)
        assert projection.noise == Noise(0.0)
        assert projection.width == parameter.numel()
        assert_same(projection(given_), entries(given_, 8).reshape(3, -1).float())
    assert TensorSketch(63).projection("matrix", torch.empty(8, 8)).noise == Noise(1 / 63)
    assert TensorSketch(64, pool=True).projection("vector", torch.empty(64)).noise == Noise(1 / 64)


def hashes(seed: int, name: str, checkpoint: str, length: int = 4096, dim: int = 64) -> tuple[Tensor, Tensor]:
    projection = TensorSketch(dim, seed).projection(name, torch.empty(length), checkpoint)
    return projection._hash.buckets, projection._hash.signs


@pytest.mark.parametrize(
    "other",
    [
        (1, "core.weight", "step-1"),
        (0, "core.bias", "step-1"),
        (0, "core.weight", "step-2"),
        (0, "core.weightstep-1", ""),
        (0, "core.weight", ""),
    ],
    ids=["seed", "name", "checkpoint", "boundary", "no checkpoint"],
)
def test_hashes_are_independent(other: tuple[int, str, str]) -> None:
    """They agree as often as chance has it: 1 bucket in 64, 1 sign in 2, within four standard errors."""
    (buckets, signs), (other_buckets, other_signs) = hashes(0, "core.weight", "step-1"), hashes(*other)
    for agree, chance in ((buckets == other_buckets, 1 / 64), (signs == other_signs, 1 / 2)):
        standard_error = (chance * (1 - chance) / agree.numel()) ** 0.5
        assert abs(agree.double().mean().item() - chance) <= 4 * standard_error


def test_the_two_factors_of_a_matrix_have_independent_hashes() -> None:
    projection = TensorSketch(64).projection("weight", torch.empty(4096, 4096))
    agree = (projection._row_hash.buckets == projection._col_hash.buckets).double().mean().item()
    assert abs(agree - 1 / 64) <= 4 * (1 / 64 / 4096) ** 0.5


@pytest.mark.parametrize("wrapped", ["module.core.weight", "_orig_mod.core.weight", "module._orig_mod.core.weight"])
def test_wrappers_change_no_hash(wrapped: str) -> None:
    assert canonical_name(wrapped) == "core.weight"
    assert torch.equal(hashes(0, wrapped, "a")[0], hashes(0, "core.weight", "a")[0])
    assert torch.equal(hashes(0, wrapped, "a")[1], hashes(0, "core.weight", "a")[1])


def checksum() -> list[float]:
    """Of sketches of fixed gradients; hexadecimal digits would make it depend on the last bit of an FFT."""
    ramp = torch.arange(1, 5 * 30 + 1).view(1, 5, 30) / 100
    gradients = {"a.weight": Outer(ramp, ramp.flip(2)), "b.weight": Dense(ramp), "c.bias": Dense(ramp.flatten(1))}
    shapes = {"a.weight": (30, 30), "b.weight": (5, 30), "c.bias": (150,)}
    sketch = TensorSketch(dim=24, seed=9)
    rows = [sketch.projection(name, torch.empty(shapes[name]), "step-7")(g) for name, g in gradients.items()]
    return torch.cat(rows).flatten().tolist()


def run_python(script: str, **environment: str) -> str:
    """The standard output of a new interpreter that can import this folder and the library."""
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_has_the_same_sketch() -> None:
    script = """
        import json, torch
        torch.manual_seed(123)  # neither the global state nor Python's hash seed matters
        from test_sketch import checksum
        print(json.dumps(checksum()))
    """
    theirs = json.loads(run_python(script, PYTHONHASHSEED="4321"))
    assert_same(torch.tensor(checksum()), torch.tensor(theirs))


def looped_rows_of(layers: list[str]) -> list[Tensor]:
    """Each parameter's features of training rows, through the public interface."""
    model, dim = spread(looped_gpt(n_prelude=0, n_coda=0, bias=False)()), 16
    sdi = SDIInfluence(model, rows(3, seed=1), layers=layers, loop="core", batch_size=3, sketch=TensorSketch(dim))
    features = sdi.compute_intermediate_quantities(rows(3, seed=1))
    return list(features.split(dim, dim=1))


def test_layers_in_any_order_and_number_have_the_same_sketch() -> None:
    first, second = "core.blocks.0.mlp.fc", "core.blocks.1.attn.qkv"
    both, swapped = looped_rows_of([first, second]), looped_rows_of([second, first])
    assert len(both) == len(swapped) == 2
    for (alone,) in (looped_rows_of([first]), looped_rows_of([second])):
        for together in (both, swapped):
            assert min((alone - row).abs().max() for row in together) <= 1e-6 * alone.abs().max()


# --- precision and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sketches_are_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    for make in (factors, one_hot, dense):
        given_ = make(2, 3, 20, 30, 0)
        coarse = _converted(given_, dtype)
        projection = TensorSketch(16).projection("weight", torch.empty(20, 30, dtype=dtype))
        assert projection.dtype == projection(coarse).dtype == torch.float32
        assert_same(projection(coarse), projection(_converted(coarse, torch.float32)))
    bias = TensorSketch(16).projection("bias", torch.empty(16, dtype=dtype))
    assert bias.dtype == bias(Dense(torch.ones(2, 16, dtype=dtype))).dtype == torch.float32


def _converted(gradient: Gradient, dtype: torch.dtype) -> Gradient:
    """Its floating point fields in another dtype."""
    fields = {f.name: getattr(gradient, f.name) for f in dataclasses.fields(gradient)}
    return type(gradient)(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in fields.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_keeps_float64_and_lifts_half_precision(dtype: torch.dtype) -> None:
    expected = torch.promote_types(dtype, torch.float32)
    for make in (factors, one_hot, dense):
        gradient = _converted(make(2, 3, 6, 5, 0), dtype)
        projection = Exact().projection("weight", torch.empty(6, 5, dtype=dtype))
        assert projection.noise == Noise(0.0)
        assert projection.dtype == projection(gradient).dtype == expected
        error = (projection(gradient).double() - entries(gradient, 6).flatten(1)).abs().max()
        assert error <= (1e-14 if dtype == torch.float64 else 1e-5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [factors, one_hot, dense])
def test_torchs_default_dtype_and_device_change_nothing(
    make: Callable[[int, int, int, int, int], Gradient], dtype: torch.dtype
) -> None:
    gradient, parameter = make(2, 3, 20, 30, 0), torch.empty(20, 30)
    expected = TensorSketch(16).projection("weight", parameter)(gradient)
    with default_dtype(dtype), torch.device("meta"):
        assert torch.equal(TensorSketch(16).projection("weight", parameter)(gradient), expected)


def test_global_random_states_are_untouched() -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    checksum()
    Exact().projection("weight", torch.empty(3, 4))(factors(2, 3, 3, 4, 0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


def test_gradients_are_not_changed_in_place() -> None:
    for make in (factors, one_hot, dense):
        gradient = make(2, 3, 20, 30, 0)
        TensorSketch(16).projection("weight", torch.empty(20, 30))(gradient)
        again = make(2, 3, 20, 30, 0)
        assert all(torch.equal(getattr(gradient, f.name), getattr(again, f.name)) for f in dataclasses.fields(again))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [factors, one_hot, dense])
def test_a_gpu_has_the_same_sketch(make: Callable[[int, int, int, int, int], Gradient]) -> None:
    gradient = make(2, 3, 20, 30, 0)
    on_gpu = type(gradient)(**{f.name: getattr(gradient, f.name).cuda() for f in dataclasses.fields(gradient)})
    projection = TensorSketch(16).projection("weight", torch.empty(20, 30, device="cuda"))
    assert projection.device.type == projection(on_gpu).device.type == "cuda"
    assert_same(projection(on_gpu).cpu(), TensorSketch(16).projection("weight", torch.empty(20, 30))(gradient))


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, -3])
def test_dim_must_be_positive(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"TensorSketch\(dim=\.\.\.\) must be at least 1, got {dim}\. 2048"):
        TensorSketch(dim)


@pytest.mark.parametrize("setting", ["dim", "seed"])
@pytest.mark.parametrize("value", [2.0, "8", True, None])
def test_settings_must_be_integers(setting: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"TensorSketch\({setting}=\.\.\.\) must be an int, got {value!r}\."):
        TensorSketch(**{setting: value})


def test_a_vector_has_no_factors() -> None:
    with pytest.raises(TypeError, match="vector's gradient comes entry by entry"):
        TensorSketch(4).projection("bias", torch.empty(9))(factors(1, 2, 3, 3, 0))


def test_sketches_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TensorSketch(8).dim = 9  # type: ignore[misc]
    assert TensorSketch(8, seed=1) == TensorSketch(8, 1) != TensorSketch(8, 1, pool=True)
    assert len({TensorSketch(8), TensorSketch(8), Exact(), Exact()}) == 2


# --- through SDIInfluence -----------------------------------------------------------------------------------------


def test_error_falls_like_one_over_the_square_root_of_dim(seed: int) -> None:
    """Relative error of trajectories, in log-log.

    The slope is -1/2 up to two effects of the ends. At the smallest dim every factor is hashed in several blocks,
    which adds at most a factor √3 to the error, that is at most log(√3)/log(64) = 0.13 to the slope; the few seeds
    (each averages over 60 numbers that share its hashes) scatter it by another 0.02: -0.515 to -0.535 in four runs.
    """
    model = spread(looped_gpt(n_embd=48, n_prelude=0, n_coda=0, n_core=1)(), scale=0.1)
    trains, tests, dims = rows(5, seed=1), rows(4, seed=2), (16, 64, 256, 1024)

    def trajectories(sketch: TensorSketch | Exact) -> Tensor:
        sdi = SDIInfluence(model, trains, loop="core", batch_size=5, sketch=sketch)
        return sdi.step_influence(tests).trajectories

    exact = trajectories(Exact())

    def error(dim: int) -> float:
        sketched = [trajectories(TensorSketch(dim, 100 * seed + s)) for s in range(6)]
        return (torch.stack(sketched) - exact).square().mean().sqrt().item() / exact.square().mean().sqrt().item()

    errors = [error(dim) for dim in dims]
    slope = np.polyfit(np.log(dims), np.log(errors), 1)[0]
    assert -0.65 <= slope <= -0.45, f"slope {slope:.3f}; errors {dict(zip(dims, errors, strict=True))}"


MEMORY_SCRIPT = """
    import torch
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset
    from captum_sdi import Exact, SDIInfluence, TensorSketch
    from test_sketch import peak_mib

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Linear(4096, 4096, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.tanh(self.core(x))
            return x

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return (output.mean((1, 2)) - labels) ** 2

    model = Looped()
    train = TensorDataset(torch.randn(16, 4, 4096), torch.randn(16))
    inputs = (torch.randn(2, 4, 4096), torch.randn(2))
    sdi = SDIInfluence(model, train, loss_fn=loss, batch_size=16, loop="core", sketch=TensorSketch(2048))
    baseline = peak_mib()
    result = sdi.step_influence(inputs)
    used = peak_mib() - baseline
    assert result.trajectories.shape == (2, 16, 2) and result.trajectories.abs().min() > 0
    ballast = torch.ones(2**26 + 2**18 * int(used))  # 256 MiB more than that: the meter must notice
    assert peak_mib() - baseline > used + 128, "peak memory is not measured"
    print(used)
"""


def peak_mib() -> float:
    """The largest resident memory of this process so far, in MiB.

    Not `resource.getrusage` where there is a choice: on Linux its maximum survives fork and exec, so that in a
    subprocess of a large process nothing smaller than its parent would ever show.
    """
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
    resource = pytest.importorskip("resource", reason="no way to measure peak memory here")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.long
def test_no_per_example_gradient_is_ever_in_memory() -> None:
    """16 per-example gradients of a 4096 x 4096 layer are 1 GiB; the whole call must do with a tenth of one batch's."""
    used = float(run_python(MEMORY_SCRIPT).strip().splitlines()[-1])
    assert used < 100, f"{used:.0f} MiB above the baseline"

"""Scores do not depend on the neighbours in a batch, or an error says that they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, looped_gpt, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import spread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_sdi import Exact, SDIInfluence, TensorSketch, coverage_check
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import TokenCrossEntropy

D, V = 6, 11
REFUSED = r"depend on the batch: in a batch of .*fix one noise per position.*batch_size=1"


class Base(nn.Module):
    """An embedding, a loop of three steps over one block, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.block, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = h + torch.tanh(self.block(h))
        return h

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.looped(self.emb(input_ids)))


class OneByOne(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.stack([self.looped(x[None])[0] for x in self.emb(input_ids)]))


class Joined(Base):
    """As `OneByOne`, but what is expanded is joined: the batch grows."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.cat([self.looped(x[None]) for x in self.emb(input_ids)]))


class Groups(Base):
    """Examples of one depth together."""

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.emb(input_ids)
        depth = 2 + input_ids[:, 0] % 2
        out = h.clone()
        for d in depth.unique().tolist():
            x = h[depth == d]
            for _ in range(d):
                x = x + self.block(x)
            out[depth == d] = x
        return self.head(out)


class TakenApart(Base):
    """Positions are computed once for the batch, and the first row is taken as that of all."""

    def __init__(self) -> None:
        super().__init__()
        self.wpe = nn.Embedding(16, D)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.emb(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for _ in range(3):
            h = torch.tanh(self.block(h + self.wpe(positions)[0]))
        return self.head(h)


class Mean(Base):
    """Sees its padding: it takes no mask."""

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = torch.tanh(self.block(h + h.mean(1, keepdim=True)))
        return h


class Normed(Base):
    """Mixes examples."""

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = torch.tanh(self.block(h)) - h.mean(0, keepdim=True)
        return h


class Noisy(Base):
    def forward(self, input_ids: Tensor, noise: Tensor | None = None) -> Tensor:
        h = self.emb(input_ids)
        return self.head(self.looped(h + (torch.randn_like(h) if noise is None else noise)))


class Swallows(Base):
    def forward(self, input_ids: Tensor, n_loops: int = 3, **kwargs: Any) -> Tensor:
        return super().forward(input_ids)


class ByBatch(nn.Module):
    """A loss divided by a count over the batch."""

    reduction = "none"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(1) / (labels[:, 1:] != -100).sum()


def equal_rows(n: int = 4, length: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, V, (n, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def sdi(model: nn.Module, data: Any, **kwargs: Any) -> SDIInfluence:
    return SDIInfluence(model, data, **{"sketch": Exact(), "loop": "block", **kwargs})


class FullOfFour(Base):
    """Mixes examples where there are four or more, as a layer with room for so many tokens does."""

    def looped(self, h: Tensor) -> Tensor:
        h = super().looped(h)
        return h if len(h) < 4 else torch.cat([h[:-1], h[-1:] + h[:1]])


class ByLargest(nn.Module):
    """Losses divided by the largest of the batch."""

    reduction = "none"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        return losses / losses.detach().max()


def seeded(batch: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {}


def refused_in_batches(model: nn.Module, data: Any, match: str = REFUSED, **kwargs: Any) -> None:
    """In batches it is refused; one by one it works."""
    with pytest.raises(ValueError, match=match):
        sdi(model, data, batch_size=3, **kwargs).influence(data)
    assert sdi(model, data, batch_size=1, **kwargs).influence(data).isfinite().all()


# --- A1, A2: calls for one example ---


@pytest.mark.parametrize("layers", ["loop", None])
def test_a1_a_forward_that_takes_examples_one_by_one_is_refused(layers: Any) -> None:
    refused_in_batches(OneByOne(), equal_rows(), layers=layers)


@pytest.mark.parametrize("kind", [Joined, Groups])
def test_a1_a_foreign_error_of_groups_says_batch_size_1(kind: type[Base]) -> None:
    data = equal_rows()
    for depth, row in enumerate(data):
        row["input_ids"][0] = 1 + depth % 2
    refused_in_batches(kind(), data, match="batch_size=1")


def test_a2_a_call_for_the_whole_batch_that_is_taken_apart_is_refused() -> None:
    refused_in_batches(TakenApart(), equal_rows(), layers=["block", "wpe"])


# --- A3: whatever depends on the batch ---


@pytest.mark.parametrize("sketch", [Exact(), TensorSketch(dim=32), TensorSketch(dim=32, pool=True)])
@pytest.mark.parametrize("kind", [Mean, Normed])
def test_a3_padding_that_is_seen_and_mixing_are_refused(kind: type[Base], sketch: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        refused_in_batches(kind(), rows(4, seed=1), sketch=sketch)


def test_a3_a_loss_over_the_batch_is_refused() -> None:
    refused_in_batches(Base(), equal_rows(), loss_fn=ByBatch())


def test_a3_a_seed_per_call_is_refused_and_the_advice_works() -> None:
    refused_in_batches(Noisy(), equal_rows(), forward_kwargs=seeded)
    noise = torch.randn(1, 12, D, generator=torch.Generator().manual_seed(1))

    def fixed(batch: Any) -> dict[str, Tensor]:
        n, length = batch["input_ids"].shape
        return {"noise": noise[:, :length].expand(n, -1, -1)}

    one, many = (sdi(Noisy(), equal_rows(), batch_size=b, forward_kwargs=fixed).influence(equal_rows()) for b in (1, 3))
    assert torch.allclose(one, many, rtol=1e-4, atol=1e-5)


def test_a3_padding_is_compared_at_the_first_batch_that_has_some() -> None:
    data = [*equal_rows(3), *rows(3, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=REFUSED):
            sdi(Mean(), data, batch_size=3).influence(data[:1])


def padded_to(length: int, batch: list[dict[str, Tensor]], *, on_the_left: bool = False) -> dict[str, Tensor]:
    """Without a mask; longer rows are cut."""
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def pad(name: str, tensor: Tensor) -> Tensor:
        n_pads = length - len(tensor)
        return F.pad(tensor, (n_pads, 0) if on_the_left else (0, n_pads), value=padding[name])

    return {name: torch.stack([pad(name, row[name]) for row in batch]) for name in batch[0]}


def lengths_of(batch: list[dict[str, Tensor]]) -> list[int]:
    return [len(row["input_ids"]) for row in batch]


def padded_left(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded_to(max(lengths_of(batch)), batch, on_the_left=True)


def padded_right(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded_to(max(lengths_of(batch)), batch)


def of_fixed_length(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded_to(10, batch)


class SortedByLength(Base):
    """Sorts examples, the longest first, and never sorts them back; the first batch happens to be in order."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            input_ids = input_ids[attention_mask.sum(1).argsort(descending=True)]
        return self.head(self.looped(self.emb(input_ids)))


def test_a3_what_a_first_batch_in_order_hides_is_refused_at_a_later_one() -> None:
    ordered = sorted(rows(4, seed=1), key=lambda row: -len(row["input_ids"]))
    data = [*ordered, *reversed(ordered)]
    model = spread(SortedByLength().double())
    with pytest.raises(ValueError, match=REFUSED):
        SDIInfluence(model, data, loop="block", batch_size=2, sketch=Exact()).influence(data)


def test_a3_what_a_small_batch_of_tests_hides_is_refused_in_a_larger_one() -> None:
    data = equal_rows(8)
    with pytest.raises(ValueError, match=r"in a batch of 4.*batch_size=1"):
        sdi(FullOfFour(), data, batch_size=4).influence(data[:2])


def test_a3_a_loss_over_the_largest_is_refused_where_no_row_is_padded() -> None:
    data = equal_rows(8)
    with pytest.raises(ValueError, match=REFUSED):
        sdi(Base(), data, batch_size=4, loss_fn=ByLargest()).influence(data[:2])


def test_a3_left_padding_without_positions_or_mask_is_refused() -> None:
    loader = DataLoader(rows(4, seed=1), batch_size=4, collate_fn=padded_left)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=REFUSED):
        sdi(CASES[0].model(torch.float32), loader, loop="core").influence(rows(1, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a3_healthy_models_are_not_warned_of(dtype: torch.dtype, checkpointing: bool) -> None:
    for case in (CASES[0], CASES[3]):
        model, data = case.model(dtype), rows(6, seed=1)
        kwargs = {"batch_size": 4, "loop": "core", "layers": None, "activation_checkpointing": checkpointing}
        assert sdi(model, data, **kwargs).influence(data).isfinite().all()  # type: ignore[arg-type]


# --- any of them: right, or refused ---


def loader(data: Any, batch_size: int, collate: Any) -> DataLoader[Any]:
    """By the package's own collate function, or another."""
    return DataLoader(data, batch_size, collate_fn=collate or Collator())


def cut_to_the_shortest(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shortest = min(len(row["input_ids"]) for row in batch)
    return Collator()([{name: column[:shortest] for name, column in row.items()} for row in batch])


def test_a3_rows_cut_in_a_later_batch_are_refused_by_name() -> None:
    data = [{"input_ids": torch.arange(1, 1 + length)} for length in (5, 5, 6, 8, 8)]
    data = [{**row, "labels": row["input_ids"]} for row in data]
    batches = loader(data, 2, cut_to_the_shortest)
    with pytest.raises(ValueError, match="Train example 3 has 6 tokens in a batch of 2, 8 alone: the collate"):
        sdi(Mean(), batches).influence(loader(data[:2], 2, None))


def cut_to_the_median(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    median = sorted(len(row["input_ids"]) for row in batch)[len(batch) // 2]
    return Collator()([{name: column[:median] for name, column in row.items()} for row in batch])


def test_a3_rows_cut_and_padded_in_a_later_batch_are_refused_by_name() -> None:
    data = [{"input_ids": torch.arange(1, 1 + length)} for length in (5, 4, 5, 3, 5, 8)]
    data = [{**row, "labels": row["input_ids"]} for row in data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        with pytest.raises(ValueError, match="Train example 5 has 5 tokens in a batch of 3, 8 alone: the collate"):
            sdi(Base(), loader(data, 3, cut_to_the_median)).influence(loader(data[:1], 1, None))


KINDS: tuple[Callable[[], nn.Module], ...] = (Base, OneByOne, Joined, Groups, TakenApart, Mean, Normed)


@settings(max_examples=25, derandomize=True, deadline=None, phases=(Phase.generate,))
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(3, 8), min_size=2, max_size=5),
    batch_size=st.integers(2, 4),
    layers=st.sampled_from(["loop", None]),
    masked=st.booleans(),
    collate=st.sampled_from([None, padded_right, padded_left, of_fixed_length, cut_to_the_shortest]),
)
def test_a3_scores_are_those_of_one_by_one_or_an_error(
    kind: Callable[[], nn.Module], lengths: list[int], batch_size: int, layers: Any, masked: bool, collate: Any
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(1, V, (length,), generator=generator) for length in lengths]
    data = [{"input_ids": row, "labels": row} for row in ids]
    if masked:
        data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in data]
    model = kind().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = sdi(model, loader(data, 1, collate), layers=layers).influence(loader(data, 1, collate))
        batches = loader(data, batch_size, collate)
        try:
            many = sdi(model, batches, layers=layers).influence(batches)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert "batch_size=1" in refusal
        # Where padding on the left predicts the first token, and where tokens are lost.
        assert kind is not Base or collate in (padded_left, cut_to_the_shortest)
    else:
        assert (one - many).norm() <= 1e-6 * one.norm()


# --- A7, A8: labels ---


def test_a7_labels_already_shifted_are_warned_of() -> None:
    tokens = torch.stack([row["input_ids"] for row in equal_rows(4, length=7)])
    data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
    with pytest.warns(UserWarning, match=r"shifted by one already.*shift=False") as caught:
        sdi(Base(), data, batch_size=2).influence((tokens[:1, :-1], tokens[:1, 1:]))
    assert len(caught) == 1
    unshifted = TokenCrossEntropy(shift=False)
    sdi(Base(), data, batch_size=2, loss_fn=unshifted).influence((tokens[:1, :-1], tokens[:1, 1:]))


def test_a7_equal_tokens_are_not_taken_for_shifted_labels() -> None:
    ids = torch.full((5,), 3)
    data = [{"input_ids": ids, "labels": ids}] * 2
    sdi(Base(), data, batch_size=2).influence(data)


def test_a8_labels_on_padding_are_warned_of_once() -> None:
    data = []
    for row in equal_rows(4, length=6):
        mask = torch.tensor([1, 1, 1, 1, 0, 0])
        data.append({"input_ids": row["input_ids"] * mask, "attention_mask": mask, "labels": row["input_ids"] * mask})
    model = CASES[0].model(torch.float32)
    with pytest.warns(UserWarning, match="4 labels stand where attention_mask is 0.*-100") as caught:
        sdi(model, data, loop="core", batch_size=2).influence(data)
    assert len(caught) == 1


# --- A15, B9, B13 ---


def test_a15_a_misspelt_keyword_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"test_forward_kwargs names \['num_loops'\].*swallows"):
        sdi(Swallows(), equal_rows(), test_forward_kwargs={"num_loops": 7}).influence(equal_rows())
    sdi(Swallows(), equal_rows(), test_forward_kwargs={"n_loops": 7}).influence(equal_rows())


def test_b9_rows_longer_than_the_model_takes_are_refused() -> None:
    model = spread(looped_gpt(n_positions=8)())
    data = rows(6, seed=1, longest=8)
    data[4] = rows(1, seed=2, longest=9)[0]
    for batch_size in (1, 2):
        with pytest.raises(
            ValueError, match=r"train example 4 has 9 tokens.*max_position_embeddings is 8.*max_length=8"
        ):
            sdi(model, data, loop="core", batch_size=batch_size).influence(data[:2])


@pytest.mark.parametrize("proponents", ["no", 0, None])
def test_b13_proponents_must_be_a_bool(proponents: Any) -> None:
    for call in ("influence", "step_influence"):
        with pytest.raises(TypeError, match=r"proponents must be True.*or False; got"):
            getattr(sdi(Base(), equal_rows()), call)(equal_rows(), k=2, proponents=proponents)


# --- all examples of a batch, at the user's asking ---


class ByCapacity(Base):
    """A router with room for six tokens of a batch, in their order: the last examples find none."""

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.looped(self.emb(input_ids))
        wants = (self.block(h).sum(-1) > 0).flatten()
        has_room = wants & (wants.cumsum(0) <= 6)
        return self.head(h * (1 + has_room.view(*input_ids.shape, 1)))


class HaltsByMean(Base):
    """Goes on while the batch's states move by more than so much on average."""

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(8):
            before, h = h, h + 0.5 * torch.tanh(self.block(h))
            if (h - before).detach().abs().mean() < 0.25:
                break
        return h


class MixesFromFour(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.looped(self.emb(input_ids))
        return self.head(h + h.mean(0) if len(h) >= 4 else h)


class HarderHalf(nn.Module):
    """Only the half of the batch with the larger losses counts."""

    reduction = "none"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = TokenCrossEntropy()(logits, labels)
        return losses * (losses >= losses.detach().median())


class SortsAndBack(Base):
    """Every example has its own loss, and inside the loop another one's place: all sums are right."""

    def looped(self, h: Tensor) -> Tensor:
        order = h.sum((1, 2)).argsort()
        return super().looped(h[order])[order.argsort()]


@pytest.mark.parametrize("kind", [ByCapacity, HaltsByMean, MixesFromFour, Base, SortsAndBack])
def test_a3_coverage_check_compares_every_example_with_itself_alone(kind: type[Base]) -> None:
    settings: dict[str, Any] = {"loop": "block", "layers": None}
    if kind is Base:
        assert max(coverage_check(Base(), equal_rows(5), **settings).differences) < 1e-5
        settings["loss_fn"] = HarderHalf()
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"5 examples of the batch depend on their neighbours.*in the batch.*alone"):
        coverage_check(spread(kind()), equal_rows(5), **settings)

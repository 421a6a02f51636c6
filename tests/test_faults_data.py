"""Train and test sets whose positions could not be told, or whose form is unusual: right, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import looped_gpt, rows
from index_faults import ended
from test_index_processes import ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from captum_sdi import Exact, SDIInfluence, coverage_check, find_loop
from captum_sdi.data import Collator

TRAIN, TEST = rows(10, seed=1), rows(2, seed=2)
Row = dict[str, Tensor]


def influence(train: Any, **kwargs: Any) -> SDIInfluence:
    return SDIInfluence(looped_gpt()(), train, sketch=Exact(), **{"loop": "core", **kwargs})


def refused(match: str, train: Any, call: Callable[[SDIInfluence], object] | None = None, **kwargs: Any) -> None:
    call = call or (lambda sdi: sdi.influence(TEST))
    with pytest.raises((ValueError, TypeError), match=match):
        call(influence(train, **kwargs))


# --- a position is an identity ---


def without_long(batch: list[Row]) -> Any:
    return Collator()([row for row in batch if len(row["input_ids"]) < 9])


def halves(batch: list[Row]) -> Any:
    return Collator()([{key: value[part] for key, value in row.items()} for row in batch for part in SLICES])


def packed(batch: list[Row]) -> Any:
    return {key: torch.cat([row[key] for row in batch]).unsqueeze(0) for key in batch[0]}


def shortest_first(batch: list[Row]) -> Any:
    return Collator()(sorted(batch, key=lambda row: len(row["input_ids"])))


SLICES = (slice(None, 4), slice(3, None))


@pytest.mark.parametrize(
    ("collate", "match"),
    [
        (without_long, r"yields 3 rows in batch 0, for which 4 were drawn.*Filter, split or pack"),
        (halves, "yields 8 rows in batch 0, for which 4"),
        (packed, "yields 1 rows in batch 0, for which 4"),
        (shortest_first, "changes the order of rows"),
    ],
)
def test_a4_a_collator_that_yields_other_rows_is_refused(collate: Any, match: str) -> None:
    loader = DataLoader(TRAIN, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    refused(f"train_dataset.*{match}", loader)
    refused(f"train_dataset.*{match}", TRAIN, lambda sdi: sdi.self_influence(), batch_size=4, collate_fn=collate)
    refused(f"train_dataset.*{match}", loader, call=lambda sdi: sdi.step_matrix(Collator()(TEST), indices=[1]))
    refused(f"inputs.*{match}", TRAIN, call=lambda sdi: sdi.influence(loader))


def test_a4_a_stream_whose_collator_leaves_rows_out_is_refused() -> None:
    loader = DataLoader(Rows(), batch_size=4, collate_fn=without_long)
    refused("train_dataset yields 3 rows in batch 0, for which 4", loader)


class Rows(IterableDataset):
    def __iter__(self) -> Iterator[Row]:
        return iter(TRAIN)


def test_a11_a_stream_with_several_workers_is_refused() -> None:
    refused("IterableDataset with num_workers=2.*num_workers of 0 or 1", DataLoader(Rows(), 2, num_workers=2))
    loader = DataLoader(TRAIN, 2, collate_fn=Collator(), num_workers=2, in_order=False)  # type: ignore[arg-type]
    refused("in_order=False", loader)


def test_a12_a_sampler_that_leaves_rows_out_is_refused() -> None:
    data: Any = TRAIN
    refused("draws 5 of its dataset's 10 rows.*Subset", DataLoader(data, 2, sampler=range(0, 10, 2)))
    batches = DataLoader(data, batch_sampler=[[0, 1], [4, 5]], collate_fn=Collator())
    refused("inputs draws 4 of its dataset's 10 rows", TRAIN, call=lambda sdi: sdi.influence(batches))
    refused("draws some of its dataset's 10 rows more than once", DataLoader(data, 2, sampler=[*range(10), 3]))


class Endless(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(10)


def test_b10_a_sampler_without_end_is_refused() -> None:
    refused("more than once, or without end", DataLoader(TRAIN, 2, sampler=Endless()))  # type: ignore[arg-type]


def test_a5_a_loader_that_is_split_already_is_refused() -> None:
    data: Any = TRAIN
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    refused("split among 2 processes.*Pass the plain DataLoader", DataLoader(data, 2, sampler=sampler))
    data_loader = pytest.importorskip("accelerate.data_loader")
    plain = DataLoader(data, 2, collate_fn=Collator())
    shard = data_loader.BatchSamplerShard(plain.batch_sampler, num_processes=2, process_index=0)
    refused("split among 2 processes", DataLoader(data, batch_sampler=shard, collate_fn=Collator()))


class Crops(Dataset[Row]):
    """Another piece of a row at every reading."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Row:
        start = int(torch.randint(0, 3, ()))
        return {key: value[start:][:4] for key, value in TRAIN[index].items()}


@pytest.mark.parametrize(
    "call",
    [
        lambda sdi: sdi.influence(TEST, k=2, rerank=10),
        lambda sdi: sdi.step_influence(TEST, k=2),
        lambda sdi: sdi.step_matrix(TEST, indices=[1, 2, 5, 8]),
        lambda sdi: sdi.self_influence(),
    ],
)
def test_a6_data_that_differs_at_every_reading_is_refused(call: Any) -> None:
    refused("train_dataset yields something else when it is read again.*crops or masks", Crops(), call, batch_size=4)


def test_a6_the_second_reading_of_one_question_is_compared() -> None:
    """A row far behind, where nothing is read twice at once, is edited between the pass and the winners'."""
    train = [*TRAIN, *rows(30, seed=3)]

    class Edited(Collator):
        n_read = 0

        def __call__(self, batch: Any) -> Any:
            type(self).n_read += sum(row is train[-1] for row in batch)
            made = super().__call__(batch)
            if batch[-1] is train[-1] and self.n_read > 1:
                made["input_ids"][-1, 0] = 0
            return made

    train[-1]["input_ids"][0] = 5
    refused(
        "train_dataset yields something else when it is read again: batch 9",
        train,
        lambda sdi: sdi.influence(TEST, k=1, rerank=40),
        batch_size=4,
        collate_fn=Edited(),
    )


# --- unusual values ---


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return influence(TRAIN, batch_size=4).influence(TEST)


def as_type(dtype: torch.dtype, data: list[Row]) -> list[Row]:
    return [{key: value.to(dtype) for key, value in row.items()} for row in data]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_b10_ids_of_small_and_unsigned_integers_are_ids(dtype: torch.dtype) -> None:
    train, test = [
        as_type(dtype, [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data])
        for data in (TRAIN, TEST)
    ]
    plain = influence(as_type(torch.int64, train)).influence(as_type(torch.int64, test))
    assert torch.allclose(influence(train).influence(test), plain)
    whole = {key: torch.stack([row[key][:6] for row in train]) for key in train[0]}
    find_loop(looped_gpt()(), whole)
    coverage_check(looped_gpt()(), whole)
    longer = {key: value.long() for key, value in whole.items()}
    scores = influence(DataLoader([whole], batch_size=None)).influence(whole)
    assert torch.allclose(scores, influence(DataLoader([longer], batch_size=None)).influence(longer))


@pytest.mark.parametrize("token", [-1, 11, 2])
def test_b10_a_padding_token_that_the_model_does_not_know_is_never_looked_up(token: int, expected: Tensor) -> None:
    model = looped_gpt()()
    model.config.pad_token_id = token
    scores = SDIInfluence(model, TRAIN, loop="core", sketch=Exact(), batch_size=4).influence(TEST)
    assert torch.allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("nothing", [[], torch.zeros(0, dtype=torch.long)])
def test_b10_an_empty_row_is_named(nothing: Any, batch_size: int) -> None:
    empty = {"input_ids": nothing, "labels": nothing}
    refused("Row 0 of a batch is empty: its input_ids hold no token", [empty, *TRAIN], batch_size=batch_size)


def test_b10_masks_of_two_ragged_axes_are_named() -> None:
    train = [{**row, "attention_mask": torch.ones(len(row["labels"]), len(row["labels"]))} for row in TRAIN]
    refused(r"hold 'attention_mask' of shapes \[\(9, 9\), .*pass collate_fn=", train, batch_size=2)
    train = [{**row, "weight": torch.ones(()) if i else torch.ones(2)} for i, row in enumerate(TRAIN)]
    refused(r"hold 'weight' of shapes \[\(2,\), \(\)\]", train, batch_size=2)


class ByAttribute(nn.Module):
    """Takes the tokenizer's whole answer, as many models of tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = looped_gpt()()

    def forward(self, encoding: Any) -> Tensor:
        return self.inner(input_ids=encoding.input_ids, attention_mask=encoding.attention_mask).logits


def test_b10_an_encoding_keeps_its_attributes(expected: Tensor) -> None:
    encoding = pytest.importorskip("transformers").BatchEncoding

    def batch_of(rows: list[Row]) -> Any:
        batch = Collator()(rows)
        labels = batch.pop("labels")
        return encoding(batch), labels

    loader = DataLoader(TRAIN, batch_size=4, collate_fn=batch_of)  # type: ignore[arg-type]
    model = ByAttribute()
    sdi = SDIInfluence(model, loader, loop="inner.core", sketch=Exact())
    assert torch.allclose(sdi.influence(batch_of(TEST)), expected, atol=1e-6)


def test_b10_a_sparse_embedding_is_covered() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(11, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 11)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            for _ in range(3):
                hidden = hidden + self.block(hidden).tanh()
            return self.head(hidden)

    batch = {key: torch.stack([row[key][:6] for row in TRAIN]) for key in TRAIN[0]}
    assert "embed.weight" in coverage_check(Sparse(), batch, loop="block", layers=None).parameters


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_b10_a_further_column_is_dropped_for_wrapped_models_too(wrap: Any, expected: Tensor) -> None:
    from captum_sdi.data.batch import forward_keywords

    model = looped_gpt()()
    assert forward_keywords(wrap(model)) == forward_keywords(model)


def test_b10_a_sharded_model_is_refused() -> None:
    model = looped_gpt()()
    next(model.parameters()).device_mesh = "of FSDP2's DTensor"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"The model is sharded.*Load it whole"):
        SDIInfluence(model, TRAIN)


# --- unusual containers ---


def columns(data: list[Row], kind: Callable[[Tensor], Any]) -> dict[str, list[Any]]:
    return {key: [kind(row[key]) for row in data] for key in data[0]}


@pytest.mark.parametrize("kind", [Tensor.tolist, Tensor.numpy, Tensor.clone])
def test_b11_columns_are_rows(kind: Any, expected: Tensor) -> None:
    scores = influence(columns(TRAIN, kind), batch_size=4).influence(columns(TEST, kind))
    assert torch.allclose(scores, expected)


def test_b11_a_slice_of_a_dataset_is_rows(expected: Tensor) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(columns(TRAIN, Tensor.tolist))
    test = datasets.Dataset.from_dict(columns(TEST, Tensor.tolist))
    assert torch.allclose(influence(data[:10], batch_size=4).influence(test[:2]), expected)
    assert torch.allclose(influence(data, batch_size=4).influence(test), expected)
    splits = datasets.DatasetDict({"train": data, "test": test})
    refused(r"train_dataset holds several datasets: name one, such as train_dataset\['train'\]", splits)
    refused(r"inputs\['train'\]", data, lambda sdi: sdi.influence(splits))


@pytest.mark.parametrize("kind", [Tensor.tolist, Tensor.numpy])
def test_b11_a_batch_may_be_arrays_or_lists(kind: Any) -> None:
    train = [{key: value[:6] for key, value in row.items()} for row in TRAIN]
    test = [{key: value[:6] for key, value in row.items()} for row in TEST]

    def batch_of(rows: list[Row]) -> dict[str, Any]:
        return {key: kind(value) for key, value in Collator()(rows).items()}

    plain = influence(train, batch_size=4).influence(test)
    loader = DataLoader(train, batch_size=4, collate_fn=batch_of)  # type: ignore[arg-type]
    assert torch.allclose(influence(loader).influence(batch_of(test)), plain)
    loader = DataLoader(train, 4, collate_fn=lambda rows: tuple(batch_of(rows).values()))  # type: ignore[arg-type]
    columns_of_tensors = tuple(Collator()(train).values())
    for data in (loader, columns_of_tensors):
        sdi = SDIInfluence(looped_gpt()(), data, loop="core", sketch=Exact(), batch_size=4)
        assert torch.allclose(sdi.influence(tuple(batch_of(test).values())), plain)


def test_b11_what_has_no_rows_is_named() -> None:
    refused("one row of a dataset.*pass it in a list", {key: value.tolist() for key, value in TRAIN[0].items()})
    refused("inputs is one row", TRAIN, lambda sdi: sdi.influence({"input_ids": [1, 2], "labels": [1, 2]}))
    refused("Columns need one entry per row.*'labels': 9", {**columns(TRAIN, Tensor.tolist), "labels": [[1]] * 9})
    refused("train_dataset is a dict of 'a', neither a Dataset nor columns", {"a": 5})
    refused("got 'train.jsonl'. Load it first; texts are rows by captum_sdi.texts", "train.jsonl")
    ragged = DataLoader(TRAIN, 2, collate_fn=lambda rows: columns(rows, Tensor.tolist))  # type: ignore[arg-type]
    refused("input_ids of a batch is a list of rows of different length", ragged)


def test_b11_a_table_of_pandas_is_named() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(columns(TRAIN, Tensor.tolist))
    refused(r"train_dataset is a DataFrame: pass its rows, train_dataset.to_dict\('records'\)", table)
    influence(table.to_dict("records")).influence(TEST)


@pytest.mark.parametrize(
    "form",
    [
        list,
        lambda data: DataLoader(data, 3, collate_fn=Collator()),
        lambda data: Listed(data),
        lambda data: Collator()(data),
    ],
)
def test_b12_find_loop_and_coverage_check_take_what_the_class_takes(form: Any) -> None:
    model = looped_gpt()()
    assert find_loop(model, form(TRAIN)).modules == ("core",)
    assert max(coverage_check(model, form(TRAIN)).differences) < 1e-4


class Listed(Dataset[Row]):
    def __init__(self, data: list[Row]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self.data[index]


# --- an index, and several processes ---


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda train: train[3]["input_ids"].fill_(1), "example 3 is the first that differs"),
        (lambda train: train.append(TEST[0]), "it has 11 examples, the index 10"),
        (lambda train: train.pop(), "it has 9 examples, the index 10"),
        (lambda train: train.reverse(), "example 0 is the first that differs"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda sdi: sdi.influence(TEST),
        lambda sdi: sdi.step_influence(TEST, k=3),
        lambda sdi: sdi.influence(TEST, k=3, rerank=5),
        lambda sdi: sdi.self_influence(),
    ],
)
def test_e3_an_index_is_compared_with_the_data_at_every_call(
    change: Callable[[list[Row]], object], match: str, call: Callable[[SDIInfluence], object], tmp_path: Path
) -> None:
    train = [{key: value.clone() for key, value in row.items()} for row in TRAIN]
    sdi = influence(train, index=tmp_path / "index", batch_size=4)
    call(sdi)
    call(sdi)
    change(train)
    with pytest.raises(ValueError, match=f"is of another train_dataset: {match}"):
        call(sdi)


@pytest.mark.parametrize("call", [lambda sdi: sdi.influence(TEST), lambda sdi: sdi.step_matrix(TEST)])
def test_e3_without_an_index_the_present_data_answer(call: Callable[[SDIInfluence], Tensor]) -> None:
    train = [{key: value.clone() for key, value in row.items()} for row in TRAIN]
    sdi = influence(train)
    before = call(sdi)
    train[3]["input_ids"].fill_(1)
    train.append(TEST[0])
    assert torch.equal(call(sdi), call(influence(train)))
    assert not torch.equal(call(sdi)[:, 3], before[:, 3])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process")
@pytest.mark.parametrize("split", [lambda rank: TRAIN[rank::2], lambda rank: [*TRAIN[:9], TEST[rank]]])
def test_a5_ranks_that_read_other_rows_are_refused(split: Callable[[int], list[Row]], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def work(rank: int) -> None:
        match = "train_dataset is another one in process 1 than in process 0.*plain, whole"
        refused(match, split(rank), index=tmp_path / "index", batch_size=4)

    assert [ended(child) for child in ranks(work)] == [0, 0]

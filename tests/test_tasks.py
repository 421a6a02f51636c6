"""Tasks: the answers are right, the rows are what models take, the same seed is the same data."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.tasks import Example, TaskDataset, addition, draw_examples, parity

TASKS = [parity, addition]


def texts(data: TaskDataset) -> list[str]:
    return [data.text(i) for i in range(len(data))]


@pytest.mark.parametrize("sizes", [{}, {"min_bits": 3, "max_bits": 70}])
def test_parity_answers_are_right(sizes: dict[str, int]):
    for text in texts(parity(200, **sizes)):
        bits, answer = text.split("=")
        assert int(answer) == sum(map(int, bits)) % 2


def test_running_parity_is_predicted_after_every_bit():
    plain, running = parity(200), parity(200, running=True)
    assert texts(plain) == texts(running)
    for i, row in enumerate(running):
        bits, answer = running.text(i).split("=")
        so_far = [sum(map(int, bits[: end + 1])) % 2 for end in range(len(bits))]
        # A causal model predicts at position j the label of position j + 1; after "=", the answer.
        predicted = row["labels"][1 : len(bits) + 2]
        assert running.decode(predicted) == "".join(map(str, so_far)) + answer
        assert int((row["labels"] != -100).sum()) == len(bits) + 1


@pytest.mark.parametrize("sizes", [{}, {"min_bits": 3, "max_bits": 40}])
def test_addition_answers_are_right(sizes: dict[str, int]):
    for text in texts(addition(200, **sizes)):
        sum_, answer = text.split("=")
        left, right = sum_.split("+")
        assert len(left) == len(right) == len(answer) - 1
        assert int(left, base=2) + int(right, base=2) == int(answer[::-1], base=2)


@pytest.mark.parametrize("task", TASKS)
def test_rows_say_what_their_text_says(task: Callable[..., TaskDataset]):
    data = task(60, max_bits=5)
    for i, row in enumerate(data):
        text, length = data.text(i), len(data.text(i))
        answer = text.split("=")[1]
        assert {name: (value.dtype, value.shape) for name, value in row.items()} == dict.fromkeys(
            ("input_ids", "labels", "attention_mask"), (torch.int64, (data.length,))
        )
        assert row["attention_mask"].tolist() == [1] * length + [0] * (data.length - length)
        assert data.decode(row["input_ids"]) == text
        assert (row["input_ids"] == data.pad_token_id).tolist() == (row["attention_mask"] == 0).tolist()
        predicted = row["labels"] != -100
        assert predicted.nonzero().flatten().tolist() == list(range(length - len(answer), length))
        assert data.decode(row["labels"][predicted]) == answer
    assert int(data.input_ids.max()) == data.vocab_size - 1


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_spread_and_examples_differ(task: Callable[..., TaskDataset]):
    data = task(60, min_bits=2, max_bits=6)
    assert len(set(texts(data))) == len(data) == 60
    counts = Counter(len(text) for text in texts(data))
    assert len(counts) == 5
    # Parity has only 4 strings of 2 bits, 8 of 3; the others share what is left of 60 equally.
    expected = [4, 8, 16, 16, 16] if task is parity else [12] * 5
    assert [counts[length] for length in sorted(counts)] == expected


def test_every_string_can_be_drawn():
    strings = {f"{i:0{bits}b}" for bits in range(1, 9) for i in range(2**bits)}
    assert {text.split("=")[0] for text in texts(parity(510))} == strings


@pytest.mark.parametrize("task", TASKS)
def test_rows_come_in_random_order(task: Callable[..., TaskDataset]):
    lengths = [len(text) for text in texts(task(300, max_bits=8))]
    first, second = sum(lengths[:150]) / 150, sum(lengths[150:]) / 150
    assert abs(first - second) < 0.15 * first
    assert lengths != sorted(lengths)


def test_split_parts_share_nothing_and_lose_nothing():
    data = parity(510)
    train, held_out = data.split(held_out=110)
    assert (len(train), len(held_out)) == (400, 110)
    assert texts(train) + texts(held_out) == texts(data)
    assert torch.equal(held_out.input_ids, data.input_ids[400:])
    assert not set(texts(train)) & set(texts(held_out))


# First rows, written down by another process. A change here is a change of everybody's data.
FIRST = {
    (parity, 0): ["00110010=1", "01011=1", "0000=0"],
    (parity, -1): ["1010000=0", "01001100=1", "1=1"],
    (addition, 0): ["10+11=101", "111+111=0111", "0000+0000=00000"],
    (addition, 1): ["01+10=110", "1111+0001=00001", "10+11=101"],
}


@pytest.mark.parametrize(("task", "task_seed"), FIRST)
def test_same_seed_same_data(task: Callable[..., TaskDataset], task_seed: int):
    assert texts(task(100, seed=task_seed))[:3] == FIRST[task, task_seed]


@pytest.mark.parametrize("task", TASKS)
def test_global_random_state_is_left_alone(task: Callable[..., TaskDataset]):
    python, pytorch = random.getstate(), torch.get_rng_state()
    task(50).split(held_out=10)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), pytorch)


@pytest.mark.parametrize("task", TASKS)
def test_a_loader_feeds_a_model(task: Callable[..., TaskDataset]):
    data = task(20)
    config = LoopedGPTConfig(vocab_size=data.vocab_size, n_positions=data.length, n_embd=8, n_head=2, n_loops=2)
    torch.manual_seed(0)
    model = LoopedGPTForCausalLM(config)
    for batch in DataLoader(data, batch_size=8):
        loss = model(**batch).loss
        assert loss.isfinite()


def test_a_task_of_another_kind():
    """Targets that are not the text itself, as in a puzzle with blanks."""
    data = TaskDataset([Example("1_", " 2"), Example("_", "1")], characters="12_", length=3)
    assert data.input_ids.tolist() == [[1, 3, 0], [3, 0, 0]]
    assert data.labels.tolist() == [[-100, 2, -100], [1, -100, -100]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 0}, r"size=0 must be an integer of at least 1"),
        ({"size": 2.5}, r"size=2.5 must be an integer"),
        ({"min_bits": 0}, r"min_bits=0 must be an integer of at least 1"),
        ({"max_bits": "8"}, r"max_bits='8' must be an integer of at least 1"),
        ({"min_bits": 5, "max_bits": 4}, r"min_bits=5 is more than max_bits=4; swap or change"),
        ({"seed": None}, r"seed=None must be an integer"),
        ({"size": 99, "max_bits": 2}, r"size=99: only \d+ different examples of these lengths"),
    ],
)
def test_impossible_arguments(task: Callable[..., TaskDataset], arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        task(**{"size": 5, **arguments})


@pytest.mark.parametrize("held_out", [0, 5, -1])
def test_impossible_split(held_out: int):
    with pytest.raises(ValueError, match=rf"held_out={held_out} must leave rows on both sides"):
        parity(5).split(held_out)


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        (Example("01", " "), r"targets of another length"),
        (Example.question("010=", "1"), r"is longer than length=4; raise the length"),
        (Example.question("2=", "1"), r"has \['2'\], not in characters='01='"),
        (Example.question("1 =", "1"), r"has \[' '\], not in characters='01='"),
    ],
)
def test_impossible_examples(example: Example, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        TaskDataset([example], characters="01=", length=4)


def test_draw_examples_numbers_within_a_length():
    drawn = draw_examples(6, seed=0, spaces={1: 2, 5: 4}, make=lambda length, number: Example(f"{length}{number}", ""))
    assert sorted(example.text for example in drawn) == ["10", "11", "50", "51", "52", "53"]

"""Tasks: the answers are right, the rows are what models take, the same seed is the same data."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.tasks import (
    Example,
    Facts,
    TaskDataset,
    addition,
    draw_examples,
    p_hop,
    parity,
    permute_digits,
    sorting,
    sudoku,
)
from captum_sdi.tasks.sudoku_solver import rounds_to_solve, solutions

TASKS = [parity, addition]
ALL_TASKS = [*TASKS, p_hop, sorting, sudoku]


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
    (p_hop, 0): ["3:bdbcdbcdacdcdcadcbdcdcdadbdbdcbc=b"],
    (sorting, 0): ["591=159", "41764=14467", "542=245"],
    (sudoku, 0): [".12.4..3..4....2"],
}


@pytest.mark.parametrize(("task", "task_seed"), FIRST)
def test_same_seed_same_data(task: Callable[..., TaskDataset], task_seed: int):
    first = FIRST[task, task_seed]
    assert texts(task(100, seed=task_seed))[: len(first)] == first
    assert texts(task(100, seed=task_seed + 7)) != texts(task(100, seed=task_seed))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_global_random_state_is_left_alone(task: Callable[..., TaskDataset]):
    python, pytorch = random.getstate(), torch.get_rng_state()
    task(50).split(held_out=10)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), pytorch)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_difficulty_stays_with_its_example(task: Callable[..., TaskDataset]):
    data = task(40)
    train, held_out = data.split(held_out=10)
    assert data.difficulty.tolist() == [example.difficulty for example in data.examples]
    assert torch.equal(torch.cat([train.difficulty, held_out.difficulty]), data.difficulty)
    assert "difficulty" not in data[0]  # forward would not take it


@pytest.mark.parametrize("task", ALL_TASKS)
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


# p-hop induction


def hopped(string: str, hops: int, place: int) -> str | None:
    """The definition of Sanford et al., places from 1: find(i) = max({0} | {j <= i: X_{j-1} = X_i})."""
    for _ in range(hops):
        place = max([0, *(j for j in range(2, place + 1) if string[j - 2] == string[place - 1])])
        if place == 0:
            return None
    return string[place - 1]


@pytest.mark.parametrize("sizes", [{}, {"min_hops": 9, "max_hops": 11, "length": 90, "letters": 6}])
def test_p_hop_answers_are_right(sizes: dict[str, int]):
    data = p_hop(150, **sizes)
    for i, text in enumerate(texts(data)):
        hops, question = text.split(":")
        string, answer = question.split("=")
        assert len(string) == sizes.get("length", 32)
        assert all(left != right for left, right in itertools.pairwise(string))
        assert answer == hopped(string, int(hops), len(string))
        assert int(hops) == data.difficulty[i]
    fewest, most = sizes.get("min_hops", 1), sizes.get("max_hops", 4)
    counts = Counter(data.difficulty.tolist())
    assert sorted(counts) == list(range(fewest, most + 1))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_running_p_hop_is_predicted_after_every_letter():
    plain, running = p_hop(60, length=14), p_hop(60, length=14, running=True)
    assert texts(plain) == texts(running)
    for text, example in zip(texts(running), running.examples, strict=True):
        hops, question = text.split(":")
        string = question.split("=")[0]
        wanted = [hopped(string, int(hops), place) or " " for place in range(1, len(string) + 1)]
        # A causal model predicts at each place the target of the next one; at "=", the answer again.
        assert example.targets == " " * 3 + "".join(wanted) + wanted[-1]


def test_every_string_with_enough_hops_can_be_drawn():
    strings = {"".join(some) for some in itertools.product("abc", repeat=5) if all(map(str.__ne__, some, some[1:]))}
    wanted = {f"2:{string}={answer}" for string in strings if (answer := hopped(string, 2, 5))}
    drawn = texts(p_hop(len(wanted), min_hops=2, max_hops=2, length=5, letters=3))
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == wanted


# Sorting


@pytest.mark.parametrize("sizes", [{}, {"min_length": 6, "max_length": 11, "numbers": 36}])
def test_sorting_answers_are_right(sizes: dict[str, int]):
    data = sorting(200, **sizes)
    for text, difficulty in zip(texts(data), data.difficulty.tolist(), strict=True):
        items, answer = text.split("=")
        swaps, bubbles = 0, list(items)
        for end in range(len(items), 1, -1):
            for i in range(end - 1):
                if bubbles[i] > bubbles[i + 1]:  # in ASCII too letters come after digits
                    bubbles[i : i + 2] = bubbles[i + 1], bubbles[i]
                    swaps += 1
        assert ("".join(bubbles), swaps) == (answer, difficulty)
    lengths = Counter(len(text) // 2 for text in texts(data))
    assert sorted(lengths) == list(range(sizes.get("min_length", 2), sizes.get("max_length", 8) + 1))


def test_every_list_can_be_drawn():
    drawn = {text.split("=")[0] for text in texts(sorting(9 + 27, min_length=2, max_length=3, numbers=3))}
    assert drawn == {"".join(some) for length in (2, 3) for some in itertools.product("012", repeat=length)}


# Sudoku: the slow truth knows units as sets and solves cell by cell


def solved(example: Example) -> str:
    return "".join(t if c == "." else c for c, t in zip(*example[:2], strict=True))


@cache
def unit_sets(size: int) -> list[set[int]]:
    box = {4: 2, 9: 3}[size]
    cells = range(size * size)
    names = [lambda c: c // size, lambda c: c % size, lambda c: (c // size // box, c % size // box)]
    return [{c for c in cells if name(c) == key} for name in names for key in sorted({name(c) for c in cells})]


def allowed(text: str, size: int, cell: int) -> set[str]:
    taken = {text[other] for unit in unit_sets(size) if cell in unit for other in unit}
    return set("123456789"[:size]) - taken


def count_solutions(text: str, size: int) -> int:
    blanks = [cell for cell, character in enumerate(text) if character == "."]
    if not blanks:
        return 1
    cell = min(blanks, key=lambda c: len(allowed(text, size, c)))
    return sum(count_solutions(text[:cell] + d + text[cell + 1 :], size) for d in allowed(text, size, cell))


def rounds(text: str, solution: str) -> int:
    """Difficulty as defined, with sets and strings."""
    size = {16: 4, 81: 9}[len(text)]
    count = 0
    while "." in text:
        options = {cell: allowed(text, size, cell) for cell, c in enumerate(text) if c == "."}
        singles = {cell for cell, some in options.items() if len(some) == 1}
        for unit in unit_sets(size):
            for digit in "123456789"[:size]:
                places = [cell for cell in unit if digit in options.get(cell, ())]
                singles |= set(places) if len(places) == 1 else set()
        filled = singles or {min(options, key=lambda cell: len(options[cell]))}
        text = "".join(solution[cell] if cell in filled else c for cell, c in enumerate(text))
        count += 1
    return count


@pytest.mark.parametrize(("box", "size"), [(2, 250), (3, 6)])
def test_sudokus_have_exactly_the_solution_they_say(box: int, size: int):
    digits = "123456789"[: box * box]
    data = sudoku(size, box=box)
    for example in data.examples:
        solution = solved(example)
        assert all(sorted(solution[cell] for cell in unit) == list(digits) for unit in unit_sets(box * box))
        assert all((c == ".") == (t != " ") for c, t in zip(*example[:2], strict=True))
        assert count_solutions(example.text, box * box) == 1
        assert example.difficulty == rounds(example.text, solution)
    assert data.characters == digits + "."
    assert data.encode(digits) == list(range(1, box * box + 1))


def test_solver_finds_all_solutions_and_only_them():
    rng = random.Random(0)
    grids = list(solutions([0] * 16, box=2))
    assert len(grids) == len(set(map(tuple, grids))) == 288
    for _ in range(60):
        puzzle = [digit if rng.random() < 0.3 else 0 for digit in rng.choice(grids)]
        puzzle[rng.randrange(16)] = rng.randrange(1, 5)  # often a contradiction
        fitting = [grid for grid in grids if all(p in (0, g) for p, g in zip(puzzle, grid, strict=True))]
        assert sorted(solutions(puzzle, box=2)) == sorted(fitting)


def test_a_hard_sudoku_takes_guesses():
    """Inkala's puzzle of 2012: after no more than a few singles nothing is left to reason with."""
    text = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
    puzzle = [int(c) if c != "." else 0 for c in text]
    (solution,) = solutions(puzzle, box=3)
    assert "".join(map(str, solution)).startswith("812753649")
    assert rounds_to_solve(puzzle, solution, box=3) == rounds(text, "".join(map(str, solution)))


def test_no_two_sudokus_are_equal_up_to_relabelling():
    data = sudoku(600, min_givens=4, max_givens=5)
    relabellings = [str.maketrans("1234", "".join(order)) for order in itertools.permutations("1234")]
    forms = {min(text.translate(table) for table in relabellings) for text in texts(data)}
    assert len(forms) == 600


def test_numbers_of_givens_are_spread():
    counts = Counter(16 - text.count(".") for text in texts(sudoku(50)))
    assert counts == dict.fromkeys(range(4, 9), 10)
    assert {81 - text.count(".") for text in texts(sudoku(3, box=3, min_givens=30, max_givens=30))} == {30}


def test_permuted_digits_make_other_puzzles_of_the_same_kind(seed: int):
    data = sudoku(300)
    rows = default_collate(list(data))
    before = {name: value.clone() for name, value in rows.items()}
    batch = permute_digits(rows, digits=4, generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(rows[name], before[name]) for name in rows)
    assert torch.equal(batch["attention_mask"], rows["attention_mask"])
    orders = Counter()
    for old, new, labels, new_labels in zip(
        rows["input_ids"], batch["input_ids"], rows["labels"], batch["labels"], strict=True
    ):
        pairs = {*zip(old.tolist(), new.tolist(), strict=True), *zip(labels.tolist(), new_labels.tolist(), strict=True)}
        mapping = dict(pairs)
        assert len(mapping) == len(pairs)  # one name for each token, in the puzzle and in its solution
        assert (mapping.pop(5), mapping.pop(-100)) == (5, -100)
        assert sorted(mapping) == sorted(mapping.values()) == [1, 2, 3, 4]
        orders[tuple(mapping[digit] for digit in (1, 2, 3, 4))] += 1
    assert len(orders) == 24
    assert max(orders.values()) < 300 / 24 + 6 * (300 / 24) ** 0.5


def test_a_bidirectional_model_is_asked_for_the_blanks():
    data = sudoku(6)
    torch.manual_seed(0)
    config = LoopedGPTConfig(data.vocab_size, n_positions=16, n_embd=8, n_head=2, n_loops=2, is_causal=False)
    output = LoopedGPTForCausalLM(config)(**default_collate(list(data)))
    at_blanks = [
        F.cross_entropy(output.logits[i, cell].unsqueeze(0), torch.tensor([int(target)]))
        for i, example in enumerate(data.examples)
        for cell, target in enumerate(example.targets)
        if target != " "
    ]
    torch.testing.assert_close(output.loss, torch.stack(at_blanks).mean())


@pytest.mark.parametrize(
    ("task", "arguments", "sentence"),
    [
        (sudoku, {"box": 4}, r"box=4 must be an integer of at least 2 and at most 3"),
        (sudoku, {"min_givens": 3}, r"min_givens=3 must be an integer of at least 4 and at most 15"),
        (sudoku, {"box": 3, "max_givens": 81}, r"max_givens=81 must be an integer of at least 17 and at most 80"),
        (sudoku, {"max_givens": 3}, r"max_givens=3 must be"),
        (sudoku, {"min_givens": 9, "max_givens": 8}, r"min_givens=9 is more than max_givens=8"),
        # 12 solutions up to relabelling, and 16 places for the blank
        (
            sudoku,
            {"size": 193, "min_givens": 15, "max_givens": 15},
            r"only 19\d different examples of these numbers of g",
        ),
        (p_hop, {"letters": 2}, r"letters=2 must be an integer of at least 3 and at most 26"),
        (p_hop, {"letters": 27}, r"letters=27 must be"),
        (p_hop, {"length": 5}, r"length=5 must be an integer of at least 6"),
        (p_hop, {"max_hops": 0}, r"max_hops=0 must be"),
        (p_hop, {"length": 9, "letters": 26}, r"1000 attempts gave no example for 4, one of the numbers of hops"),
        (sorting, {"numbers": 37}, r"numbers=37 must be an integer of at least 2 and at most 36"),
        (sorting, {"min_length": 3, "max_length": 2}, r"min_length=3 is more than max_length=2"),
        (sorting, {"size": 13, "max_length": 3, "numbers": 2}, r"only 12 different examples of these lengths"),
    ],
)
def test_impossible_puzzles(task: Callable[..., TaskDataset], arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        task(**{"size": 5, **arguments})


def test_facts_chain_into_the_answers_of_questions():
    facts = Facts.draw(seed=1)
    documents, questions = facts.documents(), facts.questions(hops=4)
    assert documents.texts != Facts.draw(seed=2).documents().texts
    facts_by_question = dict(text.split(" is ") for text in documents.texts)
    assert len(facts_by_question) == len(documents) == len(questions) == 52
    for question, chain in zip(range(52), facts.chains(hops=4).tolist(), strict=True):
        asked, answer = questions.texts[question].split(" is ")
        person, *relations = asked.split("'s ")
        for document, relation in zip(chain, relations, strict=True):
            assert documents.texts[document].startswith(f"{person}'s {relation} is ")
            person = facts_by_question[f"{person}'s {relation}"]
        assert person == answer
        assert len({*chain}) == 4
        row = questions[question]
        assert documents.decode(row["input_ids"]) == f"{asked.split(chr(39))[0]} 's {relations[0]}"
        assert documents.decode(row["labels"][:1]) == answer
        assert row["labels"][1:].tolist() == [-100, -100]
    assert documents.labels[0, 1:].tolist() == documents.input_ids[0, 1:].tolist()
    with pytest.raises(ValueError, match=r"hops=0 must be an integer of at least 1"):
        facts.questions(hops=0)

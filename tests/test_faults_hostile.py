"""Hostile files of formats that others write, and of our own: read, or refused by an error that names them."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hostile import is_refused, mutated_anywhere, mutated_bytes, mutated_json, mutated_text
from pages import random_result
from safetensors.torch import save_file
from shell_project import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from captum_sdi import StepInfluence
from captum_sdi.checkpoints import load_checkpoint
from captum_sdi.cli.tables import open_examples
from captum_sdi.data.encoder import Encoder
from captum_sdi.index.faiss import Faiss
from captum_sdi.preconditioners.shelf import read_kept, write_kept
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.unrolled import SGD, TrainingRun
from captum_sdi.unrolled.run_files import read_start, read_tensors, write_tensors
from captum_sdi.unrolled.states import WayBack

pyarrow = pytest.importorskip("pyarrow")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

TRIED = 15 * int(os.environ.get("CAPTUM_SDI_KILLS", "3"))
"""How many hostile files of each format; `make test-faults` tries more."""

WORDS = [*"abcdefghi", "[PAD]", "[UNK]"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


class Format(NamedTuple):
    """A sound file, how it is made hostile, and how it is read."""

    file: Path
    mutated: Callable[[Any, random.Random], Any]
    read: Callable[[], object]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", chat_template=TEMPLATE)


# --- examples ---

ROWS = [{"text": f"a b {letter}", "note": number} for number, letter in enumerate("cdefgh")]
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
]


def examples(file: Path, mutated: Callable[[Any, random.Random], Any]) -> Format:
    encoder = Encoder(vocab_size=len(WORDS), tokenizer=tokenizer(), max_length=8)

    def read() -> None:
        rows = open_examples([file], encoder)
        for position in range(len(rows)):
            json.dumps(rows.description(position), default=str)
            assert len(rows[position]["input_ids"]) == len(rows[position]["labels"]) > 0

    return Format(file, mutated, read)


def mutated_lines(text: str, chance: random.Random) -> str:
    """One line of several is hostile."""
    lines = text.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = mutated_json(lines[place], chance)
    return "\n".join(lines) + "\n"


def jsonl(folder: Path, rows: list[Any]) -> Format:
    write_rows(folder / "rows.jsonl", rows)
    return examples(folder / "rows.jsonl", mutated_lines)


def csv_table(folder: Path) -> Format:
    lines = [f'"{row["text"]}",{row["note"]}' for row in ROWS]
    (folder / "rows.csv").write_text("text,note\n" + "\n".join(lines) + "\n")
    return examples(folder / "rows.csv", mutated_text)


def json_array(folder: Path) -> Format:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return examples(folder / "rows.json", mutated_json)


def parquet(folder: Path) -> Format:
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return examples(folder / "rows.parquet", mutated_anywhere)


def dataset(folder: Path, name: str) -> Format:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    mutated = mutated_anywhere if name.endswith(".arrow") else mutated_json
    file = folder / "rows" / name
    read = examples(folder / "rows", mutated).read
    return Format(file, mutated, read)


# --- checkpoints ---


def checkpoint(folder: Path, name: str) -> Format:
    """Of a Trainer, in two shards."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    place = folder / "checkpoint-3"
    place.mkdir()
    log = [{"step": step, "learning_rate": 0.1 / step, "loss": 1.0} for step in (1, 2, 3)]
    content = {"global_step": 3, "max_steps": 6, "log_history": log}
    (place / "trainer_state.json").write_text(json.dumps(content))
    torch.save({"_last_lr": [0.025], "base_lrs": [0.1], "last_epoch": 3}, place / "scheduler.pt")
    weights = model.state_dict()
    shards = {"0": "model-00001-of-00002.safetensors", "1": "model-00002-of-00002.safetensors"}
    for layer, shard in shards.items():
        save_file({key: tensor for key, tensor in weights.items() if key.startswith(layer)}, place / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: shards[key[0]] for key in weights}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    mutated = mutated_json if name.endswith(".json") else mutated_bytes
    return Format(place / name, mutated, lambda: load_checkpoint(model, place))


def pickled(folder: Path) -> Format:
    model = nn.Linear(2, 1)
    torch.save({"model_state_dict": model.state_dict(), "learning_rate": 0.1}, folder / "step-1.pt")
    return Format(folder / "step-1.pt", mutated_anywhere, lambda: load_checkpoint(model, folder / "step-1.pt"))


# --- our own ---


def influence_map(folder: Path) -> Format:
    file = folder / "map.safetensors"
    values, tokens = torch.randn(1, 2, 2, 3), ("a", "b", "c")
    labels = {"step": (0, "coda"), "test_token": (0, 1, 2)}
    split = InfluenceMap(values, tuple(labels), labels, torch.tensor([[4, 7]]), values.abs(), (tokens,), {4: tokens})
    split.save(file)

    def read() -> None:
        loaded = InfluenceMap.load(file)
        str(loaded)
        loaded.sum()

    return Format(file, mutated_bytes, read)


def scores(folder: Path) -> Format:
    random_result().save(folder / "scores.safetensors")
    return Format(
        folder / "scores.safetensors", mutated_bytes, lambda: str(StepInfluence.load(folder / "scores.safetensors"))
    )


def training_run(folder: Path, name: str) -> Format:
    state = torch.get_rng_state()
    run = TrainingRun(SGD(), [0.5, 0.25], [[0, 1], [2]], 1.0, "sum", 1, random_states=[state] * 3)
    run.save(folder / "run", {"weight": torch.ones(3)})
    (file,) = (folder / "run").glob(name)

    def read() -> None:
        loaded = TrainingRun.load(folder / "run")
        assert loaded.n_updates == len(loaded.batches)
        start = read_start(folder / "run")
        if name != "run.json":  # what is read is what was written
            assert torch.equal(start["weight"], torch.ones(3))
            assert all(torch.equal(found, state) for found in loaded.random_states or ())

    return Format(file, mutated_json if name == "run.json" else mutated_bytes, read)


def unrolled_state(folder: Path) -> Format:
    file = folder / "state-00000000.safetensors"
    write_tensors(file, {"0": torch.ones(4), "1": torch.zeros(4)})

    def read() -> None:
        assert torch.equal(read_tensors(file)["0"], torch.ones(4))

    return Format(file, mutated_bytes, read)


def way_back(folder: Path) -> Format:
    kept = WayBack(folder, torch.ones(2, 4))
    kept.write(3, (torch.ones(2, 4),), torch.ones(2, 5))
    (file,) = folder.iterdir()

    def read() -> None:
        n_left, adjoint, scores = kept.read(torch.ones(1))
        assert n_left == 3
        assert torch.equal(adjoint[0], torch.ones(2, 4))
        assert torch.equal(scores, torch.ones(2, 5))

    return Format(file, mutated_bytes, read)


def fitted(folder: Path) -> Format:
    """What a preconditioner keeps: a damaged file is computed anew, and so never refused."""
    file = folder / "fisher.safetensors"
    write_kept(file, "key", {"factor": torch.ones(4)})

    def read() -> None:
        found = read_kept(file, "key")
        assert found is None or torch.equal(found["factor"], torch.ones(4))

    return Format(file, mutated_bytes, read)


class SomeRows:
    """What FAISS reads of a table of rows."""

    identity, width, n_examples = "some rows", 4, 60

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = torch.randn(self.n_examples, self.width)

    def blocks(self) -> list[Tensor]:
        return [self.rows]

    def gathered(self, positions: list[int]) -> Tensor:
        return self.rows[positions]


def faiss(folder: Path) -> Format:
    """What FAISS made of an index: a damaged file is made anew."""
    table = SomeRows(folder)
    expected = Faiss("IVF2,Flat").nearest(table, table.rows[:3], 5).positions
    (file,) = folder.glob("*.faiss")

    def read() -> None:
        assert torch.equal(Faiss("IVF2,Flat").nearest(table, table.rows[:3], 5).positions, expected)

    return Format(file, mutated_anywhere, read)


FORMATS: dict[str, Callable[[Path], Format]] = {
    "jsonl of texts": lambda folder: jsonl(folder, ROWS),
    "jsonl of token ids": lambda folder: jsonl(folder, [{"input_ids": [1, 2], "attention_mask": [1, 1]}] * 3),
    "jsonl of completions": lambda folder: jsonl(folder, [{"prompt": "a b", "completion": " c d"}] * 3),
    "jsonl of chats": lambda folder: jsonl(folder, [{"messages": CHAT}] * 3),
    "csv": csv_table,
    "json": json_array,
    "parquet": parquet,
    "dataset_info.json": lambda folder: dataset(folder, "dataset_info.json"),
    "state.json": lambda folder: dataset(folder, "state.json"),
    "arrow": lambda folder: dataset(folder, "data-00000-of-00001.arrow"),
    "trainer_state.json": lambda folder: checkpoint(folder, "trainer_state.json"),
    "scheduler.pt": lambda folder: checkpoint(folder, "scheduler.pt"),
    "index.json": lambda folder: checkpoint(folder, "model.safetensors.index.json"),
    "shard of a checkpoint": lambda folder: checkpoint(folder, "model-00001-of-00002.safetensors"),
    "torch.save": pickled,
    "scores": scores,
    "map": influence_map,
    "run.json": lambda folder: training_run(folder, "run.json"),
    "random states": lambda folder: training_run(folder, "random_states-*"),
    "start": lambda folder: training_run(folder, "start-*"),
    "state of a run": unrolled_state,
    "unfinished scores of a run": way_back,
    "fitted": fitted,
    "faiss": faiss,
}


@pytest.mark.parametrize("name", FORMATS)
def test_e8_a_hostile_file_is_read_right_or_refused(name: str, tmp_path: Path, seed: int) -> None:
    if name == "faiss":
        pytest.importorskip("faiss")
    sound = FORMATS[name](tmp_path)
    sound.read()
    is_text = sound.file.suffix in (".json", ".jsonl", ".csv")
    good = sound.file.read_text() if is_text else sound.file.read_bytes()
    chance = random.Random(f"{name} {seed}")
    n_refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a learning rate that is not there
        for _ in range(TRIED):
            bad = sound.mutated(good, chance)
            sound.file.write_bytes(bad.encode(errors="surrogatepass") if isinstance(bad, str) else bad)
            n_refused += is_refused(sound.read, sound.file)
    print(f"{name}: {TRIED} tried, {TRIED - n_refused} read, {n_refused} refused")
    assert n_refused > TRIED / 20 or name in ("fitted", "faiss", "scheduler.pt")

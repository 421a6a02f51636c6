"""The command line from end to end: its numbers are those of Python, and what goes wrong is said in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from cases import CASES, VOCAB
from reference import spread, truth
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from captum_sdi import Exact, SDIInfluence, SketchIndex, StepInfluence, TensorSketch
from captum_sdi.__main__ import main
from captum_sdi.data.encoder import Encoder
from captum_sdi.models import LoopedGPTForCausalLM, loop_layers
from captum_sdi.passes import Engine, Point
from captum_sdi.preconditioners import Hessian

CASE = CASES[1]
RATES = {5: 0.25, 10: 0.125}
WORDS = [*"abcdefghi", "[PAD]", "[UNK]"]
TRAIN = [" ".join(WORDS[(i * j + j) % 9] for j in range(2 + i % 7)) for i in range(12)]
QUERIES = [" ".join(WORDS[(i + 2 * j) % 9] for j in range(9 - i)) for i in range(3)]

Run = Callable[..., int]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: checkpoints with a tokenizer, as Trainer leaves them, and two files."""
    folder = tmp_path_factory.mktemp("project")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for step in RATES:
        place = folder / "run" / f"checkpoint-{step}"
        spread(CASE.make(), seed=step).save_pretrained(place)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(place)
        log = [{"step": step, "learning_rate": RATES[step]}]
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    _write(folder / "train.jsonl", [{"id": f"t{i}", "text": text} for i, text in enumerate(TRAIN)])
    _write(folder / "queries.jsonl", [{"text": text, "lang": "abc"} for text in QUERIES])
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, in which the shell stands."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def _write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def _rows(texts: list[str]) -> list[dict[str, torch.Tensor]]:
    ids = [torch.tensor([WORDS.index(word) for word in text.split()]) for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


def _python(*, layers: str | None = "loop", dim: int = 16, **settings: Any) -> SDIInfluence:
    model = LoopedGPTForCausalLM.from_pretrained("run/checkpoint-10")
    return SDIInfluence(model, _rows(TRAIN), "run", layers=layers, sketch=TensorSketch(dim, seed=3), **settings)


INDEX = "index --model run/checkpoint-10 --train train.jsonl --index idx --dim 16 --seed 3 --quiet"
SCORE = "score --index idx --query queries.jsonl -k 4 --out out --quiet --pictures 0"


def run(line: str, **changes: str) -> int:
    """Runs a line as a shell would; ``changes`` are options that replace those of the line."""
    words = line.split()
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, *value.split()]
    return main(words)


def _same_scores(lines: list[dict[str, Any]], result: StepInfluence, role: str = "proponents") -> None:
    for q, line in enumerate(lines):
        assert [pair["index"] for pair in line[role]] == result.indices[q].tolist()
        for name, field in (
            ("score", result.influence_scores),
            ("error", result.score_errors),
            ("prelude", result.prelude),
            ("coda", result.coda),
            ("trajectory", result.trajectories[:, :, : result.n_steps[q]]),
            ("trajectory_errors", result.trajectory_errors[:, :, : result.n_steps[q]]),
        ):
            found = torch.tensor([pair[name] for pair in line[role]])
            assert torch.allclose(found, field[q], rtol=1e-4, atol=1e-6), name


# --- numbers ---


def test_scores_are_those_of_python(here: Path) -> None:
    assert run(INDEX, checkpoints="run") == 0
    assert run(SCORE) == 0
    expected = _python().step_influence(_rows(QUERIES), k=4)
    assert expected.score_errors.min() > 0
    lines = _lines("out/scores.jsonl")
    _same_scores(lines, expected)
    assert [line["example"] for line in lines] == [{"text": text, "lang": "abc"} for text in QUERIES]
    for pair in lines[0]["proponents"]:
        i = pair["index"]
        assert (pair["line"], pair["example"]) == (i + 1, {"id": f"t{i}", "text": TRAIN[i]})
    saved, arrays = StepInfluence.load("out/scores.safetensors"), np.load("out/scores.npz")
    assert set(arrays) == {name for name, field in vars(saved).items() if isinstance(field, torch.Tensor)}
    assert torch.equal(saved.indices, expected.indices)
    for name, array in arrays.items():
        assert np.array_equal(array, getattr(saved, name).numpy()), name


def test_scores_are_the_truth_where_nothing_is_sketched(here: Path) -> None:
    assert run(INDEX, checkpoints="run", layers="all", dim="100000", dtype="float64") == 0
    assert run(SCORE.replace("-k 4", "-k 99")) == 0  # clipped
    parts = []
    for step, eta in RATES.items():
        model = LoopedGPTForCausalLM.from_pretrained(f"run/checkpoint-{step}").double()
        parts.append((eta, *([CASE.gradients(model, row, None) for row in _rows(texts)] for texts in (TRAIN, QUERIES))))
    expected = truth(parts)
    for q, line in enumerate(_lines("out/scores.jsonl")):
        assert len(line["proponents"]) == len(TRAIN)
        for pair in line["proponents"]:
            i = pair["index"]
            for name, value in (
                ("score", expected.totals[q, i]),
                ("trajectory", expected.trajectories[q, i]),
                ("prelude", expected.prelude[q, i]),
                ("coda", expected.coda[q, i]),
            ):
                assert torch.allclose(torch.tensor(pair[name]).double(), value, rtol=1e-4, atol=1e-5), name


def test_opponents_another_rank_and_another_depth(here: Path) -> None:
    assert run(INDEX) == 0
    assert run(f"{SCORE} --opponents --rank-by 2 --n-loops 5") == 0
    model = LoopedGPTForCausalLM.from_pretrained("run/checkpoint-10")
    sdi = SDIInfluence(model, _rows(TRAIN), sketch=TensorSketch(16, seed=3), test_forward_kwargs={"n_loops": 5})
    expected = sdi.step_influence(_rows(QUERIES), k=4, proponents=False, rank_by=1)
    lines = _lines("out/scores.jsonl")
    assert [line["n_steps"] for line in lines] == [5, 5, 5]
    _same_scores(lines, expected, "opponents")


def test_exact_gradients_decide_among_candidates(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    assert run(f"{SCORE} --rerank 3") == 1
    assert capsys.readouterr().err == "captum-sdi: error: --rerank 3 must be at least -k 4: it chooses among so many.\n"
    assert run(f"{SCORE} --rerank 12") == 0
    model = LoopedGPTForCausalLM.from_pretrained("run/checkpoint-10")
    exact = SDIInfluence(model, _rows(TRAIN), sketch=Exact()).step_influence(_rows(QUERIES), k=4)
    _same_scores(_lines("out/scores.jsonl"), exact)


def test_preconditioned_scores_are_those_of_python(here: Path) -> None:
    assert run(INDEX, checkpoints="run") == 0
    numbers = {"preconditioner_rank": "3", "preconditioner_damping": "0.5", "normalize": "train"}
    assert run(SCORE, preconditioner="hessian", **numbers) == 0
    expected = _python(preconditioner=Hessian(rank=3, damping=0.5), normalize="train")
    _same_scores(_lines("out/scores.jsonl"), expected.step_influence(_rows(QUERIES), k=4))


def test_numbers_that_a_preconditioner_does_not_have_are_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    assert run(f"{SCORE} --preconditioner fisher --preconditioner-rank 3") == 1
    sentence = "captum-sdi: error: --preconditioner-rank says nothing beside --preconditioner fisher.\n"
    assert capsys.readouterr().err == sentence
    assert run(f"{SCORE} --preconditioner-damping 0.1") == 1
    assert capsys.readouterr().err.endswith("--preconditioner-damping says nothing beside no --preconditioner.\n")
    assert run(f"{SCORE} --preconditioner adam") == 1
    assert "reads second moments beside a checkpoint's weights; None is no path" in capsys.readouterr().err


def test_token_ids_are_as_good_as_text(here: Path) -> None:
    assert run(INDEX) == 0
    assert run(SCORE) == 0
    rows = [{name: row[name].tolist() for name in row} for row in _rows(TRAIN)]
    _write(here / "train.jsonl", [{**row, "attention_mask": [1] * len(row["labels"])} for row in rows])
    _write(here / "queries.jsonl", [{"input_ids": row["input_ids"].tolist()} for row in _rows(QUERIES)])
    assert run(INDEX, index="idx2") == 0
    assert run(SCORE, index="idx2", out="out2") == 0
    for name, array in np.load("out/scores.npz").items():
        assert np.allclose(array, np.load("out2/scores.npz")[name], rtol=1e-4, atol=1e-6), name
    assert _lines("out2/scores.jsonl")[0]["example"] == {"text": QUERIES[0]}  # decoded


def test_labels_say_what_is_predicted(here: Path) -> None:
    rows = [{"input_ids": row["input_ids"].tolist()} for row in _rows(TRAIN)]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]
        row["labels"][1:-1] = [-100] * (len(row["labels"]) - 2)
    _write(here / "train.jsonl", rows)
    assert run(INDEX) == 0
    assert run(SCORE) == 0
    data = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
    model = LoopedGPTForCausalLM.from_pretrained("run/checkpoint-10")
    sdi = SDIInfluence(model, data, sketch=TensorSketch(16, seed=3), batch_size=5)
    _same_scores(_lines("out/scores.jsonl"), sdi.step_influence(_rows(QUERIES), k=4))


def test_layers_that_are_looped_on_request(here: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=12, n_embd=8, n_head=2, n_layer=4)
    spread(GPT2LMHeadModel(config)).save_pretrained("plain")
    options = {"model": "plain", "tokenizer": "run/checkpoint-10", "loop_layers": "1 3 2", "damping": "0.5"}
    options |= {"loop_mode": "layer", "anchor": "0.25"}
    assert run(INDEX, **options) == 0
    assert run(SCORE) == 0
    plain = GPT2LMHeadModel.from_pretrained("plain")
    model = loop_layers(plain, 1, 3, 2, damping=0.5, mode="layer", anchor=0.25)
    sdi = SDIInfluence(model, _rows(TRAIN), sketch=TensorSketch(16, seed=3), batch_size=4)
    lines = _lines("out/scores.jsonl")
    assert lines[0]["n_steps"] == 4
    _same_scores(lines, sdi.step_influence(_rows(QUERIES), k=4))


def test_adapters_on_a_looped_block(here: Path) -> None:
    peft = pytest.importorskip("peft")
    base = LoopedGPTForCausalLM.from_pretrained("run/checkpoint-10")
    config = peft.LoraConfig(
        r=2, target_modules=r"core\..*(attn|mlp)\..*", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained("adapter")
    assert run(INDEX, model="adapter", tokenizer="run/checkpoint-10") == 0
    assert all("lora_" in name for name in SketchIndex.open("idx").manifest.settings["parameters"])
    assert run(SCORE) == 0
    sdi = SDIInfluence(model.eval(), _rows(TRAIN), sketch=TensorSketch(16, seed=3), batch_size=4)
    _same_scores(_lines("out/scores.jsonl"), sdi.step_influence(_rows(QUERIES), k=4))


def test_named_layers_a_pooled_row_and_half_precision(here: Path) -> None:
    assert run(f"{INDEX} --pool", layers="core.blocks.0 ln_f", index_dtype="float16", batch_size="5") == 0
    index = SketchIndex.open("idx")
    assert (index.width, index.dtype, index.examples) == (16, torch.float16, 12)
    assert any("ln_f" in name for name in index.manifest.settings["parameters"])
    assert not any("core.blocks.1" in name for name in index.manifest.settings["parameters"])
    assert run(SCORE) == 0


# --- the index ---


def test_an_interrupted_index_is_completed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("captum_sdi.index.writer.SHARD_BYTES", 1)  # a shard per batch
    real, calls = Point.batch, []

    def batch(self: Point, *arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **settings)

    monkeypatch.setattr(Point, "batch", batch)
    line = f"{INDEX} --batch-size 4"
    assert run(line) == 130
    assert capsys.readouterr().err == "captum-sdi: interrupted: the same command goes on from here\n"
    assert not SketchIndex.open("idx").complete
    # Batches of the same examples throughout: in another company rows round differently, on some processors.
    assert run(f"{SCORE} --batch-size 4") == 0  # computes the rest
    assert SketchIndex.open("idx").complete
    assert run(line, index="idx2") == 0
    assert run(f"{SCORE} --batch-size 4", index="idx2", out="out2") == 0
    assert Path("out/scores.jsonl").read_text() == Path("out2/scores.jsonl").read_text()


def test_a_failed_index_is_not_taken_for_another(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _write(here / "other.jsonl", [{"text": "a b"}])
    assert run(INDEX) == 0
    before = Path("idx/command.json").read_text()
    assert run(INDEX, train="other.jsonl") == 1
    assert "is of another training set" in capsys.readouterr().err
    assert Path("idx/command.json").read_text() == before
    monkeypatch.setattr(Engine, "points", lambda *_: (_ for _ in ()).throw(ValueError("nothing\nworks")).__next__())
    assert run(INDEX, index="idx2") == 1
    assert capsys.readouterr().err == "captum-sdi: error: nothing works\n"
    assert not Path("idx2").exists()


def test_a_dry_run_says_what_the_index_takes_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(f"{INDEX} --dry-run", checkpoints="run") == 0
    assert sorted(os.listdir()) == ["queries.jsonl", "run", "train.jsonl"]
    head, time, memory, disk = capsys.readouterr().out.splitlines()
    assert head == "12 examples at 2 checkpoints on cpu"
    assert re.fullmatch(r"time +[\d.]+ (ms|s)  [\d.]+ (ms|s) a batch, 1 batch, and [\d.]+ (ms|s) a checkpoint", time)
    assert re.fullmatch(r"memory +[\d.]+ [MG]B  the whole process at the peak of a batch; the model is .*", memory)
    assert run(INDEX) == 0
    a_row = 4 * SketchIndex.open("idx").width
    assert f"disk    {2 * 12 * a_row / 1000:.3g} kB" in re.sub(" +", " ", disk).replace("disk ", "disk    ")
    assert disk.endswith("are free")


def test_a_project_may_move(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX, checkpoints="run") == 0
    assert run(SCORE) == 0
    Path("moved").mkdir()
    for name in ("idx", "run", "train.jsonl"):
        shutil.move(name, "moved")
    assert run(SCORE, index="moved/idx", out="out2") == 0  # together
    assert Path("out2/scores.jsonl").read_text() == Path("out/scores.jsonl").read_text()
    shutil.move("moved/idx", "elsewhere")
    where = {}
    for option, place in (("train", "train.jsonl"), ("checkpoints", "run"), ("model", "run/checkpoint-10")):
        capsys.readouterr()
        assert run(SCORE, index="elsewhere", out="out4", **where) == 1
        assert f"say with --{option} where" in capsys.readouterr().err
        where[option] = f"moved/{place}"
    assert run(SCORE, index="elsewhere", out="out4", **where) == 0
    assert Path("out4/scores.jsonl").read_text() == Path("out/scores.jsonl").read_text()


def test_a_train_file_that_changed_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    with open("train.jsonl", "a") as file:
        file.write('{"text": "a b"}\n')
    assert run(SCORE) == 1
    assert "train.jsonl is not the file that was indexed, or it has changed since" in capsys.readouterr().err
    assert not Path("out").exists()


def test_indexes_of_two_files_are_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the tasks of an array job write them: scores are those of one index of both files."""
    _write(here / "a.jsonl", [{"id": f"t{i}", "text": text} for i, text in enumerate(TRAIN[:6])])
    _write(here / "b.jsonl", [{"id": f"t{i}", "text": text} for i, text in enumerate(TRAIN[6:], start=6)])
    for name in "ab":
        assert run(INDEX, train=f"{name}.jsonl", index=f"idx_{name}", checkpoints="run", batch_size="3") == 0
    capsys.readouterr()
    assert main(["merge", "idx_a", "idx_b", "--index", "idx"]) == 0
    assert "examples      12" in capsys.readouterr().out
    assert run(SCORE) == 0
    _same_scores(_lines("out/scores.jsonl"), _python().step_influence(_rows(QUERIES), k=4))
    assert run(INDEX, train="b.jsonl", index="idx_c", dim="8") == 0
    assert main(["merge", "idx_a", "idx_c", "--index", "idx_d"]) == 1
    assert "idx_c was made with --dim 8, not --dim 16, as idx_a was" in capsys.readouterr().err
    _write(here / "b.jsonl", [{"text": "a b c"}])
    assert run(SCORE, out="again") == 1
    assert "are not the files that were indexed" in capsys.readouterr().err


def test_an_index_cannot_grant_trust(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, trust_remote_code: bool, **keywords: Any) -> Any:
        given.append(trust_remote_code)
        return real(*arguments, **keywords)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert run(f"{INDEX} --trust-remote-code") == 0
    assert run(INDEX) == 0
    assert run(f"{INDEX} --trust-remote-code") == 0
    assert run(SCORE) == 0
    assert run(f"{SCORE} --overwrite --trust-remote-code") == 0
    assert given == [True, False, True, False, True]


def test_an_index_of_other_settings_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    assert run(INDEX, dim="32", max_length="5") == 1
    error = (
        "captum-sdi: error: idx holds an index made with no --max-length, not --max-length 5; --dim 16, not --dim 32."
    )
    assert capsys.readouterr().err.startswith(error)
    assert run(INDEX, batch_size="3") == 0  # changes no number
    text = Path("idx/command.json").read_text()
    Path("idx/command.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    assert run(SCORE) == 1
    assert "idx/command.json is damaged, or of another version of captum_sdi: " in capsys.readouterr().err
    Path("idx/command.json").unlink()
    assert run(SCORE) == 1
    assert "idx does not say how it was built: there is no command.json in it." in capsys.readouterr().err


# --- files of examples ---


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": "a"', "no JSON, Expecting ',' delimiter at column 13"),
        ("[1, 2]", 'a line must be a JSON object such as {"text": "..."}, this is [1, 2]'),
        (
            '{"txt": "a"}',
            'a line needs "text", a string, or "input_ids", a list of token ids; its fields are [\'txt\']',
        ),
        ('{"text": 7}', 'a line needs "text", a string, or "input_ids", a list of token ids; "text" is 7'),
        ('{"text": ""}', '"text" is "", which has no token: leave the line out'),
        (
            '{"text": "a", "labels": [0]}',
            '"labels" are one per token: give "input_ids" with them instead of "text" alone',
        ),
        ('{"input_ids": [1, 2.5]}', '"input_ids" must be a list of integers, one per token; it is [1, 2.5]'),
        ('{"input_ids": [true]}', '"input_ids" must be a list of integers, one per token; it is [true]'),
        ('{"input_ids": []}', '"input_ids" is empty: leave the line out'),
        ('{"input_ids": [1], "labels": [1, 2]}', "there are {'input_ids': 1, 'labels': 2}"),
        ('{"input_ids": [1], "labels": null}', '"labels" must be a list of integers, one per token; it is null'),
        (
            '{"input_ids": [11]}',
            '"input_ids" holds 11, but the model knows the token ids 0 to 10: the file seems to be another',
        ),
        ('{"input_ids": [-1]}', '"input_ids" holds -1, but the model knows the token ids 0 to 10.'),
        ('{"input_ids": [1], "labels": [12]}', '"labels" holds 12, but the model knows the token ids 0 to 10'),
        ('{"input_ids": [1], "attention_mask": [2]}', '"attention_mask" must be 0 or 1 per token; it is [2]'),
        ('{"input_ids": [1], "attention_mask": [1]}', 'some lines have an "attention_mask" and others do not'),
        ("\udcff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_line_is_named(line: str, error: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    with open("train.jsonl", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"\n{line}\n")
    assert run(INDEX) == 1
    said = capsys.readouterr().err
    assert said.startswith("captum-sdi: error: train.jsonl, line 14: "), said
    assert error in said
    assert said.count("\n") == 1
    assert not Path("idx").exists()


def test_text_needs_a_tokenizer(here: Path, capsys: pytest.CaptureFixture) -> None:
    for file in Path("run/checkpoint-10").glob("tokenizer*"):
        file.unlink()
    assert run(INDEX) == 1
    assert (
        'line 1: there is "text", but no tokenizer beside the model: name one with --tokenizer'
        in capsys.readouterr().err
    )
    assert run(INDEX, tokenizer="run/checkpoint-5") == 0


@pytest.mark.filterwarnings("ignore:train_dataset. example")
def test_what_is_cut_or_predicts_nothing_is_counted(here: Path, capsys: pytest.CaptureFixture) -> None:
    _write(here / "train.jsonl", [{"text": text} for text in ("a b c d", "a b c", "a", "a " * 20)])
    line = INDEX.replace(" --quiet", "")
    assert run(line, max_length="3") == 0
    said = capsys.readouterr().err
    assert "train.jsonl: 4 examples, 10 tokens; 2 cut to 3 tokens (--max-length); 1 of a single token, in which" in said
    assert run(line, index="idx2") == 0
    assert "4 examples, 20 tokens; 1 cut to 12 tokens (--max-length)" in capsys.readouterr().err  # n_positions
    Path("train.jsonl").write_text("\n\n")
    assert run(line, index="idx3") == 1
    assert "error: train.jsonl holds no example: every line is blank." in capsys.readouterr().err


def test_special_tokens_are_the_tokenizers_business() -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A i", special_tokens=[("i", 8)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert Encoder(VOCAB, fast)({"text": "a b c"})[0] == {"input_ids": [0, 1, 2, 8], "labels": [0, 1, 2, 8]}
    assert Encoder(VOCAB, fast, max_length=3)({"text": "a b c"}) == ({"input_ids": [0, 1, 8], "labels": [0, 1, 8]}, 4)
    assert Encoder(VOCAB, fast, special_tokens=False)({"text": "a b"})[0]["input_ids"] == [0, 1]
    given = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert Encoder(VOCAB, fast, max_length=2)(given) == ({"input_ids": [1, 2], "labels": [-100, 2]}, 3)


# --- results ---


def test_pictures_are_drawn_and_drawn_again(here: Path, capsys: pytest.CaptureFixture) -> None:
    _write(here / "queries.jsonl", [*_lines("queries.jsonl")[:2], {"text": "a\u2028b\x1b", "id": "\x85"}])
    assert run(INDEX) == 0
    assert run(SCORE.replace("--pictures 0", "--pictures 2").replace(" --quiet", "")) == 0
    pictures = {f"{name}-{q}.png" for name in ("trajectories", "heatmap") for q in (0, 1)} | {
        "totals.png",
        "step-share.png",
    }
    scores = {"run.json", "scores.jsonl", "scores.csv", "scores.npz", "scores.safetensors"}
    assert set(os.listdir("out")) == pictures | scores
    assert all(Path("out", name).stat().st_size > 10_000 for name in pictures)
    table = capsys.readouterr().out
    assert f"query 0: {QUERIES[0]}" in table
    assert "query 2: a b \n" in table  # no line break, no escape sequence
    best = _lines("out/scores.jsonl")[0]["proponents"][0]
    assert f"#{best['index']}: {TRAIN[best['index']]}" in table
    assert max(map(len, table.splitlines()[:-1])) <= 80
    assert run("plot out --query 2 -k 1 --out again --format svg --quiet") == 0
    assert set(os.listdir("again")) == {"trajectories-2.svg", "heatmap-2.svg", "totals.svg", "step-share.svg"}
    assert run("plot out --query 2 -k 1 --out wide --width 6.8 --quiet") == 0
    assert plt.imread("wide/heatmap-2.png").shape[1] == 1360
    with pytest.raises(SystemExit):
        run("plot out --width 0.2")
    assert "'0.2' is no width from 1 to 100 inches" in capsys.readouterr().err
    assert run("plot out --query 3") == 1
    assert capsys.readouterr().err == "captum-sdi: error: --query 3: out holds the queries 0 to 2.\n"
    assert run(f"{SCORE} --opponents") == 1
    assert capsys.readouterr().err.startswith("captum-sdi: error: out holds the results of an earlier run")
    assert run(f"{SCORE} --overwrite") == 0
    assert set(os.listdir("out")) == scores
    shutil.copy("out/scores.jsonl", "again")
    assert run("plot again") == 1
    assert "again holds no results of captum-sdi score: there is no scores.safetensors in it" in capsys.readouterr().err


def test_show_says_what_is_in_an_index(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    assert run("show idx") == 0
    assert capsys.readouterr().out == f"{SketchIndex.open('idx')}\n"


# --- what a shell user expects ---


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            f"{INDEX} --model run",
            r"no config.json in it. It holds checkpoints: --model \S+checkpoint-10 --checkpoints \S+run\.",
        ),
        (f"{INDEX} --model ./no", r"There is no folder ./no; say with --model where the model is\."),
        (f"{INDEX} --model no", r"--model no is no folder, and the Hub does not give it: "),
        (f"{INDEX} --train no.jsonl", r"no.jsonl: No such file or directory"),
        (f"{INDEX} --checkpoints no", r"There is no checkpoint at no; say with --checkpoints where it is\."),
        (f"{INDEX} --layers core.9", r"--layers names 'core.9'"),
        (f"{INDEX} --device nowhere", r"--device nowhere cannot be used: Expected one of cpu"),
        (f"{INDEX} --index run", r"run.* is no index, and holds other things"),
        (f"{INDEX} --loop-layers 0 1 2", r"has n_loops of its own"),
        (SCORE, r"There is no index at idx; captum-sdi index writes one\."),
        (f"{SCORE} --index run --out train.jsonl", r"--out train.jsonl is a file; name a folder\."),
        ("show run", r"There is no index at run: no manifest.json in it"),
        ("plot run", r"run holds no results of captum-sdi score: there is no scores.jsonl in it\."),
    ],
)
def test_an_error_is_one_line(line: str, error: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(Path().rglob("*"))
    assert run(line) == 1
    out, said = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"captum-sdi: error: .*{error}.*\n", said), said
    assert sorted(Path().rglob("*")) == before


def test_a_step_that_no_query_runs(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(INDEX) == 0
    assert run(f"{SCORE} --rank-by 4") == 1
    assert capsys.readouterr().err == "captum-sdi: error: --rank-by 4: no query runs that many loop steps.\n"


def test_debug_shows_where(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("show run --debug") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("captum-sdi: error: ")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("run/checkpoint-5/trainer_state.json").unlink()
    assert run(INDEX, checkpoints="run/checkpoint-5") == 0
    said = capsys.readouterr().err
    assert re.fullmatch(r"captum-sdi: warning: A checkpoint in \S+ holds no learning rate: 1.0 is used.*\n", said), said


@pytest.mark.parametrize("command", ["", "index", "score", "plot", "view", "show", "demo"])
def test_help_explains_every_option(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    # An option's explanation begins beside it, or, where that is too long, on the next line.
    bare = re.findall(r"^  (-\S.*)\n(?! {10,}\S)", said, re.MULTILINE)
    assert [option for option in bare if not re.search(r"\S  +\S", option)] == []
    assert "None" not in said
    assert "True" not in said


def test_usage(capsys: pytest.CaptureFixture) -> None:
    for line, error in (
        ("", "required: COMMAND"),
        ("index --model m", "required: --train, --index"),
        (
            "index --model m --train t --index i --batch-size 0",
            "argument --batch-size: '0' is no whole number of at least 1",
        ),
        ("score --index i --query q -k x", "argument -k: 'x' is no whole number of at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(line.split())
        assert error in capsys.readouterr().err


def test_it_runs_as_a_program(here: Path) -> None:
    arguments = [sys.executable, "-m", "captum_sdi", "show", "nothing"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    error = "captum-sdi: error: There is no index at nothing; captum-sdi index writes one.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)

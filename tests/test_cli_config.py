"""A run can be repeated from the run.json beside its results, and no such file says what only its reader may."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from shell_project import INDEX, SCORE, make_project, run

from captum_sdi.cli.config import HEADER, INSTEAD_OF, SAID_ANEW, actions_of, with_config, write_run
from captum_sdi.cli.parser import build_parser


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an index and scores."""
    folder = tmp_path_factory.mktemp("config")
    make_project(folder, f"{SCORE} --both --columns 90")
    return folder


def parsed(words: list[str]) -> Namespace:
    return build_parser("0").parse_args(words)


def test_the_same_scores_come_again_from_anywhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = project / "out" / "run.json"
    assert run(f"score --config {config} --out again --quiet") == 0
    assert (tmp_path / "again" / "scores.jsonl").read_bytes() == (project / "out" / "scores.jsonl").read_bytes()
    assert run(f"score --config={config} --out one --quiet -k 1 --opponents") == 0
    lines = (tmp_path / "one" / "scores.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) & {"proponents", "opponents"} for line in lines] == [{"opponents"}] * 2
    assert run(f"index --config {project / 'idx' / 'run.json'} --index idx --quiet") == 0
    assert run(f"score --config {config} --index idx --out other --quiet") == 0
    assert (tmp_path / "other" / "scores.jsonl").read_bytes() == (project / "out" / "scores.jsonl").read_bytes()


def test_it_says_what_the_scores_were_made_with(project: Path) -> None:
    said = json.loads((project / "out" / "run.json").read_text())
    assert {"python", "torch", "transformers", "captum", "numpy"} <= set(said["versions"])
    assert {"revision", "library_revision"} <= set(said)
    assert said["options"]["index"] == str(project / "idx")
    assert said["options"]["k"] == 2


TYPED = {
    "index": "index --model m --train a.jsonl b.jsonl --index i --dim 7 --no-special-tokens --loop-layers 1 3 2 "
    "--damping 0.5 --layers all --pool --index-dtype float16 --batch-size 3 --split s --text-column t",
    "score": "score --index i --prompt -x=1 --completion --both -k 3 --rank-by 2 --rerank 9 --preconditioner hessian "
    "--preconditioner-damping 0.25 --normalize both --html --columns 80 --pictures 0 --width 5.5 --checkpoints c d",
}


@pytest.mark.parametrize("command", TYPED)
def test_every_option_comes_back_as_it_was_typed(command: str, tmp_path: Path) -> None:
    words = TYPED[command].replace("--prompt -x=1 --completion", "--prompt=-x --completion=--pool").split()
    options = parsed(words)
    write_run(options, tmp_path)
    replayed = parsed(with_config([command, "--config", str(tmp_path / "run.json")]))
    assert {**vars(replayed), "config": None} == vars(options)
    assert set(vars(options)) - SAID_ANEW == set(json.loads((tmp_path / "run.json").read_text())["options"])


def test_what_is_typed_overrules_and_replaces(tmp_path: Path) -> None:
    write_run(parsed(["score", "--index", "i", "--prompt", "p", "--completion", "c", "-k", "3", "--both"]), tmp_path)
    config = ["--config", str(tmp_path / "run.json")]
    options = parsed(with_config(["score", *config, "--query", "q.jsonl", "-k5", "--opponents"]))
    assert (options.query, options.prompt, options.completion) == ([Path("q.jsonl")], None, None)
    assert (options.k, options.opponents, options.both) == (5, True, False)
    assert set(INSTEAD_OF) <= set(actions_of("score"))


def hostile(**changes: Any) -> str:
    return json.dumps({**HEADER, "command": "score", "options": {"index": "i", "prompt": "p"}, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("", "is damaged, or no run.json"),
        (hostile(format="other"), "is of another version"),
        (hostile(command="index"), "is of captum-sdi index, not of captum-sdi score"),
        (hostile(options=[]), "options must be an object"),
        (hostile(options={"trust_remote_code": True}), "trust_remote_code, which is said on the command line alone"),
        (hostile(options={"overwrite": True}), "overwrite, which is said"),
        (hostile(options={"__class__": 1}), "no option of this command: __class__"),
        (hostile(options={"query": ["--trust-remote-code"]}), "query must be a list of"),
        (hostile(options={"query": "q"}), "query must be a list of"),
        (hostile(options={"prompt": "a\0b"}), "prompt must be a string or a number"),
        (hostile(options={"k": True}), "k must be a string or a number"),
        (hostile(options={"both": "yes"}), "both must be true or false"),
    ],
)
def test_a_hostile_file_is_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.json").write_text(text)
    assert run(f"score --config {tmp_path}/run.json") == 1
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def test_a_file_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("mine")
    write_run(parsed(INDEX.split()), tmp_path)
    assert (tmp_path / "run.json").read_text() == "mine"

"""How the command line behaves: quick about mistyped names, in the shell's words, short, and interruptible."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from captum_sdi.__main__ import main, one_line_warnings
from captum_sdi.cli import places
from captum_sdi.cli.shell_words import in_shell_words
from captum_sdi.progress import LONGEST, Progress


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable says that the Hub is not to be asked, and nothing was ever downloaded."""
    for name in (
        *places.OFFLINE,
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


INDEX = "index --train train.jsonl --index idx --model"


def test_a_mistyped_name_is_said_without_waiting_for_anything(
    online: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[Any] = []

    def refuse(address: Any, timeout: float) -> Any:
        asked.append((*address, timeout))
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert main([*INDEX.split(), "no/such-model"]) == 1
    assert capsys.readouterr().err == (
        "captum-sdi: error: --model no/such-model is no folder, and the Hub does not give it: huggingface.co cannot be "
        "reached from here. Is the name mistyped?\n"
    )
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert main([*INDEX.split(), "no/such-model"]) == 1
    assert asked == [("huggingface.co", 443, places.PATIENCE), ("proxy.invalid", 3128, places.PATIENCE)]


def test_a_name_that_cannot_be_looked_up_in_time(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def wait(address: Any, timeout: float) -> Any:
        end.wait(20)
        raise OSError("too late")

    monkeypatch.setattr(places, "PATIENCE", 0.01)
    monkeypatch.setattr(socket, "create_connection", wait)
    assert not places.is_reachable("somewhere", 443)
    end.set()


def test_what_was_downloaded_needs_no_network(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and it was never downloaded"):
        places.check_name("--tokenizer", "some/name")
    places.cached_folder("some/name").mkdir(parents=True)
    places.check_name("--tokenizer", "some/name")


def test_the_reason_is_found_before_torch_is_imported() -> None:
    program = (
        "import sys; from captum_sdi.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, *INDEX.split(), "./no"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "1 False False\n"
    assert done.stderr == "captum-sdi: error: There is no folder ./no; say with --model where the model is.\n"


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("index='idx' is a file; pass a folder.", "--index idx is a file; pass a folder."),
        ("choose index_dtype=torch.float16 or pool=True in", "choose --index-dtype float16 or --pool in"),
        ("TensorSketch(dim=...) must be at least 1, got 0.", "--dim must be at least 1, got 0."),
        ("Leave it out with layers=[...].", "Leave it out with --layers."),
        ("k=3 must be an integer from 1 to n = 2.", "-k 3 must be an integer from 1 to n = 2."),
        ("is of another train_dataset: pass", "is of another training set: pass"),
        ("no folder = nothing, a == b", "no folder = nothing, a == b"),
    ],
)
def test_arguments_are_options(python: str, shell: str) -> None:
    assert in_shell_words(python) == shell


def test_a_fault_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from captum_sdi.cli import commands

    def show(options: Any) -> None:
        raise KeyError("wte")

    monkeypatch.setattr(commands, "show", show)
    assert main(["show", "."]) == 1
    said = capsys.readouterr().err
    assert said == "captum-sdi: error: this was not foreseen (KeyError: 'wte'). --debug shows where it happened.\n"


def test_a_bar_leaves_room_for_itself(capsys: pytest.CaptureFixture) -> None:
    with Progress("", is_shown=True).bar("index training batches at /a/very/long/path/to/checkpoint-10", 2) as bar:
        bar.update()
    text = capsys.readouterr().err.split("\r")[-1].split(":")[0]
    assert len(text.strip()) <= LONGEST
    assert text.strip().startswith("index training batches at")


def test_a_warning_of_two_passes_is_said_once(capsys: pytest.CaptureFixture) -> None:
    with one_line_warnings():
        warnings.simplefilter("always")
        for share in ("95%", "95%", "94%"):
            warnings.warn(f"{share}. The result's field checkpoints has every checkpoint's share", stacklevel=1)
    said = "captum-sdi: warning: {}. scores.safetensors has every checkpoint's share\n"
    assert capsys.readouterr().err == said.format("95%") + said.format("94%")

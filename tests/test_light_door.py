"""The package opens without what takes seconds to import; a public name brings it along when it is looked up."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import pydoc
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import captum_sdi
from captum_sdi import StepInfluence

ROOT = Path(__file__).parents[1]
HEAVY = {"captum", "matplotlib", "numpy", "torch", "transformers"}

REPORT = "print(json.dumps(sorted(set(sys.modules))))"


def fresh(program: str) -> tuple[int, list[str], str]:
    """What a new interpreter returns, prints and complains about."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--help", 0, "usage: captum-sdi"),
        ("--version", 0, "captum-sdi " + version("captum-sdi")),
        ("score --help", 0, "usage: captum-sdi score"),
        ("score --no-such-option", 2, "the following arguments are required: --index"),
        ("show index --no-such-option", 2, "unrecognized arguments: --no-such-option"),
        ("index --model m", 2, "the following arguments are required: --train, --index"),
        ("no-such-command", 2, "invalid choice: 'no-such-command'"),
    ],
)
def test_help_and_wrong_usage_wait_for_nothing_heavy(line: str, code: int, said: str) -> None:
    program = f"""
import atexit, json, sys
from captum_sdi.__main__ import main
atexit.register(lambda: {REPORT})
sys.exit(main({line.split()!r}))
"""
    returned, printed, complaint = fresh(program)
    assert returned == code, complaint
    assert said in "\n".join([*printed, complaint])
    assert HEAVY.isdisjoint(json.loads(printed[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    returned, printed, complaint = fresh(
        f"import json, sys, captum_sdi\ncaptum_sdi.__version__, dir(captum_sdi)\n{REPORT}"
    )
    assert (returned, complaint) == (0, "")
    assert HEAVY.isdisjoint(json.loads(printed[-1]))


def test_a_fresh_interpreter_finds_every_public_name() -> None:
    program = """
import captum_sdi.models
from transformers import AutoConfig
print(AutoConfig.for_model("looped_gpt").model_type)  # registered with the subpackage, see README.md
from captum_sdi import *
import captum_sdi
print(set(captum_sdi.__all__) <= set(globals()), callable(estimate), plotting is captum_sdi.plotting)
"""
    assert fresh(program)[:2] == (0, ["looped_gpt", "True True True"])


def _public_names() -> dict[str, str]:
    """By name: its module, as type checkers and editors read it."""
    tree = ast.parse(Path(captum_sdi.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]


def test_type_checkers_see_the_names_that_the_interpreter_finds() -> None:
    names = _public_names()
    assert sorted(names) == captum_sdi.__all__
    lazy = {**dict.fromkeys(captum_sdi._SUBPACKAGES, "captum_sdi"), **captum_sdi._MODULE_OF}
    assert names == lazy


def test_a_name_is_the_one_of_its_module() -> None:
    for name, module in _public_names().items():
        __import__(module)
        assert getattr(captum_sdi, name) is getattr(sys.modules[module], name), name
    assert captum_sdi.__version__ == version("captum-sdi")
    assert {*captum_sdi.__all__, "__version__"} <= set(dir(captum_sdi))
    assert dir(captum_sdi) == sorted(set(dir(captum_sdi)))


def test_an_unknown_name_is_the_usual_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'captum_sdi' has no attribute 'SDIInfluenze'$"):
        captum_sdi.SDIInfluenze  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SDIInfluenze' from 'captum_sdi'"):
        from captum_sdi import SDIInfluenze  # noqa: F401


def test_help_shows_the_package_and_its_names() -> None:
    text = pydoc.render_doc(captum_sdi, renderer=pydoc.plaintext)
    for words in (
        "which training examples shaped this answer",
        "class SDIInfluence(",
        "find_loop(",
        captum_sdi.__version__,
    ):
        assert words in text


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))])
def test_a_result_is_copied_and_pickled(duplicate: Callable[[StepInfluence], StepInfluence]) -> None:
    steps = torch.tensor([[[0.5, 0.25]]])
    zero = torch.zeros(1, 1)
    result = StepInfluence(None, steps.sum(-1), steps, zero, zero, torch.tensor([2]), zero, torch.zeros_like(steps))
    other = duplicate(result)
    assert type(other) is captum_sdi.StepInfluence
    assert torch.equal(other.trajectories, steps)

"""Models that accelerate offloaded: the scores of the same model without hooks, and the model as it was."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from cases import CASES, rows
from index_faults import ended, forked
from reference import spread
from torch import Tensor, nn

from captum_sdi import SDIInfluence, StepInfluence, TensorSketch, offload
from captum_sdi.unrolled import UnrolledInfluence

TRAIN, TEST = rows(6, seed=1), rows(3, seed=2)
FIELDS = ("influence_scores", "trajectories", "prelude", "coda", "score_errors", "trajectory_errors")
Place = Callable[[nn.Module, Path], nn.Module]


def to_the_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def with_buffers(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def whole_blocks(model: nn.Module, folder: Path) -> nn.Module:
    """Hooks that bring all weights of a block at once."""
    names = [type(module).__name__ for module in model.core.modules() if type(module).__name__.endswith("Block")]
    return cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=names)


def loop_to_the_disk(model: nn.Module, folder: Path) -> nn.Module:
    parts = [name for name, _ in model.named_children()]
    device_map = {name: "disk" if name == "core" else "cpu" for name in parts}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


PLACES = [to_the_cpu, with_buffers, whole_blocks, loop_to_the_disk]


def influence(model: nn.Module, **settings: Any) -> SDIInfluence:
    return SDIInfluence(model, TRAIN, batch_size=3, sketch=TensorSketch(64), **settings)


def assert_same(ours: StepInfluence, theirs: StepInfluence) -> None:
    for field in FIELDS:
        difference = (getattr(ours, field) - getattr(theirs, field)).abs().max()
        assert difference <= 1e-12 * getattr(theirs, field).abs().max()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A call computes with copies of its weights, as on a GPU, where the weights themselves cannot be used."""
    copied: list[Tensor] = []

    def copied_to(weight: Tensor, device: Any) -> Tensor:
        copied.append(weight)
        return weight.clone()

    monkeypatch.setattr(offload, "copied_to", copied_to)
    return copied


@pytest.fixture(scope="module")
def expected() -> dict[bool, StepInfluence]:
    """By activation checkpointing, without hooks."""
    plain = {}
    for checkpointing in (False, True):
        sdi = influence(CASES[0].model(), layers=None, activation_checkpointing=checkpointing)
        plain[checkpointing] = sdi.step_influence(TEST)
    return plain


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_offloaded_model_gives_the_same(
    tmp_path: Path, place: Place, expected: dict[bool, StepInfluence], copies: list[Tensor]
) -> None:
    """With the weights kept for the backward pass, and with calls that are run again in it; then it is as it was."""
    model = place(CASES[0].model(), tmp_path)
    held = [(module, dict(module._parameters), dict(module._buffers), module.forward) for module in model.modules()]
    before = model(input_ids=TEST[0]["input_ids"].unsqueeze(0)).logits
    parameters = list(model.parameters())
    assert any(parameter.is_meta for parameter in parameters)
    for checkpointing, theirs in expected.items():
        sdi = influence(model, layers=None, activation_checkpointing=checkpointing)
        assert_same(sdi.step_influence(TEST), theirs)
    assert copies
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    for module, _, buffers, forward in held:
        assert module.forward == forward
        assert module._buffers.keys() == buffers.keys()
    assert torch.equal(model(input_ids=TEST[0]["input_ids"].unsqueeze(0)).logits, before)


def test_tied_weights_are_one(tmp_path: Path, copies: list[Tensor]) -> None:
    theirs = influence(CASES[2].model(), layers=None).step_influence(TEST)
    model = to_the_cpu(CASES[2].model(), tmp_path)
    model(input_ids=TEST[0]["input_ids"].unsqueeze(0))  # after a call accelerate holds two Parameters in their place
    assert model.wte.weight is not model.lm_head.weight
    assert_same(influence(model, layers=None).step_influence(TEST), theirs)
    device_map = {name: "cpu" if name == "ln_f" else "disk" for name, _ in model.named_children()}
    on_disk = dispatch_model(CASES[2].model(), device_map, main_device="cpu", offload_dir=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"'wte.weight' and 'lm_head.weight' are equal and offloaded to the disk.*a device_map with 'cpu'",
    ):
        influence(on_disk).step_influence(TEST)
    assert all(parameter.is_meta for parameter in (on_disk.wte.weight, on_disk.lm_head.weight))


class Mixed(nn.Module):
    """Attention, whose weights are used outside their layers' calls, looped; and a weight of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.core = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.wte(input_ids)
        is_padding = None if attention_mask is None else attention_mask == 0
        for _ in range(3):
            hidden = self.core(hidden, src_key_padding_mask=is_padding) * self.scale
        return self.head(hidden)


def test_weights_used_beside_their_layers(tmp_path: Path, copies: list[Tensor]) -> None:
    """The gradient goes through the copy that stood in the weight's place."""

    def mixed() -> nn.Module:
        torch.manual_seed(0)
        return spread(Mixed()).double()

    settings = {"layers": None, "loop": ["core"]}
    theirs = influence(mixed(), **settings).step_influence(TEST)
    assert_same(influence(to_the_cpu(mixed(), tmp_path), **settings).step_influence(TEST), theirs)


def test_checkpoints_and_an_index(tmp_path: Path) -> None:
    """Weights are loaded into what is offloaded, and taken out again; an index knows them by their values."""

    def load(model: nn.Module, weights: dict[str, Tensor]) -> float:
        model.load_state_dict(weights)
        return 0.5

    torch.manual_seed(0)
    states = [dict(CASES[0].model().state_dict()), dict(CASES[0].make().double().state_dict())]
    settings = {"checkpoints": states, "checkpoints_load_func": load, "index": tmp_path / "index"}
    plain = CASES[0].model()
    theirs = influence(plain, **settings).step_influence(TEST, k=4)
    model = to_the_cpu(CASES[0].model(), tmp_path)
    before = model(input_ids=TEST[0]["input_ids"].unsqueeze(0)).logits
    ours = influence(model, **settings).step_influence(TEST, k=4)
    assert torch.equal(ours.indices, theirs.indices)
    assert_same(ours, theirs)
    assert torch.equal(model(input_ids=TEST[0]["input_ids"].unsqueeze(0)).logits, before)


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    def fails(output: Any, labels: Tensor) -> Tensor:
        raise RuntimeError("the user's own")

    fails.reduction = "none"
    model = to_the_cpu(CASES[0].model(), tmp_path)
    parameters = list(map(id, model.parameters()))
    with pytest.raises(RuntimeError, match="the user's own"):
        influence(model, loss_fn=fails).step_influence(TEST)
    assert list(map(id, model.parameters())) == parameters
    assert model(input_ids=TEST[0]["input_ids"].unsqueeze(0)).logits.isfinite().all()


def test_the_derivative_through_training_wants_one_place(tmp_path: Path) -> None:
    model = to_the_cpu(CASES[0].model(), tmp_path)
    with pytest.raises(ValueError, match=r"weights are in several places: 'coda\..*without device_map"):
        UnrolledInfluence(model, TRAIN, run=None, start={})


def test_a_model_sharded_by_fsdp2_is_refused(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def sharded() -> None:
        from torch.distributed import init_process_group
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        init_process_group("gloo", rank=0, world_size=1)
        model = fully_shard(CASES[0].model(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"'.*' is a DTensor.*FSDP2.*Load it whole.*get_model_state_dict"):
            influence(model)

    assert ended(forked(sharded)) == 0

"""What every test starts from: no network, no screen, one thread, one seed."""

import os

# Before torch, transformers and matplotlib are imported: each reads its own once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # processes that a test starts inherit it

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same sums in the same order, whether a test runs alone or beside others.
torch.set_num_threads(1)

# Compiling or a first call may take seconds; the same examples every time: a failure comes back.
settings.register_profile("captum_sdi", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("captum_sdi")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="seed of every test: a statement about random numbers should hold for any",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What `--seed` says: for tests that draw from generators of their own."""
    return int(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    """Every test starts from the same global random state, whichever ran before it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)

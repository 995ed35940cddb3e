"""Small random bases on disk, numbers of threads, and compiled programs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.numerics.lab import make_base
from tinsmith.model import BaseModel


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Qwen3: grouped heads, tied head, odd widths. Llama: one key head, untied head, biases."""
    return make_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Many layers."""
    return make_base("deep", tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Two layers, a context of 128k tokens."""
    return make_base("long", tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Wide and shallow: matrix products large enough to be split over threads."""
    return make_base("wide", tmp_path_factory.mktemp("wide"))


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Any:
    """Of the `PROGRAM` of the tests' module."""
    found = request.module.PROGRAM.kernel
    if found is None:
        pytest.skip("needs a C compiler and AVX2")
    return found


@pytest.fixture
def not_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """The `PROGRAM`, before and after: as in a process that has just started."""
    held = vars(request.module.PROGRAM)
    held.pop("kernel", None)
    yield
    held.pop("kernel", None)

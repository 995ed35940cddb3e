"""Which device and dtype the settings lead to."""

import pytest
import torch

from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.model.device import choose_device, choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=[0, 2], ids=["no_gpu", "two_gpus"])
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    number: int = request.param
    return number


def test_auto_takes_a_gpu_where_there_is_one(num_gpus: int):
    assert choose_device("auto") == (GPU if num_gpus else CPU)
    assert choose_device("cpu") == CPU


def test_a_gpu_that_is_not_there_is_refused(num_gpus: int):
    for name in ("cuda", "cuda:0", "cuda:1", "cuda:7"):
        index = int(name.partition(":")[2] or 0)
        if index < num_gpus:
            assert choose_device(name) == torch.device("cuda", index)
        else:
            with pytest.raises(ConfigError, match=rf"--device {name}: torch .* sees {num_gpus} GPU"):
                choose_device(name)


def test_dtypes():
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", GPU) == torch.bfloat16
    assert choose_dtype("float32", GPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    "settings", [{"device": "tpu"}, {"device": "cuda:x"}, {"sampler_device": "gpu"}, {"dtype": "f16"}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, str]):
    with pytest.raises(ConfigError, match=r"is one of"):
        Settings.load({}, **settings)

"""Where a base lives and in which dtype it computes, as the settings say."""

from __future__ import annotations

import torch

from tinsmith.errors import ConfigError
from tinsmith.machine import host_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        ConfigError: torch sees no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0) if name != "auto" else 0
    if index >= num_gpus:
        seen = f"torch {torch.__version__} sees {num_gpus} GPU(s)"
        raise ConfigError(f"--device {name}: {seen}; `nvidia-smi` lists those of this machine, see docs/how-to/gpu.md")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on the CPU, whose bfloat16 products are several times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can still be taken, with what torch keeps of freed memory there; on the CPU what this
    process can take. None where it isn't known."""
    if device.type != "cuda":
        return host_memory.available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

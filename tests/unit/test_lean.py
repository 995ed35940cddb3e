from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKS = """
import sys
import numpy as np
from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import *

engine = TorchEngine(describe(parse("tinsmith/tiny")), Settings(threads=1))
run = RunId("s:train:0")
engine.create_run(RunSpec(run, "tinsmith/tiny", rank=4))
tokens = np.arange(9, dtype=np.int32)
datum = Datum(tokens, {"target_tokens": tokens.astype(np.int64)})
training = engine.start_pass([TrainItem(OpId("f"), run, 1, (datum,), LossSpec("cross_entropy"), backward=True)])
while not training.is_computed:
    training.advance(engine.pass_max_tokens)
training.commit()
engine.optim_step([OptimItem(OpId("o"), run, AdamParams(learning_rate=1e-3))])
engine.publish_run(run, "k")
engine.submit_sample(SampleItem(OpId("s"), "k", tokens, SamplingParams(max_tokens=3), 1, 0))
while engine.num_samples:
    engine.step_samples()
heavy = [name for name in ("torch._dynamo", "torch.distributed.tensor", "torchao") if name in sys.modules]
assert not heavy, heavy
"""
STILL_THERE = """
import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).sum() == 2
import torch._dynamo.utils, torch.distributed.tensor
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
"""
ASK = {
    "asks_for_a_part": "import torch; limit = torch._dynamo.config.recompile_limit",
    "asks_for_a_module": "import torch._dynamo.utils",
}
ASKS = """
import importlib, sys
import torch
from tinsmith.model import lean

name, decorator = sys.argv[1], torch.compiler.disable
assert "torch._dynamo" not in sys.modules
lean.import_lightly(lambda: importlib.import_module(name), name)
importlib.import_module(name)
assert torch.compiler.disable is decorator
assert torch._dynamo.__file__
"""

WITHIN = """
import sys
from tinsmith.model import lean
import torch

with lean.without_compiler():
    import torch._dynamo.utils as part
    from torch._dynamo import config
assert part is torch._dynamo.utils is sys.modules["torch._dynamo.utils"] and config is torch._dynamo.config
assert part.__spec__.origin == part.__file__
assert not any(isinstance(finder, lean._Parts) for finder in sys.meta_path)
"""


def run(script: str, *args: str, cwd: Path | None = None) -> None:
    subprocess.run([sys.executable, "-c", script, *args], check=True, timeout=120, cwd=cwd)


def test_a_worker_trains_and_samples_without_the_compiler_which_is_there_for_who_wants_it() -> None:
    run(WORKS + STILL_THERE)


def test_a_part_of_the_compiler_is_there_while_that_stands_empty() -> None:
    run(WITHIN)


@pytest.mark.parametrize("name", ASK)
def test_who_asks_for_more_of_the_compiler_while_it_stands_empty_gets_it(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(ASK[name])
    run(ASKS, name, cwd=tmp_path)

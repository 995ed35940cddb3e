"""A server whose base is kept in four bits: it starts, trains and samples, and says what its matrices take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tinker

from tests.service import running


def test_a_base_in_four_bits_is_trained_and_sampled(tmp_path: Path, monkeypatch) -> None:
    with running(tmp_path / "data", "--base-weights", "int4", "--device", "cpu", "--threads", "1") as server:
        monkeypatch.setenv("TINKER_BASE_URL", server.url)
        monkeypatch.setenv("TINKER_API_KEY", server.key)
        service = tinker.ServiceClient()
        run = service.create_lora_training_client("tinsmith/tiny", rank=8).result()
        tokens = list(range(10, 40))
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 29},
        )
        losses = []
        for _ in range(4):
            losses.append(run.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
            run.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        assert losses[-1] < losses[0]
        sampler = run.save_weights_and_get_sampling_client().result()
        found = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
        ours = run.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
        np.testing.assert_allclose(found[1:], ours, rtol=0, atol=1e-5)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (loaded,) = [line for line in lines if line.get("event") == "base model loaded"]
    assert loaded["weights_mib"]["int4"] > 0

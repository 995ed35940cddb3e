"""A run that goes on on another server, which is killed once it has taken the run in: with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinker import types
from typer.testing import CliRunner

from tests.crash.test_kill import connect, datum, free_port
from tests.service import Service, running
from tinsmith.cli import main as cli

pytestmark = pytest.mark.timeout(400)


def command(service: Service, *args: object) -> Any:
    done = CliRunner().invoke(cli.app, [*map(str, args), "--data-dir", str(service.data_dir)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def steps(run: Any, first: int, num: int) -> list[list[float]]:
    """The log-probabilities before each of so many steps."""
    found = []
    for number in range(first, first + num):
        pending = run.forward_backward([datum(number)], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=0.02)).result()
        found.append(pending.result().loss_fn_outputs[0]["logprobs"].data)
    return found


def test_training_goes_on_elsewhere_as_if_nothing_had_been(
    tmp_path: Path, plain_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved here, exported, imported there; that server dies at once with all its processes. What was acknowledged is
    there when it is back; weights, moments and step are those of the run that stayed."""
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    stays = connect(plain_server).create_lora_training_client("tinsmith/tiny", rank=4, seed=3).result()
    steps(stays, 0, 2)
    path = stays.save_state("half").result().path
    command(plain_server, "export", path, "--format", "state", "--out", tmp_path / "run.tar")
    undisturbed = steps(stays, 2, 3)
    with running(tmp_path / "there", "--port", str(free_port())) as there:
        done = command(there, "import", tmp_path / "run.tar", "--name", "moved")
        there.kill()
        there.restart()
        moved, sampler = (line.partition(": ")[0] for line in done.stdout.splitlines())
        client = connect(there)
        goes_on = client.create_training_client_from_state_with_optimizer(moved).result()
        assert steps(goes_on, 2, 3) == undisturbed
        fresh = client.create_training_client_from_state(moved).result()
        assert steps(fresh, 2, 3) != undisturbed
        prompt = types.ModelInput.from_ints([1, 2, 3])
        sampler_client = client.create_sampling_client(sampler).result()
        sampled = sampler_client.sample(prompt, 1, types.SamplingParams(max_tokens=4)).result()
        assert len(sampled.sequences[0].tokens) == 4

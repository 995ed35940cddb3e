"""What the unmodified SDK, OpenAI's client and curl-like calls send, written down: `python -m tests.fuzz.capture`.

Each request once a kind, as it lies on the wire, keys and addresses replaced. The file is part of the repository, so
that fuzzing begins from the same bodies everywhere; run this again when a release of the SDK sends others.
"""

from __future__ import annotations

import base64
import inspect
import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CAPTURED = Path(__file__).with_name("captured.jsonl")
KEEP = 3  # of one method, path and kind of body
HEADERS = (b"content-type", b"content-encoding", b"accept", b"x-tinker-sampling", b"range")
IDS = re.compile(r"(?<=/)(s[0-9a-f]{24}(:(train|sample):\d+)?|k[0-9a-f]{16}|req-[0-9a-f]{32})(?=/|$)")


@dataclass
class Captured:
    """One request. body: base64."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""

    @property
    def content(self) -> bytes:
        return base64.b64decode(self.body)

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.method, IDS.sub("ID", self.path), self.headers.get("content-type", "")


def read_captured() -> list[Captured]:
    return [Captured(**json.loads(line)) for line in CAPTURED.read_text(encoding="utf-8").splitlines()]


def recording(app: Any, seen: list[Captured]) -> Any:
    """The ASGI app, with every request in `seen`."""

    async def recorder(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        body = bytearray()

        async def listen() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await app(scope, listen, send)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in HEADERS}
        seen.append(
            Captured(
                scope["method"], scope["path"], scope["query_string"].decode(), headers, base64.b64encode(body).decode()
            )
        )

    return recorder


def write(seen: Iterable[Captured]) -> int:
    kept: dict[tuple[str, str, str], list[Captured]] = {}
    for one in seen:
        group = kept.setdefault(one.kind, [])
        if len(group) < KEEP and len(one.content) < 64 << 10 and one.content not in [other.content for other in group]:
            group.append(one)
    lines = [json.dumps(asdict(one)) for group in kept.values() for one in group]
    CAPTURED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    # beside the rest of this file, which fuzzing reads, these are many and slow to load
    import openai
    import pytest
    import tinker

    from tests.contract.raw import Raw
    from tests.contract.routes import belongings, probes
    from tests.contract.standing import standing
    from tests.numerics.custom_losses import cross_entropy, dpo, gspo
    from tinsmith.api import main as server
    from tinsmith.api.express import Express

    seen: list[Captured] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        build = server.build_app
        patch.setattr(server, "build_app", lambda services: keep_state(build(services), seen))
        patch.setattr(Express, "take", lambda self, data: None)
        with standing(Path(root), jwt_auth=True) as (house, url):
            service = tinker.ServiceClient(base_url=url, api_key=house.key)
            trainer = service.create_lora_training_client(base_model="tinsmith/tiny", rank=4).result()
            train(tinker, trainer)
            for loss in (cross_entropy, dpo, gspo):
                ranks = {name: 0 if name == "beta" else 1 for name in inspect.signature(loss).parameters}
                service.create_custom_loss(loss, input_ranks=ranks).result()
            raw = Raw(url, house.key)
            mine = belongings(raw)
            for group in probes(mine, mine).values():
                for probe in group:
                    raw.send(probe.method, probe.path, **probe.options)
            raw.send("POST", "/admin/keys", json={"name": "k", "scope": "read", "expires_s": 60})
            raw.close()
            asking = openai.OpenAI(base_url=f"{url}/oai/api/v1", api_key=house.key)
            asking.chat.completions.create(
                model="tinsmith/tiny", messages=[{"role": "user", "content": "2 + 2?"}], max_tokens=2, stop=["\n"]
            )
    print(f"{write(seen)} requests in {CAPTURED}")


def keep_state(app: Any, seen: list[Captured]) -> Any:
    """The recorder in the app's place, with the state that the server looks for."""
    wrapped = recording(app, seen)
    wrapped.state = app.state
    return wrapped


def train(tinker: Any, trainer: Any) -> None:
    """Every kind of training request that the SDK makes."""
    import numpy as np

    prompt = tinker.ModelInput.from_ints([1, 2, 3])
    inputs = {
        "target_tokens": np.array([2, 3, 4]),
        "weights": np.array([0.0, 1.0, 0.5], np.float32),
        "logprobs": np.array([-1.0, -2.0, -0.5], np.float32),
        "advantages": np.array([1.0, -1.0, 0.5], np.float32),
    }
    losses = {
        "cross_entropy": ("target_tokens", "weights"),
        "importance_sampling": ("target_tokens", "logprobs", "advantages"),
        "ppo": ("target_tokens", "logprobs", "advantages"),
    }
    for loss, names in losses.items():
        datum = tinker.Datum(model_input=prompt, loss_fn_inputs={name: inputs[name] for name in names})
        trainer.forward_backward([datum] * 2, loss).result()
    trainer.forward([datum], "ppo").result()
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    path = trainer.save_state("one").result().path
    trainer.load_state(path).result()
    sampler = trainer.save_weights_and_get_sampling_client()
    params = tinker.SamplingParams(max_tokens=3, seed=1, stop=["x"], temperature=0.7)
    sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    sampler.compute_logprobs(prompt).result()


if __name__ == "__main__":
    main()

"""How the API process looks at pictures: never on the event loop, each one once, and one tenant's in turn."""

from __future__ import annotations

import base64
import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.contract.conftest import BASE
from tests.paint import VISION, png
from tests.unit.test_wire_images import training_body
from tinsmith.api.services import ServedBase
from tinsmith.wire import images
from tinsmith.wire import wire_pb2 as pb


@pytest.fixture
def lookers(house: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that looked at pictures; the base takes them."""
    served = house.services.bases[BASE]
    house.services.bases[BASE] = ServedBase(replace(served.info, vision=VISION), served.tokenizer_files)
    seen: list[str] = []
    check = images.check_whole

    def checked(*args: Any) -> None:
        seen.append(threading.current_thread().name)
        check(*args)

    monkeypatch.setattr(images, "check_whole", checked)
    return seen


def sample(api: Any, *pictures: bytes) -> dict[str, Any]:
    asked = {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = api.post("/create_sampling_session", asked)["sampling_session_id"]
    chunks = [{"type": "image", "format": "png", "data": base64.b64encode(data).decode()} for data in pictures]
    body = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": chunks},
        "sampling_params": {"max_tokens": 2},
    }
    return dict(api.post("/asample", body))


def test_pictures_are_looked_at_beside_the_event_loop_and_once(api: Any, house: Any, lookers: list[str]) -> None:
    first, second = png(), png(seed=1)
    sample(api, first, second, first)
    assert len(lookers) == 2
    sample(api, second)
    assert len(lookers) == 2
    model_id = api.create(api.session())["model_id"]
    request = pb.ForwardBackwardRequest.FromString(training_body([[1], (png(seed=2), "png", 4)]))
    request.model_id = model_id
    media = {"Content-Type": "application/x-protobuf"}
    answer = api.raw("POST", "/api/v1/forward_backward", content=request.SerializeToString(), headers=media)
    assert answer.status_code == 200
    assert len(lookers) == 3
    assert all(name.startswith("api-digest") for name in lookers)


def test_what_is_wrong_with_a_picture_uses_up_its_number_and_says_so(api: Any, lookers: list[str]) -> None:
    promise = sample(api, png()[:60])
    failed = api.result(promise)
    assert (failed["category"], failed["code"]) == ("user", "invalid_request")
    assert failed["error"].startswith("prompt, picture 0: the picture can't be read")


def test_too_large_a_picture_is_refused_before_it_is_looked_at(api: Any, house: Any, lookers: list[str]) -> None:
    object.__setattr__(house.settings, "max_picture_pixels", 100)
    failed = api.result(sample(api, png()))
    assert failed["code"] == "too_large"
    assert lookers == []

"""Pictures through the real clients, against a real server whose engine makes its numbers up from their bytes."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
import tinker
from tinker import types

from tests.paint import jpeg, png, raw_png
from tests.seeing import END, IMAGE_TOKEN, NAME, START, seeing_base
from tests.service import Service, running
from tinsmith.bases.tokenizer import ChatTokenizer

SIZE = 32  # pixels each way: 4 tokens
NUM_TOKENS = 4
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that pictures may be fetched from."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "a.png").write_bytes(png())
    (folder / "broken.png").write_bytes(png()[:60])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_base(tmp_path_factory.mktemp("base") / "seeing")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, shelf: Path, base: Path) -> Iterator[Service]:
    flags = ("--device", "fake", "--no-deterministic", "--base-model", f"{NAME}={base}")
    with running(
        tmp_path_factory.mktemp("pictures") / "data",
        *flags,
        "--picture-locations",
        str(shelf),
        "--max-pictures",
        "8",
    ) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    yield client
    client.close("success")


def image(data: bytes, kind: Any = "png", expected: int | None = NUM_TOKENS) -> types.ImageChunk:
    return types.ImageChunk(data=data, format=kind, expected_tokens=expected)


def text(*tokens: int) -> types.EncodedTextChunk:
    return types.EncodedTextChunk(tokens=list(tokens))


def seen(*chunks: Any) -> types.ModelInput:
    return types.ModelInput(chunks=[text(1, 2, START), *chunks, text(END, 3, 4)])


def datum(*chunks: Any) -> types.Datum:
    prompt = seen(*chunks)
    targets = np.ones(prompt.length, np.int64)
    weights = np.ones(prompt.length, np.float32)
    return types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": targets, "weights": weights})


def logprobs(run: tinker.TrainingClient, *data: types.Datum) -> list[list[float]]:
    output = run.forward(list(data), "cross_entropy").result()
    return [row["logprobs"].tolist() for row in output.loss_fn_outputs]


def drawn(sampler: tinker.SamplingClient, prompt: types.ModelInput, **asked: Any) -> list[int]:
    params = types.SamplingParams(max_tokens=8, seed=1)
    return list(sampler.sample(prompt, 1, params, **asked).result().sequences[0].tokens)


def test_a_run_trains_on_pictures_between_text(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    data = [datum(image(png())), datum(image(jpeg(), "jpeg"), text(9), image(png(seed=2))), datum()]
    output = run.forward_backward(data, "cross_entropy").result()
    lengths = [len(row["logprobs"].tolist()) for row in output.loss_fn_outputs]
    assert lengths == [6 + NUM_TOKENS, 7 + 2 * NUM_TOKENS, 6]
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()


def test_one_changed_pixel_changes_the_logprobs(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    same, again, other = logprobs(run, datum(image(png())), datum(image(png())), datum(image(png(seed=1))))
    assert same == again
    assert same != other


def test_samples_depend_on_the_picture_alone(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=NAME).result()
    first = drawn(sampler, seen(image(png())))
    assert drawn(sampler, seen(image(png(), expected=None))) == first
    assert drawn(sampler, seen(image(png(seed=1)))) != first
    scores = sampler.compute_logprobs(seen(image(png()))).result()
    assert len(scores) == 6 + NUM_TOKENS


def test_expected_tokens_are_checked(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(NAME, rank=4).result()
    words = "expected_tokens is 5, but tests/seeing makes 4 tokens of 32 x 32 pixels"
    with pytest.raises(tinker.TinkerError, match=words):
        run.forward([datum(image(png(), expected=5))], "cross_entropy").result()
    sampler = client.create_sampling_client(base_model=NAME).result()
    with pytest.raises(tinker.TinkerError, match=words):
        drawn(sampler, seen(image(png(), expected=5)))
    run.forward([datum(image(png()))], "cross_entropy").result()  # the run goes on


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (image(b"GIF89a" + bytes(40)), "neither a PNG nor a JPEG"),
        (image(png()[:60]), "can't be read"),
        (image(jpeg(), "png"), "the bytes are jpeg"),
        (image(raw_png(9000, 9000, b"", depth=1, colours=0), expected=None), "scale it down"),
        (image(jpeg(mode="CMYK"), "jpeg"), "CMYK"),
    ],
)
def test_pictures_that_can_t_be_shown_are_refused(client: tinker.ServiceClient, chunk: Any, words: str) -> None:
    run = client.create_lora_training_client(NAME, rank=4).result()
    prompt = types.ModelInput(chunks=[text(1), chunk])
    targets = {"target_tokens": np.ones(1 + (chunk.expected_tokens or 1), np.int64)}
    with pytest.raises(tinker.TinkerError, match=words):
        run.forward([types.Datum(model_input=prompt, loss_fn_inputs=targets)], "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match=words):
        drawn(client.create_sampling_client(base_model=NAME).result(), prompt)


def test_there_is_a_bound_to_the_pictures_of_a_request(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=NAME).result()
    drawn(sampler, seen(*[image(png())] * 8))
    with pytest.raises(tinker.TinkerError, match="more than 8 pictures"):
        drawn(sampler, seen(*[image(png())] * 9))


def test_targets_have_to_match_the_placeholders(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(NAME, rank=4).result()
    bad = types.Datum(model_input=seen(image(png())), loss_fn_inputs={"target_tokens": np.ones(7, np.int64)})
    with pytest.raises(tinker.TinkerError, match=r"shape \[7\], but the model input has 10 tokens"):
        run.forward([bad], "cross_entropy").result()


def test_pictures_are_fetched_from_allowed_locations_and_kept(
    client: tinker.ServiceClient, service: Service, shelf: Path
) -> None:
    sampler = client.create_sampling_client(base_model=NAME).result()

    def pointer(location: str, expected: int = NUM_TOKENS) -> types.ImageAssetPointerChunk:
        return types.ImageAssetPointerChunk(location=location, format="png", expected_tokens=expected)

    assert drawn(sampler, seen(pointer(f"{shelf}/a.png"))) == drawn(sampler, seen(image(png())))
    with closing(sqlite3.connect(service.data_dir / "tinsmith.db")) as database:
        payloads = [bytes(row[0]) for row in database.execute("select payload from ops where payload is not null")]
    assert not any(b"image_asset_pointer" in payload for payload in payloads)
    for location, words in (
        (f"{shelf}/none.png", "can't be fetched"),
        (f"{shelf}/../a.png", "not fetched from"),
        ("/etc/hostname", "not fetched from"),
        ("https://example.com/a.png", "not fetched from"),
        (f"{shelf}/broken.png", "can't be read"),
    ):
        with pytest.raises(tinker.TinkerError, match=words):
            drawn(sampler, seen(pointer(location)))
    with pytest.raises(tinker.TinkerError, match="makes 4 tokens"):
        drawn(sampler, seen(pointer(f"{shelf}/a.png", 7)))
    with pytest.raises(tinker.TinkerError, match="names more than 8 pictures"):
        drawn(sampler, seen(*[pointer(f"{shelf}/a.png")] * 9))


def test_pictures_of_training_are_fetched_too(client: tinker.ServiceClient, service: Service, shelf: Path) -> None:
    """An image chunk holds the address, as the SDK has no other form of it in training."""
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    pointer = types.ImageAssetPointerChunk(location=f"{shelf}/a.png", format="png", expected_tokens=NUM_TOKENS)
    with pytest.raises(ValueError, match="Unsupported model input chunk type: ImageAssetPointerChunk"):
        run.forward([datum(pointer)], "cross_entropy").result()
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    address = f"file://{shelf}/a.png".encode()
    named, held = logprobs(run, datum(image(address)), datum(image(png())))
    assert named == held
    run.forward_backward([datum(image(address), text(9), image(address))], "cross_entropy").result()
    with closing(sqlite3.connect(service.data_dir / "tinsmith.db")) as database:
        payloads = [bytes(row[0]) for row in database.execute("select payload from ops where payload is not null")]
    assert not any(address in payload for payload in payloads)
    for location, words in (
        (f"file://{shelf}/none.png", "can't be fetched"),
        (f"file://{shelf}/../a.png", "not fetched from"),
        ("file:///etc/hostname", "not fetched from"),
        ("https://example.com/a.png", "not fetched from"),
        (f"file://{shelf}/broken.png", "can't be read"),
    ):
        with pytest.raises(tinker.TinkerError, match=words):
            run.forward([datum(image(location.encode()))], "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="makes 4 tokens"):
        run.forward([datum(image(address, expected=5))], "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="no text"):
        run.forward([datum(image(address + b"\xff"))], "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="more than 8 pictures"):
        run.forward([datum(*[image(address)] * 9)], "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="send an image_asset_pointer"):
        drawn(client.create_sampling_client(base_model=NAME).result(), seen(image(address)))
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()  # the run goes on


def prompt_of(base: Path, *parts: Any) -> types.ModelInput:
    """What the endpoints make of a user's turn, made by hand: texts, and pictures as bytes."""
    content = [{"type": "image"} if isinstance(part, bytes) else {"type": "text", "text": part} for part in parts]
    tokenizer = ChatTokenizer.from_dir(base)
    tokens = tokenizer.encode(tokenizer.render([{"role": "user", "content": content}]))
    chunks: list[Any] = []
    for part in [each for each in parts if isinstance(each, bytes)]:
        at = tokens.index(IMAGE_TOKEN)
        chunks += [text(*tokens[:at]), image(part, "png" if part.startswith(b"\x89PNG") else "jpeg")]
        tokens = tokens[at + 1 :]
    return types.ModelInput(chunks=[*chunks, text(*tokens)])


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def openai_part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def test_openai_s_client_shows_pictures(
    client: tinker.ServiceClient, service: Service, base: Path, shelf: Path
) -> None:
    sampler = client.create_sampling_client(base_model=NAME).result()
    prompt = prompt_of(base, png(), QUESTION, jpeg(seed=3))
    expected = ChatTokenizer.from_dir(base).decode(drawn(sampler, prompt), skip_special_tokens=True)
    with openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key, max_retries=0) as chat:

        def ask(*parts: Any) -> Any:
            message: Any = {"role": "user", "content": list(parts)}
            return chat.chat.completions.create(model=NAME, messages=[message], max_tokens=8, seed=1)

        question = {"type": "text", "text": QUESTION}
        answer = ask(openai_part(url_of(png()), detail="auto"), question, openai_part(url_of(jpeg(seed=3), "jpeg")))
        assert answer.choices[0].message.content == expected
        assert answer.usage.prompt_tokens == prompt.length
        assert ask(openai_part(f"file://{shelf}/a.png"), question).usage.prompt_tokens < prompt.length
        for part, words in (
            (openai_part("https://example.com/a.png"), "not fetched from"),
            (openai_part("data:image/gif;base64,AAAA"), "send image/png or image/jpeg"),
            (openai_part("data:image/png;base64,%%%%"), "must be base64"),
            (openai_part(url_of(png()[:60])), "can't be read"),
            (openai_part(url_of(png()), detail="low"), "detail"),
            (openai_part(url_of(jpeg())), "the bytes are jpeg"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                ask(part, question)
        for injected in ("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"):
            with pytest.raises(openai.BadRequestError, match="stands for a picture"):
                ask(openai_part(url_of(png())), {"type": "text", "text": injected})


def test_anthropic_s_client_shows_pictures(client: tinker.ServiceClient, service: Service, base: Path) -> None:
    prompt = prompt_of(base, QUESTION, png())
    source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}
    blocks: Any = [{"type": "text", "text": QUESTION}, {"type": "image", "source": source}]
    messages: Any = [{"role": "user", "content": blocks}]
    with anthropic.Anthropic(base_url=f"{service.url}/anthropic/api", api_key=service.key, max_retries=0) as chat:
        answer = chat.messages.create(model=NAME, messages=messages, max_tokens=8)
        assert answer.usage.input_tokens == prompt.length
        assert chat.messages.count_tokens(model=NAME, messages=messages).input_tokens == prompt.length
        source["data"] = "AAAA"
        with pytest.raises(anthropic.BadRequestError, match="neither a PNG nor a JPEG"):
            chat.messages.create(model=NAME, messages=messages, max_tokens=8)


def test_a_large_body_is_pictures_and_not_values(service: Service) -> None:
    with httpx.Client(base_url=f"{service.url}/api/v1", headers={"X-API-Key": service.key}, timeout=60) as plain:
        session = plain.post("/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "t"}).json()
        asked = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": NAME}
        sampler = plain.post("/create_sampling_session", json=asked).json()["sampling_session_id"]
        large = png() + bytes(7 << 20)  # 9.8 MB as base64; what follows its end is ignored
        picture = {"type": "image", "format": "png", "data": base64.b64encode(large).decode()}
        body: dict[str, Any] = {
            "sampling_session_id": sampler,
            "prompt": {"chunks": [picture]},
            "sampling_params": {"max_tokens": 1},
        }
        assert plain.post("/asample", json={"seq_id": 0, **body}).status_code == 200
        values = b'{"prompt": [' + b"1," * 8_400_000 + b"1]}"
        refused = plain.post("/asample", content=values, headers={"Content-Type": "application/json"})
        assert refused.status_code == 413
        assert "values" in refused.json()["detail"]


def test_placeholders_are_counted_as_tokens_and_no_picture_is_logged(
    client: tinker.ServiceClient, service: Service
) -> None:
    with closing(sqlite3.connect(service.data_dir / "tinsmith.db")) as database:
        (cost,) = database.execute("select max(cost_tokens) from ops where kind = 'sample'").fetchone()
    assert cost == 6 + 8 * NUM_TOKENS + 8
    with httpx.Client(headers={"X-API-Key": service.key}) as plain:
        served = plain.get(f"{service.url}/api/v1/get_server_capabilities").json()
    assert {model["model_name"] for model in served["supported_models"]} == {NAME}
    log = service.log.read_bytes()
    assert b"PNG" not in log
    assert base64.b64encode(png())[:12] not in log

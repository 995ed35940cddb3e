"""What reads foreign bytes, each as a function of bytes that returns or raises a `UserError`-like refusal.

Anything else that is raised is a finding; so is a refusal without words, or with very many.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import click
import jwt
import msgspec
import numpy as np
import torch
import typer
import zstandard

from tests.fuzz import imports as of_imports
from tests.fuzz import pictures as of_pictures
from tests.fuzz.capture import Captured, read_captured
from tinsmith.api import auth, body, downloads, guesses, links, sharing
from tinsmith.api.anthropic.body import MessagesBody, PromptBody
from tinsmith.api.oai.chat import ChatBody
from tinsmith.api.oai.completions import CompletionBody
from tinsmith.api.plain_http import read_plain
from tinsmith.api.tokens import Tokens
from tinsmith.bases import catalog as bases
from tinsmith.bases.catalog import SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.cli import main as cli
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, CorruptError, TinsmithError, TokenError, UserError
from tinsmith.files import age
from tinsmith.files.adapter_files import adapter_files, external_files, pack_external
from tinsmith.files.checkpoint_file import dump_state, load_state, read_state_header
from tinsmith.loss_graph import LossGraph
from tinsmith.scopes import Scope
from tinsmith.signing import Signer
from tinsmith.store.rows import Principal
from tinsmith.training.graph import GraphProgram
from tinsmith.types import RunId, RunSpec, RunState, TenantId
from tinsmith.validate import custom as validate_custom
from tinsmith.validate import jsonform
from tinsmith.validate import requests as validate
from tinsmith.validate.requests import CUSTOM, LOSSES
from tinsmith.wire import paths, requests
from tinsmith.wire.bounds import check_bounds, read_address
from tinsmith.wire.custom_loss import LossBody, decode_custom_loss
from tinsmith.wire.loss_ops import CALLS
from tinsmith.wire.media import decode_json
from tinsmith.wire.sampling import SampleBody, decode_sample, decode_sample_result
from tinsmith.wire.training import decode_training

MAX_TOKENS = 1000
MAX_WORDS = 2100  # characters of a refusal
SETTINGS = Settings()
BASE = "tinsmith/tiny"
BODIES = [
    value
    for value in vars(requests).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
]
KINDS = (*BODIES, LossBody, SampleBody, ChatBody, CompletionBody, MessagesBody, PromptBody)


@dataclass(frozen=True)
class Target:
    """share: how many of a hundred inputs are for it. words: bytes that mean something to it."""

    share: int
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def refusable(call: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """The call, where a refusal in words is as good as an answer."""

    @functools.wraps(call)
    def run(data: bytes) -> None:
        try:
            call(data)
        except TinsmithError as error:
            if not isinstance(error, UserError | CorruptError | ConfigError):
                raise
            if not 0 < len(error.message) < MAX_WORDS:
                raise ValueError(f"a message of {len(error.message)} characters") from error

    return run


@functools.cache
def info() -> Any:
    return describe(BaseRef(BASE, SHIPPED_PATH))


@functools.cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.from_dir(SHIPPED_PATH)


@functools.cache
def captured() -> tuple[Captured, ...]:
    return tuple(read_captured())


def sent_to(*ends: str) -> tuple[bytes, ...]:
    """Bodies that clients sent to paths that end so, as they are once they are decompressed."""
    found = []
    for one in captured():
        if one.content and (not ends or one.path.endswith(ends)):
            is_packed = one.headers.get("content-encoding") == "zstd"
            found.append(zstandard.decompress(one.content, 1 << 20) if is_packed else one.content)
    return tuple(dict.fromkeys(found))


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@refusable
def protobuf(data: bytes) -> None:
    read_address(data)
    check_bounds(data, MAX_TOKENS)
    asked = decode_training(data)
    assert (asked.run_id, asked.seq_id) == read_address(data)
    if asked.loss.name == CUSTOM:
        validate_custom.loss_id_of(asked.loss)
        validate_custom.check_custom_training(asked, sum_loss(), info(), SETTINGS)
    else:
        validate.check_training(asked, info(), SETTINGS)


@refusable
def results(data: bytes) -> None:
    """What a worker writes and the API reads; a damaged file must not be a fault without a name."""
    with contextlib.suppress(ValueError):  # numpy's and protobuf's: these bytes are the worker's own
        decode_sample_result(data)


def plain_json(data: bytes) -> None:
    kind = KINDS[data[-1] % len(KINDS)] if data else KINDS[0]
    for each in (kind, object):
        refusable(lambda data, each=each: decode_json(data, each))(data)
    refusable(lambda data: validate.check_adam(requests.decode_optim_step(data)))(data)


@refusable
def samples(data: bytes) -> None:
    validate.check_sample(decode_sample(data), info(), SETTINGS)


@refusable
def graphs(data: bytes) -> None:
    graph = decode_custom_loss(data)
    shapes: dict[int, tuple[int, ...]] = {0: (), 1: (5,), 2: (5, 2)}
    lp, *inputs = (torch.ones(shapes[one.rank]) for one in graph.inputs)
    names = [one.name for one in graph.inputs[1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, metrics = GraphProgram(graph).run(lp.requires_grad_(), dict(zip(names, inputs, strict=True)))
    assert value.numel() == 1
    assert all(isinstance(metric, torch.Tensor) for metric in metrics.values())


@refusable
def safetensors(data: bytes) -> None:
    header = read_state_header(io.BytesIO(data))
    assert all(one.offset >= 0 and one.offset + one.size <= len(data) for one in header.tensors)
    state = load_state(data)
    assert sum(tensor.nbytes for tensor in state.tensors.values()) <= len(data)
    files = adapter_files(header, info())
    assert all("/" not in name for name in files)


@refusable
def archives(data: bytes) -> None:
    files = external_files(io.BytesIO(data))
    for name, content in files.items():
        assert "/" not in name
        b"".join(content.read(io.BytesIO(data)))


def heads(data: bytes) -> None:
    read_plain(data, frozenset({b"/api/v1/retrieve_future", b"/api/v1/asample"}))
    head = text(data)
    request: Any = SimpleNamespace(headers={"range": head, "if-range": '"x"'})
    start, stop, _ = downloads._range(request, '"x"', 1000) or (0, 0, False)
    assert 0 <= start <= stop <= 1000
    connection: Any = SimpleNamespace(headers={"authorization": head})
    refusable(lambda _: auth.secret_of(connection))(data)
    guesses.address_of(head)


def tinker_paths(data: bytes) -> None:
    for read in (paths.parse_path, paths.parse_kind, paths.check_name, bases.parse):
        refusable(lambda data, read=read: read(text(data)))(data)
    refusable(lambda data: bases.parse_all(text(data).split(",")))(data)
    try:
        place = paths.parse_path(text(data))
    except UserError:
        return
    assert str(place) == text(data)
    assert ".." not in place.name
    assert "/" not in place.name


def templates(data: bytes) -> None:
    """Messages of clients through the model's own template; and templates that are broken."""
    try:
        messages = json.loads(data)
    except (ValueError, RecursionError):
        messages = [{"role": "user", "content": text(data)}]
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        refusable(lambda _: tokenizer().render(messages))(data)


def packed(data: bytes) -> None:
    most = 1 << 16
    taken: list[int] = []
    try:
        refusable(lambda data: body.inflate(data, most, taken.append))(data)
    finally:
        assert sum(taken) <= most + body.PIECE_BYTES


def schemas(data: bytes) -> None:
    refusable(lambda data: jsonform.json_grammar(text(data)))(data)


def recipients(data: bytes) -> None:
    refusable(lambda data: age.check_recipients(text(data).split(",")))(data)


@functools.cache
def signer() -> Signer:
    return Signer(b"f" * 32)


@functools.cache
def good_tokens() -> tuple[bytes, ...]:
    principal = Principal(TenantId("t"), "t", "k", Scope.FULL)
    services: Any = SimpleNamespace(signer=signer())
    access = sharing._issue(services, sharing.Claims("k", "tinker://r/weights/a", "v", 2**40))
    return Tokens(signer(), 1e9).issue(principal).encode(), access.encode()


def tokens(data: bytes) -> None:
    """A token that was changed is none; but base64 spells the same bytes in more than one way."""
    jwt_text, access = good_tokens()
    try:
        key_id, _ = Tokens(signer(), 1e9).read(text(data))
        assert key_id == "k"
        header, payload, mac = text(data).split(".")
        good = jwt_text.decode().split(".")
        assert [jwt.utils.base64url_decode(part) for part in (header, payload, mac)] == [
            jwt.utils.base64url_decode(part) for part in good
        ]
    except TokenError:
        pass
    services: Any = SimpleNamespace(signer=signer())
    claims = sharing._read(services, text(data).removeprefix(sharing.TOKEN_PREFIX))
    assert claims is None or data.removeprefix(b"tmlw-") == access.removeprefix(b"tmlw-")
    refusable(lambda data: links.parse_query({"expires": text(data), "key": "", "version": "", "signature": ""}))(data)


def arguments(data: bytes) -> None:
    """The command line's reading of its arguments; nothing is carried out. And settings from the environment."""
    args = text(data).split("\x00")
    try:
        parse_arguments(command_line(), "tinsmith", args)
    except Exception as error:  # typer brings a click of its own
        if type(error).__module__.partition(".")[0] not in ("click", "typer"):
            raise
    name, _, value = text(data).partition("=")
    refusable(lambda _: Settings.load({f"TINSMITH_{name.upper()}": value, **{f"TINSMITH_{n}": value for n in NAMES}}))(
        data
    )


NAMES = ("PORT", "LEASE_S", "DETERMINISTIC", "BASE_MODEL", "DEVICE", "LOG_LEVEL")


@functools.cache
def command_line() -> click.Command:
    return typer.main.get_command(cli.app)


def parse_arguments(command: click.Command, name: str, args: Sequence[str]) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        context = command.make_context(name, list(args))
        with context:
            if isinstance(command, click.Group):
                rest = [*context._protected_args, *context.args]
                inner_name, inner, inner_args = command.resolve_command(context, rest)
                if inner is not None:
                    parse_arguments(inner, str(inner_name), inner_args)


@functools.cache
def sum_loss() -> LossGraph:
    return next(decode_custom_loss(seed) for seed in sent_to("/create_custom_loss"))


def small_state() -> RunState:
    spec = RunSpec(RunId("s1:train:0"), BASE, rank=2)
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    tensors = {
        f"{part}/model.layers.0.self_attn.q_proj.{half}": np.ones(shape, np.float32)
        for part in ("param", "m")
        for half, shape in shapes.items()
    }
    return RunState(spec, 3, tensors)


def tarred(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"abc"))
    return out.getvalue()


def raw_heads() -> tuple[bytes, ...]:
    made = []
    for one in captured():
        lines = [f"{name}: {value}" for name, value in {"host": "x", **one.headers, "x-api-key": "tml-x"}.items()]
        head = f"{one.method} {one.path} HTTP/1.1\r\n" + "\r\n".join([*lines, f"content-length: {len(one.content)}"])
        made.append(head.encode() + b"\r\n\r\n" + one.content)
    extra = (b"bytes=0-1", b"bytes=-5", b"Bearer tml-abc", b"::ffff:1.2.3.4", b"fe80::1%eth0", b"10.0.0.1")
    return (*made, *extra)


@functools.cache
def targets() -> dict[str, Target]:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }]  # fmt: skip
    states = dump_state(small_state())
    whole = b"".join(map(bytes, pack_external(small_state(), info(), (), 1.0)))
    names = [name.encode() for name in (*LOSSES, "custom", "target_tokens", "weights", "logprobs", "advantages")]
    field_names = tuple(
        f'"{field}"'.encode() for kind in KINDS for field in getattr(kind, "__struct_encode_fields__", ())
    )
    json_words = (*field_names, b"null", b"1e999", b"-1", b"{", b"[" * 500, b"\\ud800", b'"', b"NaN")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1]}}, "required": ["a"]}
    paths_seeds = ("tinker://s1:train:0/weights/a", "tinker://r/sampler_weights/step-1.x", "weights", "a=/x,b=/y")
    member_kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    tars = tuple(tarred(name) for name in ("a", "../../x", "/etc/x", "a/b", "x" * 200, "COMPLETE"))
    zipped = tuple(one.content for one in captured() if one.headers.get("content-encoding") == "zstd")
    calls = tuple(f'"{name}"'.encode() for name in CALLS)
    lines = (
        b"serve\x00--port\x001", b"keys\x00create\x00--name\x00a\x00--expires\x0090d", b"backup\x00a\x00b", b"port=5",
        b"base_model=a=/x", b"keys\x00rotate\x00k1\x00--grace\x000",
    )  # fmt: skip
    protobuf_words = (*names, b"\x1a\x00", b"\xff" * 9 + b"\x01")
    head_words = (b"\r\n", b"\r\n\r\n", b"content-length: 5\r\n", b"\x00", b": ", b"bytes=")
    path_words = (b"..", b"/", b"tinker://", b"%2e", b"\x00", b"~")
    schema_words = (b'"$ref"', b'"pattern"', b'"(a+)+$"', b'"anyOf"')
    recipients_seeds = (b"age1" + b"q" * 58, b"ssh-ed25519 AAAA", b"age1,age1")
    members = (*tars, *(tarred("a", kind) for kind in member_kinds))
    return {
        "protobuf": Target(20, protobuf, sent_to("/forward_backward"), protobuf_words),
        "results": Target(3, results, (b"", b"\x0a\x04\x0a\x02\x01\x02")),
        "json": Target(13, plain_json, sent_to(), json_words),
        "pictures": Target(3, refusable(of_pictures.pictures), of_pictures.SEEDS, of_pictures.WORDS),
        "imports": Target(4, refusable(of_imports.imports), of_imports.SEEDS, of_imports.WORDS),
        "samples": Target(8, samples, sent_to("/asample"), json_words),
        "graphs": Target(12, graphs, sent_to("/create_custom_loss"), (*calls, *json_words[-7:])),
        "safetensors": Target(
            12, safetensors, (states, states[:8], states[8:]), (b'"F32"', b'"shape"', b"__metadata__")
        ),
        "heads": Target(8, heads, raw_heads(), head_words),
        "archives": Target(4, archives, (whole, *members), (b"../", b"ustar")),
        "paths": Target(5, tinker_paths, tuple(map(str.encode, paths_seeds)), path_words),
        "templates": Target(2, templates, (json.dumps(chat).encode(),), (b"{{ x }}", b"{%", b"<|im_start|>", b"null")),
        "packed": Target(
            2, packed, (*zipped, zstandard.compress(b"x" * 10_000)), (zstandard.compress(b"a" * 100_000),)
        ),
        "schemas": Target(1, schemas, (json.dumps(schema).encode(),), schema_words),
        "recipients": Target(1, recipients, recipients_seeds, (b"age1", b",")),
        "tokens": Target(2, tokens, good_tokens(), (b".", b"=", b"eyJ", b"tmlw-")),
        "arguments": Target(2, arguments, lines, (b"--", b"\x00", b"--help", b"--port", b"-1", b"keys", b"=")),
    }


def settle() -> None:
    """Once before many inputs: what is read and made only once."""
    info()
    tokenizer()
    targets()
    torch.set_num_threads(1)
    gc.freeze()

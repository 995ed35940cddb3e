"""The command line, in this process; the HTTP API behind it is a small stand-in."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinsmith import __version__
from tinsmith.cli import main as cli
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, ForbiddenError, NotFoundError, TinsmithError
from tinsmith.files.datadir import DataDir, ServerInfo

KEY = {
    "key_id": "k1",
    "name": "alice",
    "tenant": "alice",
    "scope": "full",
    "created_at": "2026-01-01T00:00:00+00:00",
}

SCOPES = [
    {
        "tenant": name,
        "key_id": key,
        "key_name": key and "ci",
        "quotas": [
            {"quota": "tokens_per_day", "used": 1200, "limit": 5e6},
            {"quota": "usd_per_month", "used": 1.5, "limit": None},
        ],
    }
    for name, key in (("alice", None), ("alice", "k1"), ("bob", None))
]


class Stub(ThreadingHTTPServer):
    """Answers the admin endpoints; `calls` is what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, str, str | None, Any]] = []
        self.answer: tuple[int, Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        is_json = self.headers.get("Content-Type") == "application/json"
        body = json.loads(content) if is_json and length else content or None
        self.server.calls.append((self.command, self.path, self.headers.get("X-API-Key"), body))
        listed = {"scopes": SCOPES} if self.path.startswith("/api/v1/admin/quotas") else {"keys": [KEY]}
        default = {"GET": listed, "PUT": listed, "POST": {**KEY, "secret": "tml-new"}, "DELETE": KEY}[self.command]
        status, content = self.server.answer or (200, default)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def served(stub: Stub, tmp_path: Path) -> Iterator[Path]:
    """A data directory that the stand-in seems to serve."""
    data_dir = DataDir(tmp_path)
    with data_dir.locked(tmp_path / "sockets"):
        holder = data_dir.holder()
        assert holder is not None
        data_dir.write_admin_key("tml-admin")
        data_dir.write_info(ServerInfo("0", stub.url, stub.server_port, holder.pid, 1, {}))
        yield tmp_path


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def failure(*args: str | Path) -> TinsmithError:
    error = run(*args).exception
    assert isinstance(error, TinsmithError)
    return error


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_the_version_is_printed(args: list[str]) -> None:
    assert run(*args).stdout.strip() == f"tinsmith {__version__}"


def test_every_setting_is_a_flag_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run("serve", "--help").stdout.replace("\n", " ")
    for field in fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
    assert "--no-serve-tokenizers" in text


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Settings] = []
    monkeypatch.setattr(cli, "serve", lambda settings: got.append(settings) or 0)
    flags = ["--base-model", "a=/x", "--base-model", "b=/y", "--port", "0", "--no-serve-tokenizers", "--lease-s", "2.5"]
    assert run("serve", *flags).exit_code == 0
    assert got[0] == Settings.load({}, base_model=("a=/x", "b=/y"), port=0, serve_tokenizers=False, lease_s=2.5)
    assert run("serve").exit_code == 0
    assert got[1] == Settings.load({})
    monkeypatch.setenv("TINSMITH_PICTURE_LOCATIONS", "https://a.example/,/data")
    assert run("serve").exit_code == 0
    assert got[2].picture_locations == ("https://a.example/", "/data")
    assert run("serve", "--picture-locations", "/x", "--picture-locations", "10.0.0.0/8").exit_code == 0
    assert got[3].picture_locations == ("/x", "10.0.0.0/8")


def test_a_key_is_made_and_shown_once(served: Path, stub: Stub) -> None:
    done = run("keys", "create", "--name", "alice", "--data-dir", served)
    assert done.stdout == "tml-new\n"
    assert "not shown again" in done.stderr
    body = {"name": "alice", "tenant": "alice", "scope": "full"}
    assert stub.calls == [("POST", "/api/v1/admin/keys", "tml-admin", body)]


def test_keys_are_listed_without_secrets(served: Path) -> None:
    assert "alice" in run("keys", "list", "--data-dir", served).stdout


def test_a_key_is_revoked(served: Path, stub: Stub) -> None:
    assert run("keys", "revoke", "k/1", "--data-dir", served).stdout == "revoked k1 (alice)\n"
    assert stub.calls[0][:2] == ("DELETE", "/api/v1/admin/keys/k%2F1")


@pytest.mark.parametrize("flags", [("--name", ""), ("--name", "  "), ("--name", "alice", "--tenant", "")])
def test_a_key_needs_a_name(served: Path, stub: Stub, flags: tuple[str, ...]) -> None:
    assert failure("keys", "create", *flags, "--data-dir", served).message == f"{flags[-2]} must not be empty"
    assert stub.calls == []


def test_a_tenants_weight_is_set(served: Path, stub: Stub) -> None:
    stub.answer = (200, {"tenant": "alice", "weight": 2.0})
    assert run("admin", "weight", "alice", "2", "--data-dir", served).stdout == "alice has the weight 2\n"
    assert stub.calls == [("POST", "/api/v1/admin/weights", "tml-admin", {"tenant": "alice", "weight": 2.0})]


def test_an_unknown_key_is_refused_with_the_way_to_the_ids(served: Path, stub: Stub) -> None:
    stub.answer = (404, {"detail": "no key 999"})
    error = failure("keys", "revoke", "999", "--data-dir", served)
    assert isinstance(error, NotFoundError)
    assert error.message == "no key 999; `tinsmith keys list` shows the ids of all keys"


def test_a_remote_server_is_found_in_the_environment(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", stub.url + "/")
    assert "TINKER_API_KEY" in failure("keys", "list", "--data-dir", tmp_path).message
    monkeypatch.setenv("TINKER_API_KEY", "tml-remote")
    assert run("keys", "list", "--data-dir", tmp_path).exit_code == 0
    assert stub.calls[0][2] == "tml-remote"


def test_without_a_server_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tinsmith serve" in failure("keys", "list", "--data-dir", tmp_path).message
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    assert "no server answers" in failure("keys", "list", "--data-dir", tmp_path).message


def test_what_the_server_refuses_is_said(served: Path, stub: Stub) -> None:
    stub.answer = (403, {"detail": "an admin key is needed"})
    error = failure("keys", "list", "--data-dir", served)
    assert isinstance(error, ForbiddenError)
    assert error.message == "an admin key is needed"


def test_errors_are_one_line_and_choose_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_with(error: TinsmithError) -> Any:
        def app(**options: Any) -> None:
            raise error

        return app

    monkeypatch.setattr(cli, "app", fail_with(ConfigError("port taken")))
    assert cli.main() == 2
    assert capsys.readouterr().err == "error: port taken\n"
    monkeypatch.setattr(cli, "app", fail_with(TinsmithError("broken")))
    assert cli.main() == 1


def test_migrate_makes_a_database(tmp_path: Path) -> None:
    done = run("migrate", "--data-dir", tmp_path / "new")
    assert "up to date" in done.stdout
    assert (tmp_path / "new" / "tinsmith.db").is_file()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_the_demonstration_says_what_it_shows() -> None:
    text = " ".join(run("demo", "--help").stdout.split())
    assert "six fine-tunes at once" in text
    assert "reinforcement learning" in text


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert failure("demo").message == "the demonstration needs matplotlib: pip install 'tinsmith[demo]'"


def test_quotas_are_set_by_name_with_suffixes(stub: Stub, served: Path) -> None:
    done = run("admin", "set-quota", "alice", "tokens_per_day=5M", "runs=none", "requests=1_000", "--data-dir", served)
    assert done.exit_code == 0
    quotas = {"tokens_per_day": 5e6, "runs": None, "requests": 1000}
    assert stub.calls[-1] == (
        "PUT", "/api/v1/admin/quotas", "tml-admin", {"tenant": "alice", "key_id": None, "quotas": quotas}
    )  # fmt: skip
    run("admin", "set-quota", "alice", "storage_bytes=2.5G", "--key", "k1", "--data-dir", served)
    assert stub.calls[-1][3] == {"tenant": "alice", "key_id": "k1", "quotas": {"storage_bytes": 2.5e9}}


@pytest.mark.parametrize("text", ["tokens=1", "runs", "runs=", "runs=-1", "runs=many", "runs=inf", "runs=1X"])
def test_a_quota_that_can_t_be_read_is_named(served: Path, text: str) -> None:
    assert repr(text) in failure("admin", "set-quota", "alice", text, "--data-dir", served).message


def test_quotas_are_listed_with_what_is_used(served: Path) -> None:
    lines = run("admin", "quotas", "--data-dir", served).stdout.splitlines()
    assert any({"alice", "tokens_per_day", "1,200", "5,000,000"} <= set(line.split()) for line in lines)
    assert any({"alice", "k1", "(ci)", "usd_per_month", "1.50"} <= set(line.split()) for line in lines)
    assert "alice" not in run("admin", "quotas", "bob", "--data-dir", served).stdout
    assert "no tenant is called 'carol'" in failure("admin", "quotas", "carol", "--data-dir", served).message


def test_the_shell_completes_commands() -> None:
    env = {"_TINSMITH_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "tinsmith to"}
    done = CliRunner().invoke(cli.app, [], env=env, prog_name="tinsmith")
    assert '"top"' in done.stdout
    assert "backup" not in done.stdout


IMPORTED = {
    "path": "tinker://r/weights/mine", "sampler_path": "tinker://r/sampler_weights/mine", "base_model": "b",
    "lora_rank": 4,
    "has_optimizer": False,
}  # fmt: skip


def test_a_directory_is_sent_as_a_tar_of_the_adapters_files(stub: Stub, served: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x" * 700), ("more", b"x")):
        (adapter / name).write_bytes(content)
    stub.answer = (200, IMPORTED)
    done = run("import", adapter, "--base-model", "a/b c", "--name", "mine", "--ttl", 60, "--data-dir", served)
    method, path, key, body = stub.calls[-1]
    assert (method, key) == ("POST", "tml-admin")
    assert path == "/api/v1/import_weights?base_model=a%2Fb+c&name=mine&ttl_seconds=60"
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        assert tar.extractfile("adapter_model.safetensors").read() == b"x" * 700
    assert "tinker://r/weights/mine: weights of rank 4 on b" in done.stdout
    assert "tinker://r/sampler_weights/mine: to sample from" in done.stdout


def test_a_file_is_sent_as_it_is(stub: Stub, served: Path, tmp_path: Path) -> None:
    (tmp_path / "run.tar").write_bytes(b"y" * 3_000_000)
    stub.answer = (200, {**IMPORTED, "has_optimizer": True})
    done = run("import", tmp_path / "run.tar", "--data-dir", served)
    assert stub.calls[-1][3] == b"y" * 3_000_000
    assert "weights, moments and step" in done.stdout


def test_what_is_no_adapter_is_not_sent(stub: Stub, served: Path, tmp_path: Path) -> None:
    assert "lacks adapter_config.json" in failure("import", tmp_path, "--data-dir", served).message
    (tmp_path / "a.tar").write_bytes(b"x")
    stub.answer = (400, {"detail": "not an uncompressed tar"})
    assert "not an uncompressed tar" in failure("import", tmp_path / "a.tar", "--data-dir", served).message

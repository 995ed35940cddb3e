"""https by two files: the SDK and the command line against a server whose certificate a CA of our own has signed."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import trustme

from tests.contract.standing import standing
from tests.service import Service, running
from tinsmith.api import main
from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.serve.main import serve
from tinsmith.tls import Certificate, trusting

SDK = """
import os, tinker
service = tinker.ServiceClient(base_url=os.environ["URL"], api_key=os.environ["KEY"])
trainer = service.create_lora_training_client(base_model="tinsmith/tiny", rank=2).result()
datum = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": tinker.TensorData(data=[2, 3, 4], dtype="int64", shape=[3])},
)
trainer.forward_backward([datum], "cross_entropy").result()
trainer.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
print("trained", trainer.get_info().model_id)
"""


class Papers:
    """A CA of our own, and what it has signed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.ca = trustme.CA()
        self.ca_file = root / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.certificate, self.key = root / "server.pem", root / "server.key"
        self.issue("localhost", "127.0.0.1")

    def issue(self, *names: str) -> None:
        made = self.ca.issue_cert(*names)
        made.private_key_pem.write_to_path(self.key)
        for number, part in enumerate(made.cert_chain_pems):
            part.write_to_path(self.certificate, append=number > 0)

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--tls-certificate", str(self.certificate), "--tls-key", str(self.key))


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def service(papers: Papers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(papers.ca_file))
        data_dir = tmp_path_factory.mktemp("tls") / "data"
        with running(data_dir, "--device", "fake", *papers.flags) as made:
            yield made


def train(url: str, key: str, papers: Papers) -> None:
    """With the SDK as it is; SSL_CERT_FILE is all that it is told of the CA."""
    env = {**os.environ, "URL": url, "KEY": key, "SSL_CERT_FILE": str(papers.ca_file)}
    done = subprocess.run([sys.executable, "-c", SDK], env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.startswith("trained"), done.stderr


def test_the_sdk_trains_over_https(service: Service, papers: Papers) -> None:
    assert service.url.startswith("https://")
    train(service.url, service.key, papers)


def test_so_does_its_other_transport(papers: Papers, tmp_path: Path) -> None:
    settings = {"tls_certificate": str(papers.certificate), "tls_key": str(papers.key), "rust_transport": False}
    with standing(tmp_path, **settings) as (house, url):
        train(url.replace("http://", "https://"), house.key, papers)


def test_who_does_not_know_the_ca_does_not_connect(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{service.url}/api/v1/healthz")


def test_plain_http_is_not_answered(service: Service) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{service.url.replace('https', 'http')}/api/v1/healthz")


def test_browsers_are_told_to_stay_with_https(service: Service, papers: Papers) -> None:
    """On the routes' way and on the express lane."""
    context = ssl.create_default_context(cafile=str(papers.ca_file))
    headers = {"X-API-Key": service.key}
    with httpx.Client(base_url=f"{service.url}/api/v1", verify=context, headers=headers) as client:
        client.get("/sessions")
        for answer in (client.get("/sessions"), client.post("/retrieve_future", json={"request_id": "req-0"})):
            assert answer.headers["strict-transport-security"] == "max-age=31536000"
            assert answer.headers["cache-control"] == "no-store"
        page = client.get("/training_runs/x/checkpoints/weights/y/archive")
        assert page.status_code == 404


def test_the_command_line_knows_its_own_server(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CA: it trusts the certificate that the server on this data directory shows, and that one alone."""
    env = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    command = [sys.executable, "-m", "tinsmith", "keys", "list", "--data-dir", str(service.data_dir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "admin" in done.stdout, done.stderr
    assert "ready after" in service.log.read_text()


@pytest.mark.parametrize("verb", [("top", "--once"), ("admin", "quotas"), ("admin", "weights")], ids=" ".join)
def test_so_do_the_operators_commands(service: Service, verb: tuple[str, ...]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    command = [sys.executable, "-m", "tinsmith", *verb, "--data-dir", str(service.data_dir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_new_certificate_is_taken_up_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "CERTIFICATE_LOOK_S", 0.05)
    papers = Papers(tmp_path)
    settings = {"tls_certificate": str(papers.certificate), "tls_key": str(papers.key)}
    with standing(tmp_path, **settings) as (_, url):
        url = url.replace("http://", "https://")

        def is_trusted(certificate: Path) -> bool:
            with closing(httpx.Client(verify=trusting(certificate))) as client:
                try:
                    return client.get(f"{url}/api/v1/healthz").status_code == 200
                except httpx.ConnectError:
                    return False

        old, new = tmp_path / "old.pem", tmp_path / "new.pem"
        old.write_bytes(papers.certificate.read_bytes())
        assert is_trusted(old)
        papers.certificate.write_text("half of a certif")
        time.sleep(0.3)
        assert is_trusted(old)
        papers.issue("localhost", "127.0.0.1")
        new.write_bytes(papers.certificate.read_bytes())
        deadline = time.monotonic() + 20
        while not is_trusted(new) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_trusted(new)
        assert not is_trusted(old)


def test_files_that_can_not_work_are_named_at_the_start(papers: Papers, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    papers.ca.issue_cert("other").private_key_pem.write_to_path(other)
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for certificate, key in ((papers.certificate, other), (empty, papers.key), (tmp_path / "none", papers.key)):
        with pytest.raises(ConfigError, match="--tls-certificate"):
            Certificate(certificate, key)
        with pytest.raises(ConfigError, match="--tls-certificate"):
            serve(Settings.load({}, data_dir=tmp_path / "data", tls_certificate=str(certificate), tls_key=str(key)))
    with pytest.raises(ConfigError, match="go together"):
        Settings.load({}, tls_key=str(papers.key))

"""What `tinsmith doctor` sees of the files that TLS is served with."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from tinsmith.cli.doctor import Check, Level, check_tls, examine
from tinsmith.config import Settings

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def papers(ca: trustme.CA, root: Path, days: float = 60, since: float = -1) -> Settings:
    made = ca.issue_cert("localhost", not_before=NOW + timedelta(days=since), not_after=NOW + timedelta(days=days))
    made.private_key_pem.write_to_path(root / "server.key")
    for number, part in enumerate(made.cert_chain_pems):
        part.write_to_path(root / "server.pem", append=number > 0)
    (root / "server.key").chmod(0o600)
    return settings(root)


def settings(root: Path, **more: str) -> Settings:
    files = {"tls_certificate": str(root / "server.pem"), "tls_key": str(root / "server.key")}
    return Settings.load({}, data_dir=root, **(files | more))


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


def test_a_good_certificate_is_shown_with_its_end(ca: trustme.CA, tmp_path: Path) -> None:
    check = only(check_tls(papers(ca, tmp_path), time.time()))
    assert check.level is Level.OK
    assert f"valid until {NOW + timedelta(days=60):%Y-%m-%d}" in check.found


@pytest.mark.parametrize(
    ("days", "since", "says"), [(-1, -9, "certificate has expired"), (9, 1, "certificate is not yet valid")]
)
def test_one_that_clients_refuse_is_found(ca: trustme.CA, tmp_path: Path, days: float, since: float, says: str) -> None:
    check = only(check_tls(papers(ca, tmp_path, days, since), time.time()))
    assert check.level is Level.FAIL
    assert says in check.found


def test_one_that_ends_soon_is_found(ca: trustme.CA, tmp_path: Path) -> None:
    check = only(check_tls(papers(ca, tmp_path, days=5), time.time()))
    assert check.level is Level.WARN
    assert "renew" in check.cure


def test_a_key_that_others_may_read_is_found(ca: trustme.CA, tmp_path: Path) -> None:
    made = papers(ca, tmp_path)
    (tmp_path / "server.key").chmod(0o640)
    first, second = check_tls(made, time.time())
    assert (first.level, second.level) == (Level.OK, Level.WARN)
    assert second.cure == f"chmod 600 {tmp_path / 'server.key'}"


@pytest.mark.parametrize("harm", ["missing certificate", "missing key", "another's key", "no PEM"])
def test_files_that_do_not_work_are_found(ca: trustme.CA, tmp_path: Path, harm: str) -> None:
    made = papers(ca, tmp_path)
    match harm:
        case "missing certificate":
            (tmp_path / "server.pem").unlink()
        case "missing key":
            (tmp_path / "server.key").unlink()
        case "another's key":
            ca.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "server.key")
        case "no PEM":
            (tmp_path / "server.pem").write_text("nothing")
    check = only(check_tls(made, time.time()))
    assert check.level is Level.FAIL
    assert "server.pem" in check.found


def test_certificates_of_your_own_hand_work_too(tmp_path: Path) -> None:
    """Signed by itself, which is what many make with one command."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "server.pem")
    ca.private_key_pem.write_to_path(tmp_path / "server.key")
    (tmp_path / "server.key").chmod(0o600)
    ssl.create_default_context().load_verify_locations(str(tmp_path / "server.pem"))
    assert only(check_tls(settings(tmp_path), time.time())).level is Level.OK


def test_without_tls_what_strangers_can_read_is_said(tmp_path: Path) -> None:
    plain = Settings.load({}, data_dir=tmp_path)
    assert only(check_tls(plain, time.time())).level is Level.OK
    open_to_all = Settings.load({}, data_dir=tmp_path, host="0.0.0.0")
    assert only(check_tls(open_to_all, time.time())).level is Level.WARN
    behind_a_proxy = Settings.load({}, data_dir=tmp_path, host="0.0.0.0", public_url="https://tinsmith.example")
    assert only(check_tls(behind_a_proxy, time.time())).level is Level.OK


def test_the_doctor_looks(ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.cli.doctor.probe_torch", lambda settings: "not looked at")
    names = [check.name for check in examine(papers(ca, tmp_path, days=-1, since=-9))]
    assert "TLS" in names

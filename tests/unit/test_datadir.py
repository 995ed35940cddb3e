from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinsmith.admin import ensure_admin_key
from tinsmith.errors import ConfigError
from tinsmith.files.datadir import DataDir, ServerInfo
from tinsmith.store import open_store

HOLD = """
import sys, time
from pathlib import Path
from tinsmith.files.datadir import DataDir
with DataDir(Path(sys.argv[1])).locked(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def info(pid: int) -> ServerInfo:
    return ServerInfo("0.1.0", "http://127.0.0.1:1", 1, pid, 2, {"tinsmith/tiny": 3})


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "a" / "b")
    data_dir.make()
    data_dir.make()
    assert data_dir.path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        DataDir(tmp_path / "file" / "x").make()


def test_one_server_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    sockets = tmp_path / "tinsmith-sockets"
    sockets.mkdir()
    data_dir = DataDir(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, sockets], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other.stdout as out:
        out.readline()
    data_dir.write_info(info(other.pid))
    with pytest.raises(ConfigError, match=f"pid {other.pid}"), data_dir.locked(tmp_path):
        pass
    assert data_dir.info() == info(other.pid)
    other.kill()
    other.wait()
    assert data_dir.info() is None
    assert data_dir.left_info() == info(other.pid)
    with data_dir.locked(tmp_path / "mine"):
        assert not sockets.exists()
        holder = data_dir.holder()
        assert holder is not None
        assert holder.pid == os.getpid()
    assert data_dir.holder() is None


def test_a_broken_server_file_is_none(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    for text in ("", "[]", '{"pid": 1}'):
        (tmp_path / "server.json").write_text(text)
        assert data_dir.left_info() is None
    data_dir.remove_info()
    data_dir.remove_info()


def test_the_first_key_is_made_once(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    secret = ensure_admin_key(data_dir, "NORMAL")
    assert secret is not None
    assert secret.startswith("tml-")
    assert data_dir.admin_key_file.read_text() == secret + "\n"
    assert data_dir.admin_key_file.stat().st_mode & 0o777 == 0o600
    assert ensure_admin_key(data_dir, "NORMAL") is None
    store = open_store(tmp_path)
    principal = store.tenants.authenticate(secret)
    store.close()
    assert principal is not None
    assert (principal.tenant_name, principal.is_admin) == ("admin", True)
    assert secret.encode() not in (tmp_path / "tinsmith.db").read_bytes()


def test_a_lost_key_is_replaced_and_a_foreign_one_refused(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    first = ensure_admin_key(data_dir, "NORMAL")
    data_dir.admin_key_file.unlink()
    second = ensure_admin_key(data_dir, "NORMAL")
    assert second not in (None, first)
    data_dir.write_admin_key("tml-made-up")
    with pytest.raises(ConfigError, match="remove the file"):
        ensure_admin_key(data_dir, "NORMAL")


def test_the_signing_secret_is_made_once_for_its_owners_eyes(tmp_path: Path) -> None:
    secret = DataDir(tmp_path).signing_secret()
    assert len(secret) == 32
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600
    assert DataDir(tmp_path).signing_secret() == secret
    assert [path.name for path in tmp_path.iterdir()] == ["signing.key"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        (tmp_path / "other").mkdir()
        made = set(pool.map(lambda _: DataDir(tmp_path / "other").signing_secret(), range(8)))
    assert len(made) == 1


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "00" * 31])
def test_a_damaged_signing_secret_is_not_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "signing.key").write_text(text)
    with pytest.raises(ConfigError, match="is damaged: remove it"):
        DataDir(tmp_path).signing_secret()

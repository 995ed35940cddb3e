from __future__ import annotations

import importlib.metadata
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinsmith.cli import doctor
from tinsmith.cli import main as cli
from tinsmith.cli.doctor import Level
from tinsmith.config import Settings
from tinsmith.files.datadir import DataDir, ServerInfo
from tinsmith.machine.cpu import OPENMP
from tinsmith.store import DATABASE_FILE, open_store

TORCH: dict[str, Any] = {
    "torch": "2.13.0", "transformers": "5", "cuda": None, "threads": 2, "gflops": 80.0, "gpus": [], "uneven": [],
    "triton": "", "compiled": "",
}  # fmt: skip
GPU = {"name": "H200", "free_bytes": 100 * 2**30, "total_bytes": 140 * 2**30}


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings.load({}, data_dir=tmp_path / "data", port=0, **changes)


def test_a_healthy_machine_passes(tmp_path: Path) -> None:
    checks = doctor.examine(settings(tmp_path))
    assert {c.name for c in checks} >= {
        "Python", "torch", "rounding", "accelerator", "compiled adapters",
        "threads", "waiting threads", "base model", "memory", "disk",
        "data directory", "database", "port", "SDK",
    }  # fmt: skip
    assert not [c for c in checks if c.level is Level.FAIL and c.name != "disk"]
    assert not (tmp_path / "data").exists()


def test_trouble_is_shown_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe_torch", lambda settings: "No module named torch")
    done = CliRunner().invoke(
        cli.app, ["doctor", "--data-dir", str(tmp_path), "--port", "0", "--base-model", "nonsense"]
    )
    assert done.exit_code == 1
    assert "torch: install it again" in done.stdout
    assert "base model: correct --base-model" in done.stdout


def test_torch() -> None:
    assert [c.level for c in doctor.check_torch(TORCH)] == [Level.OK] * 2
    assert doctor.check_torch({**TORCH, "uneven": [[32, 128]]})[1].level is Level.WARN
    assert doctor.check_torch("broken")[0].level is Level.FAIL


def test_accelerators_and_their_kernels() -> None:
    with_gpu = {**TORCH, "gpus": [GPU]}
    (used,) = doctor.check_accelerator(with_gpu, "auto")
    assert (used.level, used.found) == (Level.OK, "H200 (100 of 140 GiB free)")
    (unused,) = doctor.check_accelerator(with_gpu, "cpu")
    assert unused.found.endswith("left unused (--device cpu)")
    (missing,) = doctor.check_accelerator(with_gpu, "cuda:1")
    assert missing.level is Level.FAIL
    assert "sees 1" in missing.found
    assert [c.level for c in doctor.check_accelerator(with_gpu | {"triton": "no"}, "cuda")] == [Level.OK, Level.WARN]
    assert [c.level for c in doctor.check_accelerator(TORCH, "auto")] == [Level.OK, Level.OK]
    without = doctor.check_accelerator({**TORCH, "compiled": "there is no C compiler (cc): install one"}, "auto")[1]
    assert (without.level, without.found[:8]) == (Level.WARN, "there is")
    assert "off" in doctor.check_accelerator(TORCH, "auto", may_compile=False)[1].found
    assert doctor.check_accelerator("broken", "auto") == []


def test_threads_that_fight_are_found() -> None:
    calm = dict(OPENMP)
    assert [c.level for c in doctor.check_threads(calm, 0, 4)] == [Level.OK, Level.OK]
    assert [c.level for c in doctor.check_threads({**calm, "OMP_WAIT_POLICY": "ACTIVE"}, 8, 4)] == [Level.WARN] * 2
    assert [c.level for c in doctor.check_threads({**calm, "GOMP_SPINCOUNT": "30000"}, 4, 4)] == [Level.OK, Level.WARN]


def test_memory_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs, rows = doctor.check_bases(settings(tmp_path))
    assert [row.level for row in rows] == [Level.OK]
    levels = []
    for free in (10**6, 10**8, 10**11):
        monkeypatch.setattr(doctor, "free_memory_bytes", lambda free=free: free)
        levels += [c.level for c in doctor.check_memory(refs, settings(tmp_path))]
    assert levels == [Level.FAIL, Level.WARN, Level.OK]
    assert doctor.check_memory([], settings(tmp_path)) == []


def test_a_taken_port_is_found(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = Settings.load({}, data_dir=tmp_path, port=sock.getsockname()[1])
        check = doctor.check_port(taken, DataDir(tmp_path))
        assert check.level is Level.FAIL
        assert "--port" in check.cure


def test_the_directory_and_its_server(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    assert doctor.check_data_dir(data_dir).found.endswith("free")
    with data_dir.locked(tmp_path / "sockets"):
        holder = data_dir.holder()
        assert holder is not None
        data_dir.write_info(ServerInfo("0", "http://x:5", 5, holder.pid, 1, {}))
        assert f"pid {holder.pid}" in doctor.check_data_dir(data_dir).found
        assert doctor.check_port(Settings.load({}, data_dir=tmp_path, port=5), data_dir).level is Level.OK
    assert "takes over" in doctor.check_data_dir(data_dir).found
    (tmp_path / "file").write_text("")
    assert doctor.check_data_dir(DataDir(tmp_path / "file")).level is Level.FAIL


def test_the_disk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for free in (10**9, 5 * 10**9, 10**11):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        levels.append(doctor.check_disk(tmp_path / "not" / "there").level)
    assert levels == [Level.FAIL, Level.WARN, Level.OK]


def test_a_damaged_database_is_found(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    assert doctor.check_database(path).level is Level.OK
    open_store(tmp_path).close()
    assert "sound" in doctor.check_database(path).found
    path.write_bytes(path.read_bytes()[:6000] + b"\xff" * 3000)
    damaged = doctor.check_database(path)
    assert damaged.level is Level.FAIL
    assert "backup" in damaged.cure
    path.write_bytes(b"not a database at all" * 100)
    assert "not a database" in doctor.check_database(path).found


def test_an_old_python_is_named() -> None:
    assert doctor.check_python((3, 10)).level is Level.FAIL


def test_what_is_watched_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no traces" in doctor.check_watching(Settings()).found
    address = doctor.check_watching(Settings(metrics_address="127.0.0.1:9464", otlp_endpoint="http://127.0.0.1:4318"))
    assert (address.level, "127.0.0.1:9464" in address.found, "4318" in address.found) == (doctor.Level.OK, True, True)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    lacking = doctor.check_watching(Settings(otlp_endpoint="http://127.0.0.1:4318"))
    assert (lacking.level, lacking.cure) == (doctor.Level.FAIL, "pip install 'tinsmith[otel]'")

"""Small C programs: compiled once, found again, and what is said where that can't be."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.service import until
from tinsmith.config import cache_dir
from tinsmith.errors import UnsupportedError
from tinsmith.machine import compiled

SEVEN = "int seven(void) { return NUMBER; }\n"
FLAGS = ("-DNUMBER=7",)
REAL = shutil.which(compiled.COMPILER)

pytestmark = pytest.mark.skipif(REAL is None, reason="needs a C compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "seven.c"
    path.write_text(SEVEN, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "cache"


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make `cc` a shell script, beside the shell's own programs."""
    made = tmp_path / "bin" / "cc"
    made.parent.mkdir()
    made.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    made.chmod(0o755)
    monkeypatch.setenv("PATH", f"{made.parent}:{os.environ['PATH']}")


def test_a_program_is_compiled_once_for_all_that_it_is_made_from(source, folder):
    assert compiled.load(source, FLAGS, folder).seven() == 7
    (first,) = folder.iterdir()
    made = first.stat().st_mtime_ns
    assert compiled.load(source, FLAGS, folder).seven() == 7
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [made]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compiled.load(source, ("-DNUMBER=8",), folder).seven() == 8
    source.write_text(SEVEN.replace("NUMBER", "NUMBER + 2"), encoding="utf-8")
    assert compiled.load(source, FLAGS, folder).seven() == 9
    assert len(list(folder.iterdir())) == 3


def test_another_compiler_compiles_anew(source, folder, tmp_path, monkeypatch):
    compiled.load(source, FLAGS, folder)
    compiler(tmp_path, monkeypatch, f'test "$1" = --version && echo another && exit; exec {REAL} "$@"')
    assert compiled.load(source, FLAGS, folder).seven() == 7
    assert len(list(folder.iterdir())) == 2


def test_what_a_crash_left_of_a_library_is_compiled_anew(source, folder):
    code = (
        "import sys; from pathlib import Path; from tinsmith.machine import compiled;"
        f"print(compiled.load(Path({str(source)!r}), {FLAGS!r}, Path({str(folder)!r})).seven())"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"
    (library,) = folder.iterdir()
    whole = library.read_bytes()
    for kept in (0, 0.01, 0.1, 0.5, 0.99):
        size = int(kept * len(whole))
        for left in (whole[:size], whole[:size] + bytes(len(whole) - size)):
            library.unlink()
            library.write_bytes(left)
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"
            assert library.stat().st_size >= len(whole) - 100


def test_processes_that_compile_at_once_all_get_it(source, folder, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'[ "$1" = --version ] || sleep 1; exec {REAL} "$@"')
    code = (
        "import sys; from pathlib import Path; from tinsmith.machine import compiled;"
        f"print(compiled.load(Path({str(source)!r}), {FLAGS!r}, Path({str(folder)!r})).seven())"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["7\n"] * 3
    assert len(list(folder.iterdir())) == 1


def test_without_a_compiler_the_cure_is_to_install_one(source, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"no C compiler \(cc\): install one, such as the package gcc"):
        compiled.load(source, FLAGS, folder)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", r"doesn't compile it \(exit status 3\)"),
        ('[ "$1" = --version ] || { echo "seven.c:1: error: no such header" >&2; exit 1; }', "no such header"),
        ("sleep 9", "timed out"),
    ],
)
def test_a_broken_compiler_is_told(source, folder, tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(compiled, "PATIENCE_S", 0.5)
    compiler(tmp_path, monkeypatch, script)
    with pytest.raises(UnsupportedError, match=said):
        compiled.load(source, FLAGS, folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_compiler_that_makes_nothing_is_told(source, folder, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(UnsupportedError, match="set XDG_CACHE_HOME to a folder"):
        compiled.load(source, FLAGS, folder)


def test_a_folder_that_others_can_write_to_is_refused(source, folder):
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    with pytest.raises(UnsupportedError, match=r"others can write to .*chmod 700"):
        compiled.load(source, FLAGS, folder)
    assert not list(folder.iterdir())


def test_a_file_that_another_could_have_written_is_compiled_anew(source, folder, tmp_path):
    compiled.load(source, FLAGS, folder)
    (library,) = folder.iterdir()
    own = library.read_bytes()

    def open_to_all() -> None:
        library.chmod(0o666)

    def link() -> None:
        library.unlink()
        (tmp_path / "elsewhere.so").write_bytes(own)
        library.symlink_to(tmp_path / "elsewhere.so")

    def of_another() -> None:
        os.chown(library, 12345, 12345)

    for plant in (open_to_all, link, *([of_another] if os.geteuid() == 0 else [])):
        plant()
        assert compiled.load(source, FLAGS, folder).seven() == 7
        found = library.lstat()
        assert (found.st_mode, found.st_uid) == (stat.S_IFREG | 0o600, os.geteuid())


def test_a_folder_that_others_can_put_another_in_the_place_of_is_refused(source, folder):
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(UnsupportedError, match="put another folder in the place"):
        compiled.load(source, FLAGS, folder)
    folder.parent.chmod(0o1777)
    assert compiled.load(source, FLAGS, folder).seven() == 7


def test_a_link_that_is_turned_elsewhere_while_we_look_is_not_followed_again(source, folder, tmp_path, monkeypatch):
    """Whoever can write where a link lies can turn it at any time."""
    other, link = tmp_path / "other", tmp_path / "link"
    compiled.load(source, FLAGS, folder)
    (own,) = folder.iterdir()
    compiled.load(source, ("-DNUMBER=8",), other)
    (planted,) = other.iterdir()
    planted.rename(other / own.name)
    link.symlink_to(folder)
    is_whole = compiled._is_whole

    def then_turned(path: Path) -> bool:
        found = is_whole(path)
        link.unlink()
        link.symlink_to(other)
        return found

    monkeypatch.setattr(compiled, "_is_whole", then_turned)
    assert compiled.load(source, FLAGS, link).seven() == 7


def test_what_is_made_on_the_way_is_its_owners_alone(source, folder):
    before = os.umask(0)
    try:
        compiled.load(source, FLAGS, folder)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (folder.parent, folder, *folder.iterdir())]
    assert modes == [0o700, 0o700, 0o600]


def test_a_compiler_that_hangs_ends_with_all_that_it_has_started(source, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE_S", 1.0)
    compiler(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/child; cat; wait")
    started = time.monotonic()
    with pytest.raises(UnsupportedError, match="timed out"):
        compiled.load(source, FLAGS, folder)
    assert time.monotonic() - started < 30
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    until(lambda: not child.exists() or child.read_text().split()[2] == "Z", 10, lambda: "it still runs")


def test_a_folder_that_cannot_be_written_is_told(source, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file" / "cache", Path("/proc/tinsmith")):
        with pytest.raises(UnsupportedError, match="set XDG_CACHE_HOME to a folder"):
            compiled.load(source, FLAGS, folder)
    with pytest.raises(UnsupportedError, match="set HOME or XDG_CACHE_HOME"):
        compiled.load(source, FLAGS, None)


def test_a_library_that_it_needs_and_that_is_not_there_is_told(source, folder, tmp_path):
    subprocess.run([REAL, "-shared", "-fPIC", "-x", "c", os.devnull, "-o", str(tmp_path / "libgone.so")], check=True)
    with pytest.raises(UnsupportedError, match=r"libgone\.so.*install that library"):
        compiled.load(source, ("-DNUMBER=7", f"-L{tmp_path}", "-Wl,--no-as-needed", "-lgone"), folder)


def test_the_folder_is_where_the_user_keeps_such_things():
    assert cache_dir({"XDG_CACHE_HOME": "/caches", "HOME": "/a"}) == Path("/caches/tinsmith")
    assert cache_dir({"HOME": "/a"}) == Path("/a/.cache/tinsmith")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) is None
    assert cache_dir({}) is None

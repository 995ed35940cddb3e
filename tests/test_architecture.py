"""The house: import direction, who may know what, and how long a file may be."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "tinsmith"
MAX_LINES = 400
GENERATED = {"wire_pb2.py"}

# By the first part of the name below the package. A module may import from its own layer and from those before it.
LAYERS = (
    {
        "", "types", "scopes", "loss_graph", "lora_options", "pictures", "route_tape", "errors", "config", "settings",
        "machine", "crashpoints",
    },
    {"store", "files", "observe", "wire", "bases", "validate", "ipc", "signing", "tls"},
    {
        "scheduler", "fair_queueing", "recovery", "engine", "fake_engine", "model", "training", "sampling",
        "torch_engine", "torch_probe", "upkeep", "export", "importing",
    },
    {"worker", "api"},
    {"admin", "serve", "cli", "top", "demo", "__main__"},
)  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TORCH_ROOMS = {"model", "training", "sampling", "torch_engine", "torch_probe", "export"}
HTTP = {"litestar", "uvicorn", "httpx", "urllib", "http", "requests", "starlette"}
SQL = {"sqlalchemy", "alembic", "sqlite3"}


@functools.cache
def sources() -> list[Path]:
    return [path for path in sorted(SRC.rglob("*.py")) if "__pycache__" not in path.parts]


def module_of(path: Path) -> str:
    """Name below the package: "" for the package itself, "store.ops" for store/ops.py."""
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    return module_of(path).split(".")[0]


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Full names of all that a file imports; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@functools.cache
def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, named below the package."""
    known = {module_of(p) for p in sources()}
    own = set()
    for name in imports_of(path):
        if name.split(".")[0] == "tinsmith":
            below = ".".join(name.split(".")[1:])
            own.add(below if below in known else below.rpartition(".")[0])
    return own


def owner_of(owners: list[str], known: set[str]) -> str:
    """Of the distributions that share a package's name, the one that is known to us."""
    names = sorted(map(distribution, owners))
    return next((name for name in names if name in known), names[0])


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_used_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((SRC.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {distribution(re.split(r"[<>=]", text)[0]) for text in project["dependencies"]}
    demo = {distribution(re.split(r"[<>=]", text)[0]) for text in project["optional-dependencies"]["demo"]}
    owners = importlib.metadata.packages_distributions()
    used: dict[str, set[str]] = {"demo": set(), "rest": set()}
    for path in sources():
        resources = set(re.findall(r"resources\.files\(\"(\w+)\"\)", path.read_text(encoding="utf-8")))
        foreign = (tops_of(path) | resources) - set(sys.stdlib_module_names) - {"tinsmith"}
        used["demo" if room_of(path) == "demo" else "rest"] |= {
            owner_of(owners[top], declared | demo) for top in foreign
        }
    extras = {
        distribution(re.split(r"[<>=]", text)[0])
        for extra in ("gpu", "otel")
        for text in project["optional-dependencies"][extra]
    }
    assert used["rest"] - extras == declared
    assert used["demo"] <= declared | demo


def test_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in sources()} <= RANK.keys()


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_never_go_up(path: Path) -> None:
    up = [name for name in own_imports(path) if RANK[name.split(".")[0]] > RANK[room_of(path)]]
    assert not up


def test_worker_and_api_do_not_know_each_other() -> None:
    crossing = {
        (module_of(path), name)
        for path in sources()
        if room_of(path) in {"worker", "api"}
        for name in own_imports(path)
        if name.split(".")[0] in {"worker", "api"} - {room_of(path)}
    }
    assert not crossing


def test_no_import_cycles() -> None:
    graph = {module_of(path): own_imports(path) - {module_of(path), ""} for path in sources()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' > '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_torch_stays_in_its_rooms() -> None:
    rooms = {room_of(path) for path in sources() if tops_of(path) & {"torch", "transformers"}}
    assert rooms <= TORCH_ROOMS


def test_no_http_in_the_worker_and_below() -> None:
    rooms = {room_of(path) for path in sources() if tops_of(path) & HTTP}
    assert rooms <= {"api", "cli", "demo", "serve"}


def test_sql_is_spoken_in_the_store_alone() -> None:
    assert {room_of(path) for path in sources() if tops_of(path) & SQL} == {"store"}


def test_the_environment_is_read_in_config_alone() -> None:
    reading = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}:
                reading.add(module_of(path))
    assert reading == {"config"}


def test_no_imports_inside_functions() -> None:
    inside = [
        f"{module_of(path)}:{inner.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not inside


def test_files_have_one_subject() -> None:
    long = {
        str(path.relative_to(SRC)): lines
        for path in sources()
        if path.name not in GENERATED and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("tinsmith.api.main", ["torch", "transformers"]),
        ("tinsmith.cli.main", ["torch", "transformers", "litestar", "uvicorn"]),
        ("tinsmith.worker.main", ["litestar", "uvicorn", "httpx"]),
    ],
)
def test_a_process_loads_only_what_is_its_business(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""What the source may not contain: ways in which bytes that came from outside become code."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "tinsmith"
NO_MODULES = {
    "pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "xmlrpc", "pty",
    "code", "codeop", "zipimport", "imp", "runpy",
}  # fmt: skip
NO_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"}
NO_ATTRIBUTES = {  # of a module of this name
    "torch": {"load", "save"},
    "np": {"load", "save", "savez", "fromregex"},
    "numpy": {"load", "save", "savez", "fromregex"},
    "os": {"system", "popen", "spawnl", "spawnv", "execv", "execve", "execvp"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "tempfile": {"mktemp"},
    "tarfile": {"TarFile.extractall"},
    "shutil": {"unpack_archive"},
    "ssl": {"_create_unverified_context", "CERT_NONE"},
}
NO_ROOMS = (
    "torch.jit",
    "torch.hub",
    "torch.package",
    "torch.serialization",
)  # they unpickle, or run what they load
NO_METHODS = {"extractall", "extract"}  # archives are read in place
NO_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("verify", False)}
SOURCES = sorted(path for path in SRC.rglob("*.py") if path.name != "wire_pb2.py")


def offences(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [
                alias.name
                for alias in node.names
                if alias.name.partition(".")[0] in NO_MODULES or is_in_no_room(alias.name)
            ]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] if (node.module or "").partition(".")[0] in NO_MODULES else []
            of_module = NO_ATTRIBUTES.get(node.module or "", set())
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name in of_module or is_in_no_room(f"{node.module}.{alias.name}")
            ]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if node.attr in NO_ATTRIBUTES.get(node.value.id, ()) else []
            found += [dotted(node)] if is_in_no_room(dotted(node)) else []
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in NO_CALLS:
                found.append(f"{node.func.id}()")
            if isinstance(node.func, ast.Attribute) and node.func.attr in NO_METHODS:
                found.append(f".{node.func.attr}()")
            if getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module" and not is_known(node):
                found.append("import_module()")
            found += [
                f"{keyword.arg}={keyword.value.value}"
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in NO_ARGUMENTS
            ]
    return found


def dotted(node: ast.Attribute) -> str:
    """ "torch.jit" for `torch.jit`."""
    return f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""


def is_in_no_room(name: str) -> bool:
    return any(f"{name}.".startswith(f"{room}.") for room in NO_ROOMS)


def is_known(call: ast.Call) -> bool:
    """Whether what it imports is a module that the source names, or one of a package that it names."""
    (name,) = call.args
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
    return isinstance(name, ast.Constant) and str(name.value).startswith(("tinsmith.", "torch", "transformers."))


def test_no_way_from_bytes_to_code() -> None:
    found = {str(path.relative_to(SRC)): offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    found["observe/otel.py"].remove(".extract()")  # a propagator's, which reads headers
    assert not {path: names for path, names in found.items() if names}


def test_the_walk_sees_it() -> None:
    for text in (
        "import pickle", "from marshal import loads", "eval('1')", "exec(x)", "torch.load(f)", "np.load(f)",
        "os.system(x)", "subprocess.run(x, shell=True)", "np.fromfile(f, allow_pickle=True)", "tar.extractall(p)",
        "__import__('x')", "importlib.import_module(x)", "from importlib import import_module; import_module(f'{x}.y')",
        "torch.jit.load(f)", "torch.hub.load(r, m)", "torch.package.PackageImporter(f)", "torch.serialization.load(f)",
        "import torch.package", "from torch.hub import load", "from torch import serialization",
        "from os import system", "from numpy import load",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "httpx.get(u, verify=False)",
    ):  # fmt: skip
        assert offences(text), text


def test_base_models_are_safetensors_alone() -> None:
    """transformers would take pickled weights where there are no others, and run code of the directory: it is given
    weights that were read by safetensors, and no directory to look into; elsewhere no code of one is run."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "from_pretrained":
                continue
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            found.append(path.name)
            if path.name == "loading.py":
                assert isinstance(node.args[0], ast.Constant)
                assert node.args[0].value is None
                assert "state_dict" in given
            else:
                assert given["local_files_only"] is True, path
                assert given["trust_remote_code"] is False, path
    assert {"loading.py", "directory.py", "eyes.py"} <= set(found)
    assert "safe_open(" in (SRC / "model" / "weight_files.py").read_text(encoding="utf-8")


def test_signatures_and_digests_are_compared_in_constant_time() -> None:
    """Where a secret, or what follows from one, meets what a client sent: by `compare_digest`."""
    for name in ("signing.py", "store/tenants.py"):
        assert "hmac.compare_digest(" in (SRC / name).read_text(encoding="utf-8"), name
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
                continue
            names = [getattr(side, "id", getattr(side, "attr", "")) for side in (node.left, *node.comparators)]
            assert not {"signature", "secret", "password", "expected_signature", "mac"} & set(names), (
                path,
                node.lineno,
            )

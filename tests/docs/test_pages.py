"""Pages speak of what exists: tests named in proof.md, links, make targets, generated pages."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("dev/*.md")])
TEST = re.compile(r"`(tests/[^`:]+)((?:::[^`:]+)*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def test_each_line_of_the_threat_model_names_a_test() -> None:
    text = (ROOT / "docs/explain/security.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) > 25
    assert not [row for row in rows if not TEST.search(row)]


def test_every_test_that_proof_names_exists() -> None:
    for page in ("docs/reference/proof.md", "docs/explain/security.md"):
        named = TEST.findall((ROOT / page).read_text())
        assert len(named) > 30
        missing = [path + names for path, names in named if not defines(ROOT / path, names.split("::")[1:])]
        assert not missing


def defines(path: Path, names: list[str]) -> bool:
    """`names`: of a function, or of a class and its method; none asks for the file alone."""
    if not path.is_file():
        return False
    body = parsed(path).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not broken


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^\s*make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= targets


def test_the_readme_leads_to_every_page() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")}
    assert not pages - linked, "add it to the list of documentation in README.md"


def test_the_tree_of_the_readme_is_complete() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The house")[2].split("```")[1]
    folders = [
        path.name
        for parent in ("src/tinsmith", "tests", "docs")
        for path in (ROOT / parent).iterdir()
        if path.is_dir() and not path.name.startswith((".", "_")) and any(path.rglob("*.*"))
    ]
    assert not [name for name in folders if f"{name}/" not in tree]


def test_pages_stand_on_their_own() -> None:
    for page in PAGES:
        text = page.read_text()
        assert "../shared" not in text, page
        assert not re.search(r"(?<![\w.])/(root|home/\w+)/", text), page

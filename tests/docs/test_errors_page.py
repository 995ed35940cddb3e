"""The page of errors lists exactly the codes in the source, with their categories and HTTP statuses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tinsmith import errors
from tinsmith.api.errors import CODES, STATUSES, status_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "errors.md"


def rows() -> dict[str, tuple[str, str]]:
    """code -> (category, where)."""
    lines = PAGE.read_text().partition("## Codes")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert all(len(row) == 5 and all(row) for row in cells)
    made = {row[0].strip("`"): (row[1], row[2]) for row in cells}
    assert len(made) == len(cells)
    return made


def codes_in_source() -> set[str]:
    found = set(CODES.values())
    for path in (ROOT / "src" / "tinsmith").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found |= set(_codes(node))
    return found


def _codes(node: ast.AST) -> Iterator[str]:
    """`code = "..."` of an exception class, and the code of a Failure."""
    if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "TooLarge")):
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "code":
                yield ast.literal_eval(statement.value)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Failure":
        values = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
        yield from (value.value for value in values if isinstance(value, ast.Constant))


def test_the_page_lists_the_codes_of_the_source() -> None:
    assert set(rows()) == codes_in_source()


def test_no_status_is_one_that_clients_wait_upon_for_long() -> None:
    """409 and 402: the SDK asks again for minutes, or waits for a payment that nobody takes."""
    assert not {402, 409} & {*CODES, *(status for _, status in STATUSES)}


def test_categories_and_statuses_are_those_of_the_exceptions() -> None:
    page = rows()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TinsmithError)
    ]
    reach_http = {kind for kind, _ in STATUSES} | {errors.CorruptError, errors.TinsmithError}
    for kind in kinds:
        category, where = page[kind.code]
        assert category == kind.category
        if kind in reach_http:
            assert str(status_of(kind("x"))) in where

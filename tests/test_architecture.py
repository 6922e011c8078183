"""The house rules that a program can check: sizes of modules and functions, tests that read their messages."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sdkd", "export", "engines")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    bodies = {node.name: (node.end_lineno or 0) - node.body[0].lineno + 1 for node in functions}
    assert {name: lines for name, lines in bodies.items() if lines > 60} == {}


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_every_raises_reads_the_message(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    raises = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "raises"]
    silent = [call.lineno for call in raises if not any(word.arg == "match" for word in call.keywords)]
    assert silent == []


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    folders = {folder.name for path in TESTS for folder in path.parents if folder.is_relative_to(ROOT / "tests")}
    skipped = pytestconfig.getini("norecursedirs")
    assert [name for name in folders for pattern in skipped if fnmatch.fnmatch(name, pattern)] == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in TESTS]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))

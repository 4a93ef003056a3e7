"""Tests mirror the source folders, and share code through tests/support alone."""

import ast
from pathlib import Path

import pytest
from tests.support.paths import ROOT

pytestmark = pytest.mark.unit

TESTS = ROOT / "tests"
SOURCES = {
    "bench": "offline/kar_bench",
    "kernels": "kernels/kar_kernels",
    "model_repository": "model_repository/kar_model_repository",
    "offline": "offline/kar_offline",
    "sidecar": "sidecar/kar_sidecar",
}
WITHOUT_SOURCES = {"docs", "end_to_end", "packaging"}
"""Tests of the whole: they have no package of their own."""
MODULES = sorted(TESTS.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, with each imported name as if it were a module of its package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_tests_share_code_through_support_alone():
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in MODULES
        for name in imported_modules(path)
        if name.startswith("tests.") and name.split(".")[1] != "support"
    }
    assert wrong == set()


def test_each_test_folder_has_its_source_folder():
    folders = {path.parent.relative_to(TESTS).parts for path in MODULES if path.name.startswith("test_")}
    assert {room for room, *_ in folders} == set(SOURCES) | WITHOUT_SOURCES
    sources = [ROOT.joinpath(SOURCES[room], *inner) for room, *inner in folders if room in SOURCES]
    assert [source for source in sources if not source.is_dir()] == []

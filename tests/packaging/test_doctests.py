"""The examples in docstrings of the source packages give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest
from tests.support.paths import ROOT

pytestmark = pytest.mark.unit

PACKAGES = (
    "kernels/kar_kernels",
    "model_repository/kar_model_repository",
    "offline/kar_bench",
    "offline/kar_offline",
    "sidecar/kar_sidecar",
)
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if ">>> " in path.read_text()]


def module_name(path: Path) -> str:
    """`kar_offline.check.facts`, from `<root>/offline/kar_offline/check/facts.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")


def test_there_are_examples():
    assert len(FILES) >= 4


@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_the_examples_of_a_module_hold(name):
    assert not doctest.testmod(importlib.import_module(name)).failed

"""Owns mutants: implementations with one wrong line, which the comparison with the reference must detect.

A test file has a table of mutants for the module that it tests: the name of a fault, the line, the wrong line.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.adaptor_problems import Problem
from torch.nn import functional as F

Mutants = Mapping[str, tuple[str, str]]
SIZES = {"users": 20, "items": 35, "hidden": 20, "out": 5, "shared": 2, "dedicated": 2}
"""Several blocks of rows of each tower, several steps of D, an even number of experts."""


def load_mutant(name: str, folder: Path, right: str = "", wrong: str = "") -> ModuleType:
    """A module of `kar_kernels`, loaded again from its text, with the line `right` replaced by `wrong`."""
    source = importlib.import_module(f"kar_kernels.{name}").__file__
    assert source is not None
    text = Path(source).read_text()
    changed = text.replace(right, wrong) if right else text
    assert (changed != text) == bool(right), f"{name}.py has changed: nothing is mutated"
    path = folder / f"{name}.py"
    path.write_text(changed)
    spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "gemm_then_fused":
        module.CHUNKS = 2  # the first chunk of the items has two blocks of rows
    return module


def assert_right(problem: Problem, name: str, module: ModuleType) -> None:
    """Fail unless the module's functions compute the result of the reference."""
    user, item, weights, shape = problem.packed()
    # Each tensor has another distance between its rows.
    user, item = F.pad(user, (0, 16))[:, :-16], F.pad(item, (0, 32))[:, :-32]
    forward: Callable = getattr(module, f"{name}_forward")
    if name == "fused_expert_pairs":
        problem.assert_exact(problem.unpack_vectors(forward(user, item, weights, shape)))
        return
    backward: Callable = getattr(module, f"{name}_backward")
    problem.assert_exact(problem.unpack_vectors(forward(user, item, weights, shape, save=False)[0]))
    out, saved = forward(user, item, weights, shape, save=True)
    problem.assert_exact(problem.unpack_vectors(out))
    gradients = backward(problem.packed_upstream, user, item, weights, shape, saved)
    problem.assert_exact(problem.unpack_gradients(gradients))


def assert_wrong(problem: Problem, name: str, module: ModuleType) -> None:
    """Fail if the comparison does not detect that the module is wrong."""
    with pytest.raises(AssertionError):
        assert_right(problem, name, module)

"""Owns the surroundings of every kernel test: the interpreter, memory full of NaN, one thread, checked launches."""

import zlib
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.support.triton_interpreter import INTERPRETS, VARIABLE, checked_launches  # first: it sets the interpreter

from tests.support.adaptor_problems import Problem, random_problem  # isort: skip


@pytest.fixture
def make_problem(request: pytest.FixtureRequest) -> Callable[..., Problem]:
    """Makes problems with random numbers of the test's own; keywords as for `random_problem`."""
    generator = torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))
    return lambda *arguments, **keywords: random_problem(generator, *arguments, **keywords)


@pytest.fixture(autouse=True)
def interpreter_variable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in this process have interpreted kernels; those that start another get it as a user would."""
    monkeypatch.delenv("KAR_ADAPTOR", raising=False)
    if INTERPRETS and not request.node.get_closest_marker("service"):
        monkeypatch.setenv(VARIABLE, "1")
    else:
        monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """New memory holds NaN, so that a test sees what a kernel leaves unwritten."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU, torch would also refuse operators without a repeatable implementation.
    torch.use_deterministic_algorithms(not request.node.get_closest_marker("gpu"))
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """One thread: matrices are small, and the interpreter's own loop takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched, in order. Every launch of every test is checked."""
    if INTERPRETS:
        with checked_launches() as names:
            yield names
    else:
        yield []

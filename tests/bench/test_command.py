"""The list of benchmarks: summaries, imports that wait until a benchmark runs, and packages that may be missing."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from kar_bench.command import BENCHMARKS, bench

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_without(blocked: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process in which some packages cannot be imported."""
    source = WITHOUT.format(blocked=blocked) + program
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=[benchmark.name for benchmark in BENCHMARKS])
def test_a_summary_is_the_first_sentence_of_the_benchmarks_help(benchmark) -> None:
    module, _, function = benchmark.function.partition(":")
    help_text = inspect.getdoc(getattr(import_module(module), function))
    assert help_text is not None
    assert help_text.splitlines()[0] == benchmark.summary


def test_an_unknown_benchmark_is_refused_with_one_that_is_like_it() -> None:
    refused = CliRunner().invoke(bench, ["indx"])
    assert refused.exit_code == 2
    assert "Did you mean 'index'" in refused.output


@pytest.mark.service
def test_help_lists_all_benchmarks_and_imports_none() -> None:
    program = (
        "from typer.testing import CliRunner; from kar_bench.command import bench\n"
        "print(CliRunner().invoke(bench, ['--help'], catch_exceptions=False).output)"
    )
    done = run_without(("torch", "numpy", "kar_offline", "kar_kernels"), program)
    assert done.returncode == 0, done.stderr
    assert all(benchmark.name in done.stdout for benchmark in BENCHMARKS)


@pytest.mark.service
def test_what_make_install_leaves_out_is_not_needed_to_load_a_benchmark() -> None:
    program = (
        "from importlib import import_module; from kar_bench.command import BENCHMARKS\n"
        "for benchmark in BENCHMARKS:\n"
        "    module, _, function = benchmark.function.partition(':')\n"
        "    print(getattr(import_module(module), function).__name__)"
    )
    done = run_without(("fuxictr", "triton", "ray"), program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [benchmark.name for benchmark in BENCHMARKS]


@pytest.mark.service
def test_a_missing_package_is_one_sentence_that_names_the_extra() -> None:
    commands = [["index", "--size", "100", "--dim", "4"], ["store"], ["quality"]]
    program = (
        "from kar_sidecar.cli import main\n"
        f"for arguments in {commands}:\n"
        "    sys.argv = ['kar', 'bench', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(end.code)"
    )
    done = run_without(("faiss", "lmdb", "matplotlib"), program)
    assert done.stdout.split() == ["1", "1", "1"]
    lines = done.stderr.strip().splitlines()
    for line, package, extra in zip(lines, ["faiss", "lmdb", "matplotlib"], ["cpu", "sidecar", "offline"], strict=True):
        assert f"install kar-sidecar[{extra}]" in line
        assert package in line.lower()

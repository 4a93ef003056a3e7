"""The implementation for processors: mutants of the formulas that it shares with `eager`, and rows in chunks."""

import pytest
from tests.support.mutants import SIZES, Mutants, assert_right, assert_wrong, load_mutant

from kar_kernels import cpu

pytestmark = pytest.mark.unit

MUTANTS: Mutants = {
    "no ReLU after the second layer": ("own.second).relu_()", "own.second)"),
    "no mask of the hidden layer backward": (
        "masked(torch.bmm(du, weights.weight2[shape.expert(tower)]), shape.each(kept.hidden))",
        "torch.bmm(du, weights.weight2[shape.expert(tower)])",
    ),
    "no mask of the values backward": ("masked(dy * gates, values)", "(dy * gates)"),
    "no mean in the softmax's gradient": ("(reward - (kept.gates * reward).sum(1, keepdim=True))", "reward"),
    "a shared expert's users forgotten": ("first_grad[block] +=", "first_grad[block] ="),
}
"""Of `kar_kernels.eager`."""


def test_the_right_implementation_passes(make_problem, tmp_path):
    assert_right(make_problem(**SIZES), "cpu", load_mutant("cpu", tmp_path))


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_line_is_seen(make_problem, tmp_path, fault):
    mutant = load_mutant("eager", tmp_path, *MUTANTS[fault])
    implementation = load_mutant("cpu", tmp_path)
    implementation.eager = mutant
    assert_wrong(make_problem(**SIZES), "cpu", implementation)


def test_takes_rows_in_chunks(make_problem, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_ROWS", 16)
    problem = make_problem(users=16, items=58)
    problem.assert_exact(problem.vectors_by("cpu"))

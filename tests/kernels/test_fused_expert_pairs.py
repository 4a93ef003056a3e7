"""The kernel `fused_expert_pairs`: its mutants, its launches, its reads and writes at row 2 ** 30."""

import pytest
import torch
from tests.support.far_rows import DIM, SIZE, USERS, WEIGHTS, accesses, last_rows, places, stand_ins
from tests.support.launch_counting import DEFAULT, Counting
from tests.support.mutants import SIZES, Mutants, assert_right, assert_wrong, load_mutant
from tests.support.triton_interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("only where triton is installed and there is no GPU", allow_module_level=True)

from kar_kernels import dispatch, fused_expert_pairs, hybrid_expert_adaptor, pack
from kar_kernels.dispatch import takes_pairs

pytestmark = pytest.mark.unit

NAME = "fused_expert_pairs"
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
MUTANTS: Mutants = {
    "no ReLU after the first layer": ("tl.maximum(hidden, 0.0)", "hidden"),
    "no ReLU after the second layer": (
        "tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)",
        "v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :]",
    ),
    "the first layer's bias of another expert": (
        "tl.load(bias1_ptr + BLOCK_GATES + expert * BLOCK_HIDDEN + hidden_offset)",
        "tl.load(bias1_ptr + expert * BLOCK_HIDDEN + hidden_offset)",
    ),
    "the right expert's second layer is the left's": ("expert + k + 1,", "expert + k,"),
    "the right expert's gate is the left's": (
        "column_of(gates, k + 1, BLOCK_GATES)",
        "column_of(gates, k, BLOCK_GATES)",
    ),
    "the right expert's rows are the left's": ("right_row = left_row + BLOCK_HIDDEN", "right_row = left_row"),
    "an even number's last expert forgotten": ("for k in range(1, SEEN, 2)", "for k in range(1, SEEN - 1, 2)"),
    "right experts forgotten": ("if k + 1 < SEEN:", "if k + 1 < 0:"),
    "expert 0 forgotten": ("result = v * column_of(gates, 0, BLOCK_GATES)[:, None]", "result = v * 0.0"),
    "items see the users' experts": ("expert = tower * (EXPERTS - SEEN)", "expert = tower * 0"),
    "items have the users' gate": (
        "gate_row = tower * (BLOCK_GATES + EXPERTS * BLOCK_HIDDEN) + gate_offset",
        "gate_row = gate_offset",
    ),
    "programs take the same blocks": ("tl.num_programs(0)", "1"),
    "a program stops after its first block": ("tl.program_id(0), blocks, tl.num", "tl.program_id(0), tl.num"),
    "items are written over users": ("(tower * users + row)[:, None] * BLOCK_OUT", "row[:, None] * BLOCK_OUT"),
    "rows that do not exist are written": (
        "tl.store(to_ptr, result, mask=(row < rows)[:, None])",
        "tl.store(to_ptr, result)",
    ),
}


def test_the_right_kernel_passes(make_problem, tmp_path):
    assert_right(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path))


# Memory that a mutant should not read holds NaN, and numpy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_line_is_seen(make_problem, tmp_path, fault):
    assert_wrong(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path, *MUTANTS[fault]))


def test_launches_one(make_problem, launches):
    packed = make_problem(**DEFAULT).packed()
    with Counting() as counting:
        fused_expert_pairs.fused_expert_pairs_forward(*packed)
    assert launches == ["fused_expert_pairs_forward_kernel"]
    assert counting.names == []


PER_EXPERT = ["fused_per_expert_forward_kernel", "fused_per_expert_reduce_kernel"]


@pytest.mark.parametrize(
    ("sizes", "gradients", "kernels"),
    [
        ({}, False, ["fused_expert_pairs_forward_kernel"]),
        ({}, True, PER_EXPERT),
        ({"users": 1, "items": 7}, False, PER_EXPERT),
        ({"shared": 1, "dedicated": 16}, False, PER_EXPERT),
    ],
    ids=["many rows", "gradients", "as many rows as few", "17 gates"],
)
def test_runs_for_many_rows_without_gradients(make_problem, launches, monkeypatch, sizes, gradients, kernels):
    monkeypatch.setattr(dispatch, "BULK_ROWS", 8)
    problem = make_problem(**{"users": 2, "items": 7, "hidden": 16} | sizes)
    user, item, *raw = problem.leaves(FP64, FP64)
    with torch.set_grad_enabled(gradients):
        vectors = hybrid_expert_adaptor(user, item, pack(*raw), path="fused")
    assert launches == kernels
    problem.assert_exact(dict(zip(("user", "item"), (out.detach() for out in vectors), strict=True)))


def test_sizes_that_registers_cannot_hold(make_problem):
    shape = make_problem().packed()[3]
    assert [dtype for dtype in (BF16, FP16, FP32, FP64) if takes_pairs(dtype, shape)] == [BF16, FP16, FP64]
    assert not takes_pairs(BF16, make_problem(shared=1, dedicated=16).packed()[3])


def test_at_a_far_row():
    given = stand_ins("user_ptr", "item_ptr", *WEIGHTS, "result_ptr")
    kernel = fused_expert_pairs.fused_expert_pairs_forward_kernel
    read, written = accesses(kernel, given, (1,), USERS, BLOCK_DIM=32)
    assert read == places(given["user_ptr"], last_rows(DIM), range(DIM))
    assert written == places(given["result_ptr"], last_rows(SIZE), range(SIZE))

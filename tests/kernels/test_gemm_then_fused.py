"""The kernel `gemm_then_fused`: its mutants, its launches, its reads and writes at row 2 ** 30."""

import pytest
import torch
from tests.support.far_rows import (
    BLOCK,
    COLUMNS,
    FIRST,
    ROWS,
    SEEN,
    SIZE,
    WIDTH,
    accesses,
    last_rows,
    places,
    stand_ins,
)
from tests.support.launch_counting import DEFAULT, Counting
from tests.support.mutants import SIZES, Mutants, assert_right, assert_wrong, load_mutant
from tests.support.triton_interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("only where triton is installed and there is no GPU", allow_module_level=True)

from kar_kernels import gemm_then_fused

pytestmark = pytest.mark.unit

NAME = "gemm_then_fused"
MUTANTS: Mutants = {
    "no ReLU after the first layer": (
        "hidden = tl.maximum(hidden, 0.0).to(w2.dtype)",
        "hidden = hidden.to(w2.dtype)",
    ),
    "no ReLU after the second layer": (
        "tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)",
        "v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :]",
    ),
    "no second bias": ("v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :]", "v"),
    "the next expert's gate": ("v * column_of(gates, k, BLOCK_GATES)", "v * column_of(gates, k + 1, BLOCK_GATES)"),
    "items have the users' second layers": (
        "expert = first_expert + k\n        w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[None, :])",
        "expert = k\n        w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[None, :])",
    ),
    "items have the users' second layers backward": (
        "(expert * BLOCK_OUT + out_offset[:, None])",
        "(k * BLOCK_OUT + out_offset[:, None])",
    ),
    "rows that do not exist are written": ("result, mask=exists)", "result)"),
    "chunks overlap": ("end = tl.minimum(begin + chunk_rows, rows)", "end = rows"),
    "the last chunk has rows that do not exist": (
        "end = tl.minimum(begin + chunk_rows, rows)",
        "end = begin + chunk_rows",
    ),
    "no mask of the hidden layer backward": ("tl.where(hidden > 0, dz, 0.0)", "dz"),
    "no mask of the values backward": ("tl.where(v > 0, dy * gate[:, None], 0.0)", "(dy * gate[:, None])"),
    "no gate backward": ("tl.where(v > 0, dy * gate[:, None], 0.0)", "tl.where(v > 0, dy, 0.0)"),
    "no mean in the softmax's gradient": ("(reward - tl.sum(gates * reward, 1)[:, None])", "reward"),
    "the hidden layer without its ReLU backward": (
        "tl.maximum(tl.load(z_ptr + z_offset, mask=exists, other=0.0), 0.0)",
        "tl.load(z_ptr + z_offset, mask=exists, other=0.0)",
    ),
    "the gate's bias of the last rows alone": ("bias_sum += tl.sum(dl, 0)", "bias_sum = tl.sum(dl, 0)"),
    "first biases of the last rows alone": ("bias1_sum += tl.sum(dz, 0)", "bias1_sum = tl.sum(dz, 0)"),
    "second biases of the last rows alone": ("bias2_sum += tl.sum(du, 0)", "bias2_sum = tl.sum(du, 0)"),
    "a shared expert's users forgotten in its first layer": (
        "first_grad[block] += z_grad",
        "first_grad[block] = z_grad",
    ),
    "a shared expert's users forgotten in first biases": (
        "bias1_grad[block] += bias1_part",
        "bias1_grad[block] = bias1_part",
    ),
    "a shared expert's users forgotten in second biases": ("bias2_grad[experts] +=", "bias2_grad[experts] ="),
    "a shared expert's users forgotten in its second layer": ("weight2_grad[experts] +=", "weight2_grad[experts] ="),
    "one chunk's part alone": ("part.sum(0)", "part[0]"),
    "the gate's gradient is not written": ("tl.store(z_grad_ptr + z_offset, dl, mask=exists)", "pass"),
}


def test_the_right_kernel_passes(make_problem, tmp_path):
    assert_right(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path))


# Memory that a mutant should not read holds NaN, and numpy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_line_is_seen(make_problem, tmp_path, fault):
    assert_wrong(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path, *MUTANTS[fault]))


def test_launches_a_product_and_a_kernel_a_tower(make_problem, launches):
    user, item, weights, shape = make_problem(**DEFAULT).packed()
    with Counting() as forward:
        out, saved = gemm_then_fused.gemm_then_fused_forward(user, item, weights, shape, save=True)
    assert launches == 2 * ["gemm_then_fused_forward_kernel"]
    assert forward.names == 2 * ["aten.addmm"]
    grad = torch.ones_like(out)
    launches.clear()
    with Counting() as backward:
        gemm_then_fused.gemm_then_fused_backward(grad, user, item, weights, shape, saved)
    assert launches == 2 * ["gemm_then_fused_backward_kernel"]
    assert backward.names.count("aten.mm") == 2


def test_computes_again_what_is_too_large_to_save(make_problem, launches, monkeypatch):
    monkeypatch.setattr(gemm_then_fused, "SAVED_ROWS", 24)
    problem = make_problem(users=58, items=7, hidden=16)
    result = problem.solve_by(NAME)
    # 58 users are three pieces, whose forward runs twice; seven items are saved.
    assert launches.count("gemm_then_fused_forward_kernel") == 3 + 1 + 3
    assert launches.count("gemm_then_fused_backward_kernel") == 3 + 1
    problem.assert_exact(result)
    problem.assert_exact(problem.vectors_by(NAME))


def test_the_forward_at_a_far_row():
    given = stand_ins("z_ptr", "weight2_ptr", "bias2_ptr", "result_ptr", "value_ptr")
    kernel = gemm_then_fused.gemm_then_fused_forward_kernel
    read, written = accesses(kernel, given, (1,), {"rows": ROWS} | COLUMNS, SAVE=True)
    assert read == places(given["z_ptr"], last_rows(WIDTH), range(WIDTH))
    assert written == (
        places(given["result_ptr"], last_rows(SIZE), range(SIZE))
        | places(given["value_ptr"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
    )


def test_the_backward_at_a_far_row():
    given = stand_ins("z_ptr", "value_ptr", "grad_ptr", "weight2_ptr", "z_grad_ptr", "part_ptr")
    sizes = {"rows": ROWS, "chunk_rows": BLOCK} | COLUMNS
    read, written = accesses(gemm_then_fused.gemm_then_fused_backward_kernel, given, (1, SEEN + 1), sizes)
    assert read == (
        places(given["z_ptr"], last_rows(WIDTH), range(WIDTH))
        | places(given["value_ptr"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
        | places(given["grad_ptr"], last_rows(SIZE), range(SIZE))
    )
    part = WIDTH + SEEN * SIZE + SEEN * SIZE * SIZE
    assert written == (
        places(given["z_grad_ptr"], last_rows(WIDTH), range(WIDTH))
        | places(given["part_ptr"], [FIRST // BLOCK * part], range(part))
    )

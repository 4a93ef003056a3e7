"""The kernel `fused_per_expert`: its mutants, its launches, its reads and writes at row 2 ** 30."""

import pytest
import torch
from tests.support.far_rows import DIM, ROWS, SEEN, SIZE, USERS, WEIGHTS, WIDTH, accesses, last_rows, places, stand_ins
from tests.support.launch_counting import DEFAULT, Counting
from tests.support.mutants import SIZES, Mutants, assert_right, assert_wrong, load_mutant
from tests.support.triton_interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("only where triton is installed and there is no GPU", allow_module_level=True)

from kar_kernels import fused_per_expert

pytestmark = pytest.mark.unit

NAME = "fused_per_expert"
MUTANTS: Mutants = {
    "no ReLU after the first layer": (
        "tl.maximum(hidden + tl.load(bias1_ptr + expert_row)[None, :], 0.0)",
        "(hidden + tl.load(bias1_ptr + expert_row)[None, :])",
    ),
    "no ReLU after the second layer": (
        "v = tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)",
        "v = v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :]",
    ),
    "no first bias": ("hidden + tl.load(bias1_ptr + expert_row)[None, :]", "hidden"),
    "no second bias": ("v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :]", "v"),
    "no bias of the gate": ("logits += tl.load(bias1_ptr + gate_row)[None, :]", "logits += 0.0"),
    "the next expert's gate": ("v * column_of(gates, k, BLOCK_GATES)", "v * column_of(gates, k + 1, BLOCK_GATES)"),
    "items see the expert before": (
        "expert = tower * (EXPERTS - SEEN) + k",
        "expert = tower * (EXPERTS - SEEN - 1) + k",
    ),
    "items have the users' gate": (
        "gate_row = tower * (BLOCK_GATES + EXPERTS * BLOCK_HIDDEN) + gate_offset  # (gates,)",
        "gate_row = gate_offset",
    ),
    "items are written over users": ("to = tower * users + row", "to = row"),
    "rows that do not exist are written": ("weighted, mask=exists)", "weighted)"),
    "rows that do not exist are saved": ("v, mask=exists)", "v)"),
    "logits of one block saved alone": ("        if k == 0:\n", "        if (k == 0) & (block == 0):\n"),
    "logits saved by all experts": ("        if k == 0:\n", "        if k >= 0:\n"),
    "partial sums read beyond the last": ("total * BLOCK_OUT + offset, mask=exists)", "total * BLOCK_OUT + offset)"),
    "rows of items are as far apart as users'": (
        "    else:\n        x_ptr, stride, rows = item_ptr, item_stride",
        "    else:\n        x_ptr, stride, rows = item_ptr, user_stride",
    ),
    "backward, rows of items are as far apart as users'": (
        "stride = user_stride if tower == USER else item_stride",
        "stride = user_stride",
    ),
    "weights' rows are as far apart as encodings'": (
        "load_tile(first_ptr, dim, expert_row",
        "load_tile(first_ptr, stride, expert_row",
    ),
    "hidden layers saved before their ReLU": (
        "hidden_offset[None, :], hidden, mask=exists)",
        "hidden_offset[None, :], hidden - 1, mask=exists)",
    ),
    "only the first step of D": (
        "for start in range(0, dim, BLOCK_DIM):",
        "for start in range(0, BLOCK_DIM, BLOCK_DIM):",
    ),
    "a partial sum forgotten": ("for k in range(1, SEEN):", "for k in range(1, SEEN - 1):"),
    "a partial sum counted twice": ("for k in range(1, SEEN):", "for k in range(0, SEEN):"),
    "no mask of the hidden layer backward": ("tl.where(h > 0, dz, 0.0)", "dz"),
    "no mask of the values backward": ("tl.where(v > 0, dy * gate[:, None], 0.0)", "(dy * gate[:, None])"),
    "no gate backward": ("tl.where(v > 0, dy * gate[:, None], 0.0)", "tl.where(v > 0, dy, 0.0)"),
    "no mean in the softmax's gradient": ("(reward - tl.sum(gates * reward, 1)[:, None])", "reward"),
    "rewards of all experts": (
        "reward = tl.where(gate_offset[None, :] == k, tl.sum(dy * v, 1)[:, None], reward)",
        "reward += tl.sum(dy * v, 1)[:, None]",
    ),
    "backward reads the items' gradient from the users": ("saved_row = tower * users + row", "saved_row = row"),
    "a shared expert's items forgotten in its first layer": (
        "(BLOCK_HIDDEN, BLOCK_DIM), SUM_DTYPE)\n            for tower in tl.static_range(2):",
        "(BLOCK_HIDDEN, BLOCK_DIM), SUM_DTYPE)\n            for tower in tl.static_range(1):",
    ),
    "a shared expert's items forgotten in its second layer": (
        "(BLOCK_OUT,), SUM_DTYPE)\n            for tower in tl.static_range(2):",
        "(BLOCK_OUT,), SUM_DTYPE)\n            for tower in tl.static_range(1):",
    ),
    "the items' expert off by one backward": (
        "k = e - tower * (EXPERTS - SEEN)",
        "k = e - tower * (EXPERTS - SEEN + 1)",
    ),
    "items' gradients with users' encodings": ("x_ptr = user_ptr if tower == USER else item_ptr", "x_ptr = user_ptr"),
    "items' gate with users' encodings": (
        "        else:\n            x_ptr, stride, rows = item_ptr",
        "        else:\n            x_ptr, stride, rows = user_ptr",
    ),
    "encodings beyond the last row": (
        "load_tile(x_ptr, stride, row, rows, column).to(dtype)",
        "load_tile(x_ptr, stride, row, rows + 16, column).to(dtype)",
    ),
    "the last block of D is not computed": ("triton.cdiv(shape.dim, tiles.dim) + 1", "shape.dim // tiles.dim"),
}


def test_the_right_kernel_passes(make_problem, tmp_path):
    assert_right(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path))


# Memory that a mutant should not read holds NaN, and numpy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_line_is_seen(make_problem, tmp_path, fault):
    assert_wrong(make_problem(**SIZES), NAME, load_mutant(NAME, tmp_path, *MUTANTS[fault]))


def test_launches_two_forward_and_one_backward(make_problem, launches):
    user, item, weights, shape = make_problem(**DEFAULT).packed()
    with Counting() as forward:
        fused_per_expert.fused_per_expert_forward(user, item, weights, shape, save=False)
    assert launches == ["fused_per_expert_forward_kernel", "fused_per_expert_reduce_kernel"]
    out, saved = fused_per_expert.fused_per_expert_forward(user, item, weights, shape, save=True)
    grad = torch.ones_like(out)
    launches.clear()
    with Counting() as backward:
        fused_per_expert.fused_per_expert_backward(grad, user, item, weights, shape, saved)
    assert launches == ["fused_per_expert_backward_kernel"]
    assert forward.names == backward.names == []


def test_the_forward_at_a_far_row():
    given = stand_ins("user_ptr", "item_ptr", *WEIGHTS, "partial_ptr", "layer_ptr", "value_ptr")
    kernel = fused_per_expert.fused_per_expert_forward_kernel
    read, written = accesses(kernel, given, (1, SEEN), USERS, BLOCK_DIM=32, SAVE=True)
    assert read == places(given["user_ptr"], last_rows(DIM), range(DIM))
    partial = [k * ROWS * SIZE + at for k in range(SEEN) for at in last_rows(SIZE)]
    assert written == (
        places(given["partial_ptr"], partial, range(SIZE))
        | places(given["layer_ptr"], last_rows(WIDTH), range(WIDTH))
        | places(given["value_ptr"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
    )


def test_the_sum_at_a_far_row():
    given = stand_ins("partial_ptr", "result_ptr")
    read, written = accesses(fused_per_expert.fused_per_expert_reduce_kernel, given, (1,), {"total": ROWS})
    partial = [k * ROWS * SIZE + at for k in range(SEEN) for at in last_rows(SIZE)]
    assert read == places(given["partial_ptr"], partial, range(SIZE))
    assert written == places(given["result_ptr"], last_rows(SIZE), range(SIZE))

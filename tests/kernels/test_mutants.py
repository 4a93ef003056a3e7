"""Kernels with one wrong line: the comparison that all tests rest on must tell each from the right one."""

import importlib.util
from pathlib import Path

import pytest
from tests.support.triton_interpreter import INTERPRETS
from torch.nn import functional as F

if not INTERPRETS:
    pytest.skip("only where triton is installed and there is no GPU", allow_module_level=True)

from kar_kernels import cpu, eager, pair, split, tail, tiles

pytestmark = pytest.mark.unit

SPLIT = {
    "no ReLU after the first layer": (
        "tl.maximum(hidden + tl.load(bias1 + expert_row)[None, :], 0.0)",
        "(hidden + tl.load(bias1 + expert_row)[None, :])",
    ),
    "no ReLU after the second layer": (
        "v = tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)",
        "v = v + tl.load(bias2 + expert * OUT + out)[None, :]",
    ),
    "no first bias": ("hidden + tl.load(bias1 + expert_row)[None, :]", "hidden"),
    "no second bias": ("v + tl.load(bias2 + expert * OUT + out)[None, :]", "v"),
    "no bias of the gate": ("logit += tl.load(bias1 + gate_row)[None, :]", "logit += 0.0"),
    "the next expert's gate": ("v * column_of(gates, k, GATE_ROWS)", "v * column_of(gates, k + 1, GATE_ROWS)"),
    "items see the expert before": (
        "expert = second * (EXPERTS - SEEN) + k",
        "expert = second * (EXPERTS - SEEN - 1) + k",
    ),
    "items have the users' gate": ("second * (GATE_ROWS + EXPERTS * HIDDEN) + gate\n    packed", "gate\n    packed"),
    "items are written over users": ("to = second * users + row", "to = row"),
    "rows that do not exist are written": ("mixed, mask=exists)", "mixed)"),
    "rows that do not exist are saved": ("v, mask=exists)", "v)"),
    "logits of one tile saved alone": ("        if k == 0:\n", "        if (k == 0) & (tile == 0):\n"),
    "logits saved by all experts": ("        if k == 0:\n", "        if k >= 0:\n"),
    "partial sums read beyond the last": ("total * OUT + at, mask=exists)", "total * OUT + at)"),
    "rows of items are as far apart as users'": (
        "x, stride, rows, second = item, item_stride",
        "x, stride, rows, second = item, user_stride",
    ),
    "backward, rows of items are as far apart as users'": (
        "stride = user_stride if second == 0 else item_stride",
        "stride = user_stride",
    ),
    "weights' rows are as far apart as encodings'": (
        "load_tile(first, dim, expert_row",
        "load_tile(first, stride, expert_row",
    ),
    "hidden layers saved before their ReLU": (
        "unit[None, :], hidden, mask=exists)",
        "unit[None, :], hidden - 1, mask=exists)",
    ),
    "only the first step of D": ("for at in range(0, dim, COLUMNS):", "for at in range(0, COLUMNS, COLUMNS):"),
    "a partial sum forgotten": ("for k in range(1, SEEN):", "for k in range(1, SEEN - 1):"),
    "a partial sum counted twice": ("for k in range(1, SEEN):", "for k in range(0, SEEN):"),
    "no mask of the hidden layer backward": ("tl.where(h > 0, dz, 0.0)", "dz"),
    "no mask of the values backward": ("tl.where(v > 0, dy * mine[:, None], 0.0)", "(dy * mine[:, None])"),
    "no gate backward": ("tl.where(v > 0, dy * mine[:, None], 0.0)", "tl.where(v > 0, dy, 0.0)"),
    "no mean in the softmax's gradient": ("(reward - tl.sum(gates * reward, 1)[:, None])", "reward"),
    "rewards of all experts": (
        "reward = tl.where(gate[None, :] == k, tl.sum(dy * v, 1)[:, None], reward)",
        "reward += tl.sum(dy * v, 1)[:, None]",
    ),
    "backward reads the items' gradient from the users": ("at = second * users + row", "at = row"),
    "a shared expert's items forgotten in its first layer": (
        "(HIDDEN, COLUMNS), SUM)\n            for second in tl.static_range(2):",
        "(HIDDEN, COLUMNS), SUM)\n            for second in tl.static_range(1):",
    ),
    "a shared expert's items forgotten in its second layer": (
        "(OUT,), SUM)\n            for second in tl.static_range(2):",
        "(OUT,), SUM)\n            for second in tl.static_range(1):",
    ),
    "the items' expert off by one backward": (
        "k = e - second * (EXPERTS - SEEN)",
        "k = e - second * (EXPERTS - SEEN + 1)",
    ),
    "items' gradients with users' encodings": ("x = user if second == 0 else item", "x = user"),
    "items' gate with users' encodings": (
        "        else:\n            x, stride, rows = item",
        "        else:\n            x, stride, rows = user",
    ),
    "encodings beyond the last row": (
        "load_tile(x, stride, row, rows, column).to(kind)",
        "load_tile(x, stride, row, rows + 16, column).to(kind)",
    ),
    "the last tile of D is not computed": ("triton.cdiv(shape.dim, tiles.columns) + 1", "shape.dim // tiles.columns"),
}
PAIR = {
    "no ReLU after the first layer": ("tl.maximum(hidden, 0.0)", "hidden"),
    "no ReLU after the second layer": (
        "tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)",
        "v + tl.load(bias2 + expert * OUT + out)[None, :]",
    ),
    "the first layer's bias of another expert": (
        "tl.load(bias1 + GATE_ROWS + expert * HIDDEN + unit)",
        "tl.load(bias1 + expert * HIDDEN + unit)",
    ),
    "the right expert's second layer is the left's": ("bias2, expert + k + 1,", "bias2, expert + k,"),
    "the right expert's gate is the left's": ("column_of(gates, k + 1, GATE_ROWS)", "column_of(gates, k, GATE_ROWS)"),
    "the right expert's rows are the left's": ("right_row = left_row + HIDDEN", "right_row = left_row"),
    "an even number's last expert forgotten": ("for k in range(1, SEEN, 2)", "for k in range(1, SEEN - 1, 2)"),
    "right experts forgotten": ("if k + 1 < SEEN:", "if k + 1 < 0:"),
    "expert 0 forgotten": ("mixed = v * column_of(gates, 0, GATE_ROWS)[:, None]", "mixed = v * 0.0"),
    "items see the users' experts": ("expert = second * (EXPERTS - SEEN)", "expert = second * 0"),
    "items have the users' gate": ("gate_row = second * (GATE_ROWS + EXPERTS * HIDDEN) + gate", "gate_row = gate"),
    "programs take the same tiles": ("tl.num_programs(0)", "1"),
    "a program stops after its first tile": ("tl.program_id(0), tiles, tl.num", "tl.program_id(0), tl.num"),
    "items are written over users": ("(second * users + row)[:, None] * OUT", "row[:, None] * OUT"),
    "rows that do not exist are written": ("tl.store(to, mixed, mask=(row < rows)[:, None])", "tl.store(to, mixed)"),
}
TAIL = {
    "no ReLU after the first layer": (
        "hidden = tl.maximum(hidden, 0.0).to(w2.dtype)",
        "hidden = hidden.to(w2.dtype)",
    ),
    "no ReLU after the second layer": (
        "tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)",
        "v + tl.load(bias2 + expert * OUT + out)[None, :]",
    ),
    "no second bias": ("v + tl.load(bias2 + expert * OUT + out)[None, :]", "v"),
    "the next expert's gate": ("v * column_of(gates, k, GATE_ROWS)", "v * column_of(gates, k + 1, GATE_ROWS)"),
    "items have the users' second layers": ("expert = first_expert + k", "expert = k"),
    "items have the users' second layers backward": ("((first_expert + k) * OUT", "(k * OUT"),
    "rows that do not exist are written": ("mixed, mask=exists)", "mixed)"),
    "chunks overlap": ("end = tl.minimum(begin + chunk_rows, rows)", "end = rows"),
    "the last chunk has rows that do not exist": (
        "end = tl.minimum(begin + chunk_rows, rows)",
        "end = begin + chunk_rows",
    ),
    "no mask of the hidden layer backward": ("tl.where(hidden > 0, dz, 0.0)", "dz"),
    "no mask of the values backward": ("tl.where(v > 0, dy * mine[:, None], 0.0)", "(dy * mine[:, None])"),
    "no gate backward": ("tl.where(v > 0, dy * mine[:, None], 0.0)", "tl.where(v > 0, dy, 0.0)"),
    "no mean in the softmax's gradient": ("(reward - tl.sum(gates * reward, 1)[:, None])", "reward"),
    "the hidden layer without its ReLU backward": (
        "tl.maximum(tl.load(z + at, mask=exists, other=0.0), 0.0)",
        "tl.load(z + at, mask=exists, other=0.0)",
    ),
    "the gate's bias of the last rows alone": ("bias_sum += tl.sum(dl, 0)", "bias_sum = tl.sum(dl, 0)"),
    "first biases of the last rows alone": ("bias1_sum += tl.sum(dz, 0)", "bias1_sum = tl.sum(dz, 0)"),
    "second biases of the last rows alone": ("bias2_sum += tl.sum(du, 0)", "bias2_sum = tl.sum(du, 0)"),
    "a shared expert's users forgotten in its first layer": (
        "first_grad[block] += z_grad",
        "first_grad[block] = z_grad",
    ),
    "a shared expert's users forgotten in first biases": ("bias1_grad[block] += biases", "bias1_grad[block] = biases"),
    "a shared expert's users forgotten in second biases": ("bias2_grad[experts] +=", "bias2_grad[experts] ="),
    "a shared expert's users forgotten in its second layer": ("weight2_grad[experts] +=", "weight2_grad[experts] ="),
    "one chunk's part alone": ("part.sum(0)", "part[0]"),
    "the gate's gradient is not written": ("tl.store(z_grad + at, dl, mask=exists)", "pass"),
}
TILES = {
    "padding is a gate": ('tl.where(column < SEEN, logit, float("-inf"))', "logit"),
    "one gate too few": ("column < SEEN", "column < SEEN - 1"),
    "gates do not sum to 1": ("power / tl.sum(power, 1)[:, None]", "power"),
    "the exponential overflows": ("logit - tl.max(logit, 1)[:, None]", "logit"),
    "rows beyond the last": ("row[:, None] < rows", "row[:, None] < rows + 16"),
}
EAGER = {
    "no ReLU after the second layer": ("own.second).relu_()", "own.second)"),
    "no mask of the hidden layer backward": (
        "masked(torch.bmm(du, weights.weight2[shape.expert(number)]), shape.each(kept.hidden))",
        "torch.bmm(du, weights.weight2[shape.expert(number)])",
    ),
    "no mask of the values backward": ("masked(dy * gates, values)", "(dy * gates)"),
    "no mean in the softmax's gradient": ("(reward - (kept.gates * reward).sum(1, keepdim=True))", "reward"),
    "a shared expert's users forgotten": ("first_grad[block] +=", "first_grad[block] ="),
}
MUTANTS = {"split": SPLIT, "pair": PAIR, "tail": TAIL, "tiles": TILES, "eager": EAGER}
MODULES = {"split": split, "pair": pair, "tail": tail, "tiles": tiles, "eager": eager, "cpu": cpu}


# Several tiles of each tower, an even number of experts.
SIZES = {"users": 20, "items": 35, "hidden": 20, "out": 5, "shared": 2, "dedicated": 2}


@pytest.fixture
def mutant(tmp_path):
    """A module of `kar_kernels`, loaded again from a changed text."""

    def load(name, old="", new=""):
        text = Path(MODULES[name].__file__).read_text()
        changed = text.replace(old, new) if old else text
        assert (changed != text) == bool(old), f"{name}.py has changed: nothing is mutated"
        path = tmp_path / f"{name}.py"
        path.write_text(changed)
        spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name == "tail":
            # Two chunks, of which the items' first has two tiles.
            module.CHUNKS = 2
        return module

    return load


def compare(problem, name, module):
    """Fail unless the module computes what the reference does."""
    user, item, weights, shape = problem.packed()
    # Rows are as far apart as those of no other tensor.
    user, item = F.pad(user, (0, 16))[:, :-16], F.pad(item, (0, 32))[:, :-32]
    if name == "pair":
        problem.assert_exact(problem.unpack_vectors(module.pair_forward(user, item, weights, shape)))
        return
    forward, backward = (getattr(module, f"{name}_{direction}") for direction in ("forward", "backward"))
    problem.assert_exact(problem.unpack_vectors(forward(user, item, weights, shape, save=False)[0]))
    out, saved = forward(user, item, weights, shape, save=True)
    problem.assert_exact(problem.unpack_vectors(out))
    problem.assert_exact(problem.unpack_gradients(backward(problem.packed_upstream, user, item, weights, shape, saved)))


@pytest.mark.parametrize("name", ["split", "pair", "tail", "cpu"])
def test_the_right_kernel_lives(make_problem, mutant, name):
    compare(make_problem(**SIZES), name, mutant(name))


# What a mutant makes of memory that it should not read is no number, and numpy says so.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, some in MUTANTS.items() for wrong in some])
def test_a_wrong_line_is_seen(make_problem, mutant, name, wrong):
    module = mutant(name, *MUTANTS[name][wrong])
    if name == "tiles":
        name, changed, module = "split", module, mutant("split")
        for function in ("softmax_rows", "column_of", "load_tile"):
            setattr(module, function, getattr(changed, function))
    elif name == "eager":
        name, changed, module = "cpu", module, mutant("cpu")
        module.eager = changed
    problem = make_problem(**SIZES, gate_scale=20000.0 if "overflows" in wrong else 1.0)
    with pytest.raises(AssertionError):
        compare(problem, name, module)

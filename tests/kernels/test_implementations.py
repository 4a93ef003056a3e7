"""Every implementation against the loop of `kar_kernels.reference`, on raw weights: vectors and all gradients."""

from dataclasses import replace

import pytest
import torch
from tests.support.adaptor_problems import PARAMETERS
from tests.support.triton_interpreter import interpreted
from torch.nn import functional as F

from kar_kernels import hybrid_expert_adaptor, pack
from kar_kernels.dispatch import takes_pairs
from kar_kernels_bench.rounding import INPUTS

pytestmark = pytest.mark.unit

KERNELS = [pytest.param(path, marks=interpreted) for path in ("fused_per_expert", "gemm_then_fused")]
PATHS = [*KERNELS, "cpu", "eager"]
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


CASES = {
    "58 rows": {"users": 58, "items": 58},
    "a slate": {"users": 1, "items": 100, "dedicated": 1},
    "nothing is padded": {"dim": 64, "hidden": 16, "out": 16, "shared": 8, "dedicated": 8},
    "several steps of D": {"dim": 130, "shared": 1, "dedicated": 1},
    "one mixture": {"shared": 4, "dedicated": 0, "one_gate": True},
    "two gates over the same experts": {"shared": 3, "dedicated": 0},
    "nothing shared": {"shared": 0, "dedicated": 3},
    "one expert": {"shared": 1, "dedicated": 0},
    "users only": {"users": 17, "items": 0, "towers": 1},
    "16 gates": {"shared": 2, "dedicated": 14, "hidden": 11},
    "17 gates": {"shared": 1, "dedicated": 16, "hidden": 11},
    "an even number": {"shared": 2, "dedicated": 2, "users": 33},
    "no user": {"users": 0},
    "no item": {"items": 0},
    "nobody": {"users": 0, "items": 0},
    # The largest logit has to be taken off before the exponential, which overflows at 710.
    "gates of 0 and 1": {"gate_scale": 20000.0},
}


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3, dtype=FP16).isnan().all()
    assert torch.empty_like(torch.ones(3, 2)).isnan().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference(make_problem, path, case):
    problem = make_problem(**CASES[case])
    problem.assert_exact(problem.solve_by(path))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference_where_nothing_needs_a_gradient(make_problem, path, case):
    problem = make_problem(**CASES[case])
    problem.assert_exact(problem.vectors_by(path))


@interpreted
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"17 gates", "nobody"}))
def test_fused_expert_pairs_equal_the_reference(make_problem, case):
    problem = make_problem(**CASES[case])
    assert takes_pairs(problem.dtype, problem.packed()[3])
    problem.assert_exact(problem.vectors_by("fused_expert_pairs"))


LAYOUTS = {
    # Strides of users' and items' rows: equal to each other or not, equal to those of other tensors or not.
    "rows of 80 and 96": lambda x, tower: F.pad(x, (0, 16 * (1 + tower)))[:, :64],
    "rows of 65": lambda x, _: F.pad(x, (0, 1))[:, :64],
    "rows of 80, from the third": lambda x, _: F.pad(x, (3, 13))[:, 3:67],
    "columns first": lambda x, _: x.t().contiguous().t(),
    "each other row": lambda x, _: x.repeat_interleave(2, 0)[::2],
    "each other column": lambda x, _: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", [*PATHS, pytest.param("fused_expert_pairs", marks=interpreted)])
def test_encodings_of_any_layout(make_problem, path, layout):
    problem = make_problem(users=3, items=18, dim=64, hidden=16, dedicated=1)
    user, item, *raw = problem.leaves(FP64, FP64)

    def adaptor(user, item, *raw):
        given = LAYOUTS[layout](user, 0), LAYOUTS[layout](item, 1)
        assert not any(one.is_contiguous() for one in given)
        return hybrid_expert_adaptor(*given, pack(*raw), path=path)

    if path != "fused_expert_pairs":  # It has no backward.
        problem.assert_exact(problem.solve(adaptor, FP64, FP64))
    with torch.no_grad():
        vectors = adaptor(user, item, *raw)
    problem.assert_exact(dict(zip(("user", "item"), vectors, strict=True)))


@pytest.mark.parametrize("path", PATHS)
def test_one_encoding_for_all_rows(make_problem, path):
    problem = make_problem(users=1, items=2, dim=64, hidden=16, dedicated=1)
    user, item, *raw = problem.leaves(FP64, FP64)
    vectors, _ = hybrid_expert_adaptor(user.expand(20, -1), item, pack(*raw), path=path)
    for row in vectors.detach():
        problem.assert_exact({"user": row.unsqueeze(0)})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_of_any_layout(make_problem, path, name):
    problem = make_problem(users=2, items=17, dim=64, hidden=16, out=16, shared=1, dedicated=1)
    at = PARAMETERS.index(name)

    def adaptor(user, item, *raw):
        strided = raw[at].transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not strided.is_contiguous()
        return hybrid_expert_adaptor(user, item, pack(*raw[:at], strided, *raw[at + 1 :]), path=path)

    problem.assert_exact(problem.solve(adaptor, FP64, FP64))


@pytest.mark.parametrize("path", PATHS)
def test_gradient_without_strides(make_problem, path):
    problem = make_problem(users=3, items=18, dim=64, hidden=16, out=16, dedicated=1)
    ones = tuple(torch.ones_like(dy) for dy in problem.upstream)
    user, item, *raw = leaves = problem.leaves(FP64, FP64)
    weights = pack(*raw)
    tensors = weights.first, weights.bias1, weights.weight2, weights.bias2
    out, _ = torch.ops.kar.hybrid_expert_adaptor(user, item, *tensors, weights.seen, path, True)
    strides = []
    out.register_hook(lambda grad: strides.append(grad.stride()))
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert strides == [(0, 0)]
    problem = replace(problem, upstream=ones)
    problem.assert_exact({f"gradient of {name}": one for name, one in zip(INPUTS, gradients, strict=True)})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("needed", ["user", "item", "weights"])
def test_only_what_is_needed_gets_a_gradient(make_problem, path, needed):
    problem = make_problem(users=3, items=5, hidden=16, dedicated=1)
    leaves = [one.detach() for one in problem.leaves(FP64, FP64)]
    wanted = PARAMETERS if needed == "weights" else (needed,)
    for name, leaf in zip(INPUTS, leaves, strict=True):
        leaf.requires_grad_(name in wanted)
    user, item, *raw = leaves
    torch.autograd.backward(hybrid_expert_adaptor(user, item, pack(*raw), path=path), problem.upstream)
    found = {name: leaf.grad for name, leaf in zip(INPUTS, leaves, strict=True) if leaf.grad is not None}
    assert tuple(found) == wanted
    problem.assert_exact({f"gradient of {name}": grad for name, grad in found.items()})


@pytest.mark.parametrize("path", PATHS)
def test_a_second_derivative_is_refused(make_problem, path):
    problem = make_problem(users=2, items=3, hidden=16, dedicated=0)
    _, _, *raw = leaves = problem.leaves(FP64, FP64)
    out, _ = hybrid_expert_adaptor(*leaves[:2], pack(*raw), path=path)
    (grad,) = torch.autograd.grad(out.square().sum(), raw[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_the_same_bits_each_time(make_problem, path, dtype):
    problem = make_problem(users=17, items=20, hidden=16, dedicated=1, dtype=dtype)
    first, second = problem.solve_by(path), problem.solve_by(path)
    for name, one in first.items():
        assert torch.equal(one, second[name]), name


# Triton's interpreter computes with numpy, which warns of each NaN.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("path", [*PATHS, pytest.param("fused_expert_pairs", marks=interpreted)])
def test_a_row_does_not_depend_on_others(make_problem, path):
    problem = make_problem(users=3, items=35, hidden=16, dedicated=1)
    user, item, weights, _ = problem.packed()
    others = torch.full_like(user, torch.nan), torch.full_like(item, torch.nan)
    others[0][1], others[1][17] = user[1], item[17]

    def run(user, item):
        return hybrid_expert_adaptor(user[:, : weights.dim], item[:, : weights.dim], weights, path=path)

    users, items = run(user, item)
    lone_users, lone_items = run(*others)
    assert torch.equal(lone_users[1], users[1])
    assert torch.equal(lone_items[17], items[17])
    assert lone_users[[0, 2]].isnan().all()


# More rows than a tile of any dtype has, and D of three steps. Where a sum of rounded products may have another sign
# than the exact one, a ReLU's gradient may be wrong by all of it: such rows are left out, or they would hide errors.
ROUNDED = {"users": 131, "items": 9, "dim": 130, "hidden": 20, "dedicated": 1, "sure_signs": True}


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        *((path, dtype) for path in ("cpu", "eager") for dtype in (FP32, FP16, BF16)),
        *(
            pytest.param(path, dtype, marks=interpreted)
            for path in ("fused_per_expert", "gemm_then_fused")
            for dtype in (FP32, FP16)
        ),
    ],
)
def test_errors_are_those_of_rounding(make_problem, path, dtype):
    problem = make_problem(**ROUNDED, dtype=dtype)
    problem.assert_within_rounding(problem.solve_by(path))
    problem.assert_within_rounding(problem.vectors_by(path))


@interpreted
@pytest.mark.parametrize("path", ["fused_per_expert", "gemm_then_fused", "fused_expert_pairs"])
def test_errors_are_those_of_rounding_where_tf32_is_allowed(make_problem, path, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        problem = make_problem(**ROUNDED, dtype=FP32)
        if path == "fused_expert_pairs":
            problem.assert_within_rounding(problem.vectors_by("fused_expert_pairs"))
        else:
            # The interpreter multiplies exactly; the library may not.
            problem.assert_within_rounding(problem.solve_by(path), tf32=path == "gemm_then_fused")
            problem.assert_within_rounding(problem.vectors_by(path), tf32=path == "gemm_then_fused")
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
@pytest.mark.parametrize("x_dtype", [FP16, FP32])
def test_errors_of_fused_expert_pairs_are_those_of_rounding(make_problem, x_dtype):
    problem = make_problem(**ROUNDED, dtype=FP16, x_dtype=x_dtype)
    problem.assert_within_rounding(problem.vectors_by("fused_expert_pairs"))


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("cpu", BF16),
        ("eager", BF16),
        *(pytest.param(path, FP16, marks=interpreted) for path in ("fused_per_expert", "gemm_then_fused")),
    ],
)
def test_encodings_of_another_dtype(make_problem, path, dtype):
    problem = make_problem(**ROUNDED, dtype=dtype, x_dtype=FP32)
    problem.assert_within_rounding(problem.solve_by(path))
    problem.assert_within_rounding(problem.vectors_by(path))

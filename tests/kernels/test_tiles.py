"""What kernels share: its mutants, seen through `fused_per_expert`, and the precision of dots."""

import pytest
import torch
from tests.support.mutants import SIZES, Mutants, assert_wrong, load_mutant
from tests.support.triton_interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("only where triton is installed and there is no GPU", allow_module_level=True)

from kar_kernels import tiles

pytestmark = pytest.mark.unit

SHARED = ("softmax_rows", "column_of", "load_tile")
MUTANTS: Mutants = {
    "padding is a gate": ('tl.where(column < SEEN, logits, float("-inf"))', "logits"),
    "one gate too few": ("column < SEEN", "column < SEEN - 1"),
    "gates do not sum to 1": ("powers / tl.sum(powers, 1)[:, None]", "powers"),
    "the exponential overflows": ("logits - tl.max(logits, 1)[:, None]", "logits"),
    "rows beyond the last": ("row[:, None] < rows", "row[:, None] < rows + 16"),
}


# Memory that a mutant should not read holds NaN, and numpy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_line_is_seen(make_problem, tmp_path, fault):
    mutant = load_mutant("tiles", tmp_path, *MUTANTS[fault])
    kernel = load_mutant("fused_per_expert", tmp_path)
    for function in SHARED:
        setattr(kernel, function, getattr(mutant, function))
    problem = make_problem(**SIZES, gate_scale=20000.0 if "overflows" in fault else 1.0)
    assert_wrong(problem, "fused_per_expert", kernel)


@pytest.mark.parametrize(
    ("allowed", "kinds"),
    [("highest", ["half", "half", "tf32x3", "double"]), ("high", ["half", "half", "tf32", "double"])],
)
def test_how_weights_are_multiplied(allowed, kinds):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        assert [tiles.arithmetic(dtype) for dtype in dtypes] == kinds
    finally:
        torch.set_float32_matmul_precision(before)

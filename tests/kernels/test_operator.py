"""The operator as torch sees it: its schema, its shapes without data, `torch.compile`, and refusals."""

import dataclasses
import os
import shutil

import pytest
import torch
from tests.support.triton_interpreter import interpreted
from torch._dynamo.testing import CompileCounterWithBackend

from kar_kernels import hybrid_expert_adaptor, operator, pack

pytestmark = pytest.mark.unit

KERNELS = [pytest.param(path, marks=interpreted) for path in ("fused_per_expert", "gemm_then_fused")]
PATHS = [*KERNELS, "cpu", "eager"]
FP64, FP32, FP16 = torch.float64, torch.float32, torch.float16
SMALL = {"users": 3, "items": 6, "hidden": 16, "dedicated": 1}


PER_EXPERT = [f"fused_per_expert_{step}_kernel" for step in ("forward", "reduce", "backward")]
GEMM = [f"gemm_then_fused_{step}_kernel" for step in ("forward", "forward", "backward", "backward")]
LAUNCHED = {"fused_per_expert": PER_EXPERT, "gemm_then_fused": GEMM, "fused": PER_EXPERT, "tail": GEMM}
"""Kernels launched, by values of KAR_ADAPTOR: "fused" suits the rows, "tail" is gemm_then_fused's former name."""


def arguments(problem, path, *, save):
    user, item, weights, _ = problem.packed()
    tensors = [user, item, weights.first, weights.bias1, weights.weight2, weights.bias2]
    return (*(one.requires_grad_(save) for one in tensors), weights.seen, path, save)


@pytest.mark.parametrize("rows", [(3, 6), (0, 4), (0, 0)])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_opcheck(make_problem, path, save, rows):
    problem = make_problem(**SMALL | dict(zip(("users", "items"), rows, strict=True)))
    # With no rows, torch's own check cannot make a dynamic shape of them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.kar.hybrid_expert_adaptor.default,
        arguments(problem, path, save=save),
        test_utils=checks if rows == (3, 6) else checks[:3],
    )


@pytest.mark.parametrize(("dtype", "x_dtype"), [(FP64, FP64), (FP16, FP16), (FP16, FP32)])
@pytest.mark.parametrize("path", PATHS)
def test_opcheck_of_the_backward(make_problem, path, dtype, x_dtype):
    problem = make_problem(**SMALL, dtype=dtype, x_dtype=x_dtype)
    *tensors, seen, _, _ = arguments(problem, path, save=False)
    torch.library.opcheck(
        torch.ops.kar.hybrid_expert_adaptor.default, (*tensors, seen, path, True), test_utils="test_faketensor"
    )
    out, saved = torch.ops.kar.hybrid_expert_adaptor(*tensors, seen, path, True)
    torch.library.opcheck(
        torch.ops.kar.hybrid_expert_adaptor_backward.default,
        (torch.ones_like(out), *tensors, saved, seen, path),
        test_utils=("test_schema", "test_faketensor"),
    )


@interpreted
@pytest.mark.parametrize("rows", [(5, 6), (6, 7), (7, 5)])
def test_opcheck_of_what_gemm_then_fused_saves(make_problem, monkeypatch, rows):
    from kar_kernels import gemm_then_fused

    monkeypatch.setattr(gemm_then_fused, "SAVED_ROWS", 6)
    problem = make_problem(**SMALL | dict(zip(("users", "items"), rows, strict=True)))
    *tensors, seen, _, _ = arguments(problem, "gemm_then_fused", save=False)
    torch.library.opcheck(
        torch.ops.kar.hybrid_expert_adaptor.default,
        (*tensors, seen, "gemm_then_fused", True),
        test_utils="test_faketensor",
    )


def adaptor(path):
    return lambda user, item, *raw: hybrid_expert_adaptor(user, item, pack(*raw), path=path)


@pytest.fixture
def compiler():
    """`torch.compile`, without the code that it compiled in other tests."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.parametrize("path", [None, *PATHS])
def test_compiled_equals_eager(make_problem, compiler, path):
    problem = make_problem(**SMALL)
    problem.assert_exact(problem.solve(compiler(adaptor(path), fullgraph=True, backend="aot_eager"), FP64, FP64))


# Torch's own compiler uses deprecated parts of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="inductor needs a C++ compiler")
@torch._inductor.config.patch(cpp_cache_precompile_headers=False)  # Four compilations do not repay it.
@pytest.mark.parametrize("path", [None, pytest.param("fused_per_expert", marks=interpreted)])
def test_compiled_by_inductor_equals_eager(make_problem, compiler, path):
    problem = make_problem(**SMALL)
    problem.assert_exact(problem.solve(compiler(adaptor(path), fullgraph=True), FP64, FP64))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("path", [None, *PATHS])
def test_compiled_once_for_any_number_of_rows(make_problem, compiler, path, gradients):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiler(adaptor(path), fullgraph=True, backend=counter)
    # No number of rows equals another size, which torch would take for the same.
    for users, items in ((9, 11), (12, 21), (10, 13), (8, 15)):
        problem = make_problem(**SMALL | {"users": users, "items": items})
        if gradients:
            problem.assert_exact(problem.solve(compiled, FP64, FP64))
        else:
            with torch.no_grad():
                vectors = compiled(*problem.leaves(FP64, FP64))
            problem.assert_exact(dict(zip(("user", "item"), vectors, strict=True)))
    # Once for the first number, once for all others.
    assert counter.frame_count == 2


@pytest.mark.parametrize("path", PATHS)
def test_rows_may_be_declared_dynamic(make_problem, compiler, path):
    problem = make_problem(**SMALL | {"users": 9, "items": 11})
    user, item, *raw = problem.leaves(FP64, FP64)
    for one in (user, item):
        # Torch refuses where the code takes their number for a constant.
        torch._dynamo.mark_dynamic(one, 0)
    vectors = compiler(adaptor(path), fullgraph=True, backend="aot_eager")(user, item, *raw)
    problem.assert_exact(dict(zip(("user", "item"), (one.detach() for one in vectors), strict=True)))


@pytest.mark.parametrize("x", [torch.ones(2, 49), torch.ones(2, 64), torch.ones(50), torch.ones(1, 2, 50)])
@pytest.mark.parametrize("tower", [0, 1])
def test_encodings_of_another_size_are_refused(make_problem, x, tower):
    _, _, weights, _ = make_problem(**SMALL, dtype=FP32).packed()
    given = [torch.ones(2, 50), torch.ones(2, 50)]
    given[tower] = x
    sizes = ", ".join(map(str, x.shape))
    with pytest.raises(ValueError, match=rf"encodings are \[{sizes}\]: this adaptor takes \[rows, 50\]"):
        hybrid_expert_adaptor(*given, weights)


def test_unpacked_weights_are_refused(make_problem):
    user, item, weights, _ = make_problem(**SMALL).packed()
    with pytest.raises(ValueError, match="use `pack`"):
        hybrid_expert_adaptor(user, item, dataclasses.replace(weights, first=weights.first[1:]))


@pytest.mark.parametrize("gradients", [True, False])
def test_an_unknown_path_is_refused(make_problem, gradients):
    problem = make_problem(**SMALL)
    user, item, *raw = problem.leaves(FP64, FP64)
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(
            ValueError, match=r"split.*fused, fused_per_expert, fused_expert_pairs, gemm_then_fused, cpu, eager"
        ),
    ):
        hybrid_expert_adaptor(user, item, pack(*raw), path="split")


@interpreted
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("path", ["fused", "fused_per_expert", "gemm_then_fused"])
def test_a_path_that_cannot_run_is_refused(make_problem, monkeypatch, path, gradients):
    problem = make_problem(**SMALL)
    user, item, *raw = problem.leaves(torch.bfloat16, torch.bfloat16)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
            hybrid_expert_adaptor(user, item, pack(*raw), path=path)
        monkeypatch.delenv("TRITON_INTERPRET")
        user, item, *raw = problem.leaves(FP64, FP64)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            hybrid_expert_adaptor(user, item, pack(*raw), path=path)


@pytest.mark.parametrize("named", [*(pytest.param(name, marks=interpreted) for name in LAUNCHED), "cpu", "eager"])
def test_the_environment_names_the_path(make_problem, monkeypatch, launches, named):
    monkeypatch.setenv("KAR_ADAPTOR", named)
    problem = make_problem(**SMALL)
    problem.assert_exact(problem.solve_by(None))
    assert launches == LAUNCHED.get(named, [])


def test_the_processor_runs_cpu(make_problem, launches, monkeypatch):
    called = []
    forward, backward = operator.cpu.cpu_forward, operator.cpu.cpu_backward
    monkeypatch.setattr(operator.cpu, "cpu_forward", lambda *a, **k: called.append("forward") or forward(*a, **k))
    monkeypatch.setattr(operator.cpu, "cpu_backward", lambda *a, **k: called.append("backward") or backward(*a, **k))
    problem = make_problem(**SMALL)
    problem.assert_exact(problem.solve_by(None))
    assert (called, launches) == (["forward", "backward"], [])


@pytest.mark.parametrize("path", PATHS)
def test_runs_in_inference_mode(make_problem, path):
    problem = make_problem(**SMALL)
    with torch.inference_mode():
        vectors = problem.vectors_by(path)
    problem.assert_exact(vectors)

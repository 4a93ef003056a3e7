"""How many kernels a forward and a backward launch, at the default sizes."""

import re
from dataclasses import replace

import pytest
import torch
from tests.support.launch_counting import DEFAULT, Counting
from tests.support.triton_interpreter import interpreted
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from kar_kernels import HybridExpertAdaptor, hybrid_expert_adaptor
from kar_kernels_bench.forms import baseline
from kar_kernels_bench.processor import has_compiler

pytestmark = pytest.mark.unit


def test_counting_by_hand():
    x = torch.ones(2, 3)
    with Counting() as counting:
        torch.relu(x.t()[1:] + 1).unsqueeze(0).new_empty(3)
        torch.promote_types(x.dtype, torch.float64)
        x.split([1, 1])[0].mul_(2)
    assert counting.names == ["aten.add", "aten.relu", "aten.mul_"]


def test_baseline_loop_launches_as_many_as_nn_linear_would():
    adaptor = HybridExpertAdaptor(64)
    form = baseline("eager", adaptor)
    x = torch.ones(3, 64), torch.ones(4, 64)
    with Counting() as forward:
        outs = form.run(*x)
    loss = outs[0].sum() + outs[1].sum()
    with Counting() as backward:
        torch.autograd.grad(loss, form.parameters)
    # A tower: gate and softmax, stack and weighted sum, an expert two products and two ReLUs.
    assert len(forward.names) == 2 * (2 + 2 + 7 * 4)
    assert len(backward.names) >= 80


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler here")
@torch._inductor.config.patch(fx_graph_cache=False)  # Inductor writes no code that it has in its cache.
@pytest.mark.parametrize(("name", "products"), [("compiled", 2 * (1 + 7 * 2)), ("compiled concatenated", 2 * 3)])
def test_compiled_baselines_launch_more_than_the_fused_kernel_and_fewer_than_eager(name, products, monkeypatch):
    """Inductor's code for a processor: its products are those of a GPU, its fused kernels may be a few more or less."""
    form, codes = baseline(name, HybridExpertAdaptor(64)), []

    def write(graph):
        codes.append(graph.codegen()[0].value)
        raise RuntimeError("written, not compiled")  # to compile it takes most of a minute

    monkeypatch.setattr(GraphLowering, "compile_to_module", write)
    with torch.no_grad(), pytest.raises(InductorError, match="written, not compiled"):
        form.run(torch.ones(3, 64), torch.ones(4, 64))
    body = codes[0][codes[0].index("def call(") :]
    calls = re.findall(r"^\s+(extern_kernels|cpp_fused)\w*(?:\.\w+)?\(", body, re.MULTILINE)
    assert calls.count("extern_kernels") == products
    assert products < len(calls) < 64


def test_loop_launches_more_than_a_hundred(make_problem):
    problem = make_problem(**DEFAULT)
    leaves = problem.leaves(torch.float32, torch.float32)
    with Counting() as forward:
        outs = problem.loop(*leaves)
    with Counting() as backward:
        torch.autograd.backward(outs, [dy.float() for dy in problem.upstream])
    # A tower: gate 3, sum 1, an expert 8.
    assert len(forward.names) == 2 * (3 + 1 + 7 * 8)
    assert len(backward.names) >= 80


@interpreted
def test_operator_adds_nothing_to_the_kernels_launches(make_problem, launches):
    """Packed weights in, aligned encodings in, no padding: the case of a server."""
    user, item, weights, _ = make_problem(**DEFAULT).packed()
    with Counting() as counting:
        hybrid_expert_adaptor(user, item, weights, path="fused_per_expert")
    assert len(launches) == 2
    assert counting.names == []


@interpreted
def test_operator_adds_little_to_the_backward(make_problem, launches):
    """Packed weights that need gradients, aligned encodings that do not: the case of training, without packing."""
    problem = make_problem(**DEFAULT)
    user, item, weights, _ = problem.packed()
    tensors = {name: getattr(weights, name).requires_grad_() for name in ("first", "bias1", "weight2", "bias2")}
    outs = hybrid_expert_adaptor(user, item, replace(weights, **tensors), path="fused_per_expert")
    launches.clear()
    with Counting() as counting:
        torch.autograd.grad(outs, list(tensors.values()), problem.upstream)
    assert launches == ["fused_per_expert_backward_kernel"]
    # Both towers' gradients become one tensor; nothing else is to be filled or added.
    assert counting.names == ["aten.cat", "kar.hybrid_expert_adaptor_backward"]

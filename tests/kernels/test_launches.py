"""How many kernels a forward and a backward launch, at the default sizes."""

import re
from dataclasses import replace

import pytest
import torch
from tests.support.triton_interpreter import INTERPRETS, interpreted
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from kar_kernels import HybridExpertAdaptor, hybrid_expert_adaptor
from kar_kernels.benchmark.forms import baseline
from kar_kernels.benchmark.processor import has_compiler

pytestmark = pytest.mark.unit

if INTERPRETS:
    from kar_kernels import pair, split, tail

DEFAULT = {"users": 3, "items": 4, "dim": 64, "hidden": 128, "out": 32}


ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")


class Counting(TorchDispatchMode):
    """Names the operators that would launch a kernel: all but those that give views, new memory, or no tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        computes = all(
            "Tensor" in str(one.type) and (one.alias_info is None or one.alias_info.is_write) for one in returns
        )
        if computes and func.overloadpacket.__name__ not in ALLOCATING:
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


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
@pytest.mark.parametrize(("name", "products"), [("compiled", 2 * (1 + 7 * 2)), ("compiled concatenated", 2 * 3)])
def test_compiled_baselines_launch_more_than_the_fused_kernel_and_fewer_than_eager(name, products):
    """Inductor's code for a processor: its products are those of a GPU, its fused kernels may be a few more or less."""
    form = baseline(name, HybridExpertAdaptor(64))
    with torch.no_grad():
        _, codes = run_and_get_code(form.run, torch.ones(3, 64), torch.ones(4, 64))
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
def test_fused_launches_two_forward_and_one_backward(make_problem, launches):
    problem = make_problem(**DEFAULT)
    user, item, weights, shape = problem.packed()
    with Counting() as forward:
        split.split_forward(user, item, weights, shape, save=False)
    assert launches == ["split_forward_kernel", "split_reduce_kernel"]
    launches.clear()
    out, saved = split.split_forward(user, item, weights, shape, save=True)
    grad = torch.ones_like(out)
    launches.clear()
    with Counting() as backward:
        split.split_backward(grad, user, item, weights, shape, saved)
    assert launches == ["split_backward_kernel"]
    assert forward.names == backward.names == []


@interpreted
def test_pair_launches_one(make_problem, launches):
    packed = make_problem(**DEFAULT).packed()
    with Counting() as counting:
        pair.pair_forward(*packed)
    assert launches == ["pair_forward_kernel"]
    assert counting.names == []


@interpreted
def test_tail_launches_a_product_and_a_kernel_a_tower(make_problem, launches):
    user, item, weights, shape = make_problem(**DEFAULT).packed()
    with Counting() as forward:
        out, saved = tail.tail_forward(user, item, weights, shape, save=True)
    assert launches == 2 * ["tail_forward_kernel"]
    assert forward.names == 2 * ["aten.addmm"]
    grad = torch.ones_like(out)
    launches.clear()
    with Counting() as backward:
        tail.tail_backward(grad, user, item, weights, shape, saved)
    assert launches == 2 * ["tail_backward_kernel"]
    assert backward.names.count("aten.mm") == 2


@interpreted
def test_operator_adds_nothing_to_the_kernels_launches(make_problem, launches):
    """Packed weights in, aligned encodings in, no padding: what a server runs."""
    user, item, weights, _ = make_problem(**DEFAULT).packed()
    with Counting() as counting:
        hybrid_expert_adaptor(user, item, weights, path="fused")
    assert len(launches) == 2
    assert counting.names == []


@interpreted
def test_operator_adds_little_to_the_backward(make_problem, launches):
    """Packed weights that need gradients, aligned encodings that do not: what training runs, without packing."""
    problem = make_problem(**DEFAULT)
    user, item, weights, _ = problem.packed()
    tensors = {name: getattr(weights, name).requires_grad_() for name in ("first", "bias1", "weight2", "bias2")}
    outs = hybrid_expert_adaptor(user, item, replace(weights, **tensors), path="fused")
    launches.clear()
    with Counting() as counting:
        torch.autograd.grad(outs, list(tensors.values()), problem.upstream)
    assert launches == ["split_backward_kernel"]
    # Both towers' gradients become one tensor; nothing else is to be filled or added.
    assert counting.names == ["aten.cat", "kar.hybrid_expert_adaptor_backward"]

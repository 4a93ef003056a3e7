"""Compiled kernels on a GPU, bfloat16 among them, differ from float64 by no more than rounding explains."""

import pytest
import torch

from kar_kernels.adaptor import HybridExpertAdaptor
from kar_kernels.operator import hybrid_expert_adaptor
from kar_kernels_bench.verification import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def test_every_kernel_is_within_rounding():
    assert check(torch.device("cuda", 0)) == []


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_exact_and_tf32_products(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert check(torch.device("cuda", 0)) == []
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_operator_runs_in_a_cuda_graph_and_compiled():
    adaptor = HybridExpertAdaptor(768).cuda().bfloat16()
    weights = adaptor.packed().to(torch.bfloat16)
    user, item = (torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16) for rows in (1, 100))
    with torch.no_grad():
        expected = hybrid_expert_adaptor(user, item, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = hybrid_expert_adaptor(user, item, weights)
        graph.replay()
        compiled = torch.compile(hybrid_expert_adaptor, fullgraph=True)(user, item, weights)
    for one, other, right in zip(found, compiled, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=0)
        torch.testing.assert_close(other, right, rtol=0, atol=0)


def test_another_number_of_rows_compiles_nothing():
    from kar_kernels import fused_per_expert

    adaptor = HybridExpertAdaptor(768).cuda().bfloat16().freeze()
    for users, items in ((1, 100), (1, 1), (16, 16), (3, 17), (2, 112)):
        x = {"user": torch.randn(users, 768).cuda().bfloat16(), "item": torch.randn(items, 768).cuda().bfloat16()}
        adaptor.adapt({tower: (one, torch.ones(len(one), dtype=torch.bool).cuda()) for tower, one in x.items()})
    caches = [
        cache
        for device in fused_per_expert.fused_per_expert_forward_kernel.device_caches.values()
        for cache in device[:1]
    ]
    assert all(len(cache) <= 1 for cache in caches)

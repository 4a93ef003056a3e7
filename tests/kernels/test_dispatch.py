import logging

import pytest
import torch

from kar_kernels import dispatch
from kar_kernels.dispatch import Choice, choose
from kar_kernels.layout import Shape

pytestmark = pytest.mark.unit

GPU, CPU = torch.device("cuda"), torch.device("cpu")
HALF, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def shape(dim=768, hidden=128, out=32, gate_rows=16):
    return Shape(dim, experts=12, seen=7, hidden=hidden, out=out, gate_rows=gate_rows)


def chosen(dtype=HALF, rows=512, *, device=GPU, training=False, **sizes):
    return choose(device, dtype, shape(**sizes), rows, training=training)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """A machine with Triton and a Hopper chip, outside of the interpreter."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chip(monkeypatch, (9, 0))


def chip(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_processor():
    assert chosen(device=CPU) == Choice("cpu", "tensors are on the processor")
    assert chosen(FP64, device=CPU).path == "cpu"
    assert chosen(device=CPU, rows=10**7, training=True, hidden=4096).path == "cpu"


@pytest.mark.parametrize(
    ("of", "path"),
    [
        ({}, "fused_per_expert"),
        ({"rows": 4096, "dim": 4096}, "fused_per_expert"),
        ({"rows": 4097, "dim": 4096}, "gemm_then_fused"),
        ({"rows": 4097, "dim": 1024}, "fused_expert_pairs"),
        ({"rows": 10**7, "dim": 1024}, "fused_expert_pairs"),
        ({"rows": 4097, "dim": 1088}, "gemm_then_fused"),
        ({"rows": 16384, "training": True, "dim": 4096}, "fused_per_expert"),
        ({"rows": 16385, "training": True}, "gemm_then_fused"),
        ({"dtype": torch.float16}, "fused_per_expert"),
        ({"dtype": FP64}, "eager"),
        ({"hidden": 128, "out": 32, "gate_rows": 32}, "fused_per_expert"),
        ({"hidden": 256}, "eager"),
        ({"out": 64}, "eager"),
        ({"gate_rows": 64}, "eager"),
        ({"device": torch.device("mps")}, "eager"),
    ],
)
def test_choice_on_a_gpu(of, path):
    assert chosen(**of).path == path


def test_reasons_name_what_decides():
    assert chosen(hidden=256, out=64).reason == "there are no kernels for hidden 256, out 64"
    assert chosen(FP64).reason == "there are no tensor-core kernels for float64"
    assert chosen(device=torch.device("mps")).reason == "there are no kernels for mps"
    assert chosen(rows=16385, training=True).reason == "more than 16384 rows to train on"
    assert (
        chosen(rows=4097, dim=4096).reason
        == "more than 4096 rows, and more than 1024 components, which the L2 cache does not hold"
    )
    reason = "more than 4096 rows, and two experts' sums do not fit into the registers"
    assert chosen(FP32, rows=4097).reason == reason
    assert chosen(rows=4097, gate_rows=32).reason == reason
    assert chosen().reason == "a GPU with tensor cores"


def test_an_old_chip(monkeypatch):
    chip(monkeypatch, (7, 5))
    assert chosen() == Choice("eager", "kernels are compiled for compute capability 8.0 and above")
    chip(monkeypatch, (8, 0))
    assert chosen().path == "fused_per_expert"


@pytest.mark.parametrize(
    ("capability", "allowed", "path"),
    [
        ((8, 9), "highest", "gemm_then_fused"),
        ((8, 9), "high", "fused_per_expert"),
        ((9, 0), "highest", "fused_per_expert"),
        ((10, 0), "highest", "fused_per_expert"),
    ],
)
def test_exact_float32_needs_registers(monkeypatch, precision, capability, allowed, path):
    chip(monkeypatch, capability)
    precision(allowed)
    assert chosen(FP32).path == path
    assert chosen(HALF).path == "fused_per_expert"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert chosen() == Choice("eager", "triton is not installed")
    assert chosen(device=CPU).path == "cpu"


@pytest.mark.parametrize("named", ["fused_per_expert", "gemm_then_fused", "eager"])
def test_the_environment_overrides_on_a_gpu(monkeypatch, named):
    monkeypatch.setenv("KAR_ADAPTOR", named)
    for of in ({}, {"rows": 10**6, "training": True}, {"rows": 10**6, "dim": 4096}):
        assert chosen(**of) == Choice(named, "KAR_ADAPTOR says so")


def test_fused_expert_pairs_by_the_environment(monkeypatch):
    monkeypatch.setenv("KAR_ADAPTOR", "fused_expert_pairs")
    assert chosen(rows=1) == Choice("fused_expert_pairs", "KAR_ADAPTOR says so")
    with pytest.raises(ValueError, match="KAR_ADAPTOR=fused_expert_pairs cannot run: it has no backward"):
        chosen(training=True)
    with pytest.raises(ValueError, match="cannot run: two experts' sums do not fit into the registers"):
        chosen(gate_rows=32)


def test_fused_is_the_fused_kernel_that_suits_the_rows(monkeypatch):
    monkeypatch.setenv("KAR_ADAPTOR", "fused")
    assert chosen(rows=4096) == Choice("fused_per_expert", "KAR_ADAPTOR says so")
    assert chosen(rows=10**6, dim=4096) == Choice("fused_expert_pairs", "KAR_ADAPTOR says so")
    assert chosen(rows=10**6, training=True) == Choice("fused_per_expert", "KAR_ADAPTOR says so")
    assert chosen(rows=10**6, gate_rows=32) == Choice("fused_per_expert", "KAR_ADAPTOR says so")


def test_the_former_name_of_gemm_then_fused(monkeypatch):
    monkeypatch.setenv("KAR_ADAPTOR", "tail")
    assert chosen() == Choice("gemm_then_fused", "KAR_ADAPTOR says so")


@pytest.mark.parametrize("named", ["cpu", "eager"])
def test_the_environment_overrides_on_the_processor(monkeypatch, named):
    monkeypatch.setenv("KAR_ADAPTOR", named)
    assert chosen(device=CPU) == Choice(named, "KAR_ADAPTOR says so")


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("fused", "fused_per_expert"),
        ("fused_per_expert", "fused_per_expert"),
        ("tail", "gemm_then_fused"),
        ("gemm_then_fused", "gemm_then_fused"),
    ],
)
def test_the_environment_overrides_in_the_interpreter(monkeypatch, named, path):
    monkeypatch.setenv("KAR_ADAPTOR", named)
    with pytest.raises(ValueError, match=f"KAR_ADAPTOR={named} cannot run: .*on the processor with TRITON_INTERPRET=1"):
        chosen(FP32, device=CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (FP64, FP32, torch.float16):
        assert chosen(dtype, device=CPU).path == path
    with pytest.raises(ValueError, match=f"KAR_ADAPTOR={named} cannot run: .*interpreter computes bfloat16 wrongly"):
        chosen(HALF, device=CPU)


def test_an_empty_override_is_none(monkeypatch):
    monkeypatch.setenv("KAR_ADAPTOR", "")
    assert chosen().path == "fused_per_expert"


@pytest.mark.parametrize("device", [CPU, GPU])
def test_an_unknown_override_is_refused(monkeypatch, device):
    monkeypatch.setenv("KAR_ADAPTOR", "pair")
    with pytest.raises(
        ValueError,
        match="KAR_ADAPTOR=pair is no implementation: choose from fused, fused_per_expert, fused_expert_pairs, gemm",
    ):
        chosen(device=device)


@pytest.mark.parametrize(
    ("named", "of", "text"),
    [
        ("cpu", {}, "KAR_ADAPTOR=cpu, but the tensors are on cuda: leave it out"),
        ("fused", {"dtype": FP64}, "KAR_ADAPTOR=fused cannot run: there are no tensor-core kernels for float64"),
        (
            "gemm_then_fused",
            {"dtype": FP64},
            "KAR_ADAPTOR=gemm_then_fused cannot run: there are no tensor-core kernels for float64",
        ),
        ("tail", {"hidden": 512}, "KAR_ADAPTOR=tail cannot run: there are no kernels for hidden 512"),
    ],
)
def test_an_impossible_override_is_refused(monkeypatch, named, of, text):
    monkeypatch.setenv("KAR_ADAPTOR", named)
    with pytest.raises(ValueError, match=text):
        chosen(**of)


def test_an_override_that_would_spill_is_refused(monkeypatch, precision):
    chip(monkeypatch, (8, 0))
    precision("highest")
    monkeypatch.setenv("KAR_ADAPTOR", "fused")
    with pytest.raises(ValueError, match=r"KAR_ADAPTOR=fused cannot run: exact float32 .* compute capability 9\.0"):
        chosen(FP32)
    monkeypatch.setenv("KAR_ADAPTOR", "gemm_then_fused")
    assert chosen(FP32).path == "gemm_then_fused"


def test_a_choice_is_logged_once(monkeypatch, caplog):
    # A choice that no other test makes: a process logs each choice once.
    with caplog.at_level(logging.INFO, "kar_kernels"):
        for _ in range(3):
            chosen(gate_rows=4096)
        chosen(gate_rows=8192)
    assert caplog.messages == [
        "adaptor runs eager: there are no kernels for gate_rows 4096",
        "adaptor runs eager: there are no kernels for gate_rows 8192",
    ]

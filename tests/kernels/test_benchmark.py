"""The benchmark runs end to end with interpreted kernels, and its model of the work agrees with counts by hand."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from tests.support.adaptor_problems import adaptor_excesses
from tests.support.paths import ROOT

from kar_kernels.adaptor import TOWERS, HybridExpertAdaptor
from kar_kernels_bench import processor
from kar_kernels_bench.cases import TINY, Case
from kar_kernels_bench.forms import baseline
from kar_kernels_bench.gpu import measure_gpu
from kar_kernels_bench.report import default_shape, kernel_table, write_block
from kar_kernels_bench.roofline import H100, forward_work
from kar_kernels_bench.verdict import verdict
from kar_kernels_bench.verification import check

SCRIPT = ROOT / "kernels" / "benchmarks" / "run_on_gpu.sh"


@pytest.mark.service
def test_the_gpu_script_runs_with_interpreted_kernels(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: run the script without --tiny")
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [SCRIPT, tmp_path, "--tiny"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cuda.json").read_text())
    seen = {(row["implementation"], row["direction"]) for row in report["cuda"]}
    assert {
        (form, way)
        for form in ("eager", "fused_per_expert", "gemm_then_fused")
        for way in ("forward", "backward", "both")
    } <= seen
    assert ("fused_expert_pairs", "forward") in seen
    assert report["failed"] == [] == report["left_out"]
    assert all(row["median_ms"] > 0 for row in report["cuda"])
    lines = list(csv.DictReader((tmp_path / "cuda.csv").read_text().splitlines()))
    assert len(lines) == len(report["cuda"])
    assert {line["device"] for line in lines} == {"interpreter"}
    assert (tmp_path / "speedup.png").stat().st_size > 10_000
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "operator over the best unfused baseline" in done.stdout


@pytest.mark.service
def test_the_gpu_benchmark_refuses_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", "kar_kernels_bench", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "use --tiny" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.unit
def test_a_wrong_kernel_is_found_before_anything_is_measured(monkeypatch):
    from kar_kernels import fused_per_expert

    right = fused_per_expert.fused_per_expert_forward

    def wrong(*args, **kwargs):
        result, saved = right(*args, **kwargs)
        return result * 1.01, saved

    assert check(torch.device("cpu"), tiny=True) == []
    monkeypatch.setattr(fused_per_expert, "fused_per_expert_forward", wrong)
    found = check(torch.device("cpu"), tiny=True)
    assert found
    assert all(text.startswith("fused_per_expert") for text in found)


@pytest.mark.unit
def test_a_form_that_breaks_down_is_named_and_the_others_are_measured(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr("kar_kernels.gemm_then_fused.gemm_then_fused_forward", broken)
    cases = [Case(0, 2, 64, torch.float32, forms=("eager", "gemm_then_fused"))]
    report = measure_gpu(torch.device("cpu"), tiny=True, cases=cases)
    assert report["failed"] == ["0 + 2 rows, D = 64, float32, forward, gemm_then_fused: RuntimeError: out of registers"]
    assert {row["implementation"] for row in report["cuda"]} == {"eager", "bare products"}


@pytest.mark.unit
@pytest.mark.parametrize("name", ["eager", "concatenated"])
def test_baselines_compute_what_the_reference_does(name):
    adaptor = HybridExpertAdaptor(64, hidden=16, out=16, shared=2, dedicated=3).double()
    x = torch.randn(5, 64).double(), torch.randn(9, 64).double()
    vectors = dict(zip(TOWERS, baseline(name, adaptor).run(*x), strict=True))
    assert adaptor_excesses(adaptor, dict(zip(TOWERS, x, strict=True)), vectors) == []


@pytest.mark.unit
def test_what_is_not_begun_in_time_is_left_out():
    report = measure_gpu(torch.device("cpu"), tiny=True, budget_s=-1.0)
    assert report["cuda"] == []
    assert report["left_out"] == [case.label for case in TINY]


@pytest.mark.unit
def test_the_model_of_the_work_agrees_with_counts_by_hand():
    # One tower, 1 row, D = 64, 2 experts of 16 x 16: the gate has 2 x 64, a first layer 16 x 64, a second 16 x 16.
    from kar_kernels.layout import Shape

    work = forward_work(0, 1, Shape(64, experts=2, seen=2, hidden=16, out=16, gate_rows=16), 2)
    assert work.flop == 2 * (2 * 64 + 2 * 16 * 64 + 2 * 16 * 16)
    weights = 2 * (16 * 64 + 16 + 16 * 16 + 16) + 2 * 64 + 2
    assert work.fused_bytes == 2 * (weights + 64 + 16)
    assert work.concatenated_bytes - work.fused_bytes == 2 * 2 * (2 + 2 * 16 + 2 * 16)
    # The design's own figures: 1.48 GFLOP and 4.1 MB for 512 rows a tower at D = 768, 1.81 ms for a million.
    both = forward_work(512, 512, default_shape(768), 2)
    assert both.flop == pytest.approx(1.48e9, rel=0.01)
    assert both.fused_bytes == pytest.approx(4.1e6, rel=0.02)
    assert both.concatenated_bytes == pytest.approx(8.8e6, rel=0.02)
    assert forward_work(0, 10**6, default_shape(768), 2).bound_s(H100) == pytest.approx(1.81e-3, rel=0.01)


def row(implementation, ms, *, graph=False, selected=False):
    size = {"users": 1, "batch": 100, "dim": 768, "dtype": "bfloat16", "direction": "forward"}
    return size | {"implementation": implementation, "graph": graph, "median_ms": ms, "selected": selected}


@pytest.mark.unit
def test_the_verdict_takes_the_best_baseline_and_tells_what_the_dispatcher_gives():
    rows = [
        row("eager", 9.0),
        row("compiled", 4.0),
        row("compiled concatenated", 3.0),
        row("fused_per_expert", 2.0, selected=True),
        row("gemm_then_fused", 1.5),
        row("bare products", 0.1),
        row("eager", 6.0, graph=True),
        row("fused_per_expert", 1.0, graph=True, selected=True),
    ]
    bare, graph = verdict(rows)
    assert (bare.best_baseline, bare.best_path, bare.speedup) == ("compiled concatenated", "gemm_then_fused", 2.0)
    assert (bare.selected, bare.selected_speedup) == ("fused_per_expert", 1.5)
    assert (graph.best_baseline, graph.speedup) == ("eager", 6.0)


@pytest.mark.unit
def test_processor_rows_have_every_form_in_both_dtypes():
    report = processor.measure_processor((1, 3), 64, seconds=0.001, compiled=False, patience_s=0)
    rows = {(row.batch, row.dtype, row.implementation): row for row in report.rows}
    forms = ("eager", "concatenated", "cpu")
    assert rows.keys() == {(b, d, f) for b in (1, 3) for d in ("float32", "bfloat16") for f in forms}
    for (batch, dtype, _), row in rows.items():
        single, same = (rows[batch, name, "eager"].median_ms for name in ("float32", dtype))
        assert row.speedup_vs_eager_fp32 == single / row.median_ms
        assert row.speedup_vs_eager_same_dtype == same / row.median_ms
    fast = "bfloat16" if processor.cpu.has_bfloat16() else "float32"
    assert {key[1:] for key, row in rows.items() if row.selected} == {(fast, "cpu")}


@pytest.mark.unit
def test_prestoring_tells_its_share_of_the_bare_products():
    for row in processor.measure_prestoring(300, 64, repeats=1, patience_s=0):
        assert row.share_of_products == pytest.approx(row.rows_per_s / row.products_rows_per_s)


@pytest.mark.unit
def test_a_block_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- aot -->\nold\n<!-- /aot -->\nafter\n")
    write_block(page, "aot", "| new |")
    assert page.read_text() == "before\n<!-- aot -->\n\n| new |\n\n<!-- /aot -->\nafter\n"
    with pytest.raises(ValueError, match=r"no block <!-- cpu -->"):
        write_block(page, "cpu", "text")


@pytest.mark.unit
def test_another_report_is_no_kernel_table():
    with pytest.raises(ValueError, match="registers"):
        kernel_table([{"kernel": "split"}])

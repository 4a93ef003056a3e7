"""The store benchmark on little data, and what it makes of hand-made times."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from kar_bench.harness import BusyCores, to_json
from kar_bench.performance.store.clients import IMPLEMENTATIONS
from kar_bench.performance.store.measure import (
    ReadLatency,
    StoreRatio,
    StoreReport,
    StoreRow,
    measure_store,
    store_table,
)
from kar_bench.performance.store.options import StoreBenchmarkOptions
from kar_bench.performance.store.reader import STAGES
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.service


def printed(report: StoreReport) -> str:
    console = Console(width=200, record=True)
    console.print(store_table(report))
    return console.export_text()


@pytest.mark.parametrize("kind", ["LMDB", "Aerospike"])
def test_a_tiny_store_is_loaded_and_read_beside_the_bare_client(tmp_path: Path, kind: str) -> None:
    url = f"lmdb:{tmp_path}"
    if kind == "Aerospike":
        if not (hosts := os.environ.get("AEROSPIKE_HOSTS")):
            pytest.skip("AEROSPIKE_HOSTS is not set: start a server with a namespace `test` and set it to HOST:PORT")
        url = f"aerospike:{hosts}/test/tiny"
    steps = []
    report = measure_store(
        StoreBenchmarkOptions([url], entities=2_100, reads_per_s=40, quiet_s=0.5, text_bytes=20),
        on_step=lambda *step: steps.append(step),
        busy_cores=lambda: 0.0,
    )
    found = to_json(report)
    assert (found["entities"], found["parts"]) == (2_100, ["features", "v", "text"])
    assert found["part_bytes"] == [32 + 4 + 4 * 8, 32 + 32 * 4, 20]
    assert [(row["store"], row["implementation"]) for row in found["rows"]] == [
        (kind, side) for side in IMPLEMENTATIONS
    ]
    for row in found["rows"]:
        assert 0 < row["low"] <= row["records_per_s"] <= row["high"]
        assert row["bytes_per_entity"] > 68 + 160 + 20
        assert list(row["reads"]) == list(STAGES)
        # Of 40 that are due; a busy machine makes fewer.
        assert row["reads"]["before"]["count"] >= 1
        assert 0 < row["reads"]["before"]["p50_ms"] <= row["reads"]["before"]["p99_ms"]
    [ratio] = found["ratios"]
    assert 0 < ratio["low"] <= ratio["load"] <= ratio["high"]
    assert steps[0] == (f"{kind}: reading", 0, 20)
    assert steps[1:3] == [(f"{kind}: loading, bare", 0, 20), (f"{kind}: loading, ours", 0, 20)]
    assert steps[3:5] == [(f"{kind}: loading, ours", 1, 20), (f"{kind}: loading, bare", 1, 20)]
    assert list(tmp_path.iterdir()) == []  # the stores were temporary
    assert ("Aerospike was not measured" in printed(report)) == (kind == "LMDB")


def test_what_was_measured_is_told() -> None:
    reads = ReadLatency(500, 3, 1.25, 2.5, 30.0)
    stages = {"before": reads, "during": reads, "after": ReadLatency(0, 0)}
    report = StoreReport(
        entities=1_000_000,
        parts=["features"],
        part_bytes=[68],
        keys_of_a_read=200,
        reads_per_s=100.0,
        rows=[StoreRow("Aerospike", side, 12_345.6, 10_000.0, 20_000.0, 432.1, stages) for side in IMPLEMENTATIONS],
        ratios=[StoreRatio("Aerospike", 0.75, 0.5, 0.875, {"before": 1.5, "during": 1.25})],
        others_busy_cores=BusyCores(1.5),
        versions={},
        machine="",
    )
    text = printed(report)
    assert "12,346 [10,000, 20,000]" in text
    assert "1.2, 2.5, 30.0 (3)" in text
    assert "ours / bare 0.750 [0.500, 0.875] of records/s; median latency before 1.50, during 1.25" in text
    assert "others kept 1.5 cores busy" in text
    assert "not measured" not in text
    assert to_json(report)["rows"][0]["reads"]["after"] == {"count": 0, "late": 0}
    assert to_json(report)["others_busy_cores"] == {"before": 1.5}


@pytest.mark.parametrize("url", ["memory:", "redis:a:1/b", "aerospike:localhost:3000/test"])
def test_other_stores_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="lmdb:FOLDER or aerospike:"):
        measure_store(StoreBenchmarkOptions([url], entities=1_000))

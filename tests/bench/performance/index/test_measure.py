"""The index benchmark on few vectors."""

import json

from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.performance.index.measure import FLAT_LIMIT, SIZES, IndexBenchmarkOptions, index_table, measure_index


def test_a_tiny_run_tells_everything_of_every_kind(tmp_path) -> None:
    file = tmp_path / "index.json"
    arguments = ["--size", "400", "--storage", "int8", "--recall", "0.8", "--threads", "1"]
    quick = ["--dim", "16", "--rounds", "1", "--seconds", "0.01", "--json", str(file)]
    done = CliRunner().invoke(bench, ["index", *arguments, *quick], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(file.read_text())
    assert report["machine"]
    assert report["command"].startswith("kar")
    found = [(row["size"], row["kind"], row["storage"]) for row in report["rows"]]
    assert found == [(400, kind, "int8") for kind in ("flat", "ivf", "hnsw")]
    for row in report["rows"]:
        assert 0.8 <= row["recall"] <= 1
        assert 0.5 < row["recall_new"] <= 1
        assert [one["batch"] for one in row["searches"]] == [1, 64]
        assert all(one["low"] <= one["ratio"] <= one["high"] for one in row["searches"])
        # A vector of 16 bytes, its id's end and place of 12, its id of about 3, and what the kind adds.
        assert row["file_bytes"] > 30
        assert min(row["build_s"], row["load_s"], row["load_mapped_s"], row["verify_s"]) > 0
    assert report["rows"][1]["parameters"]["lists"] == 80
    assert "queries a second, one thread" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_flat_is_left_out_where_it_is_hopeless_unless_it_is_named() -> None:
    assert SIZES[0] < FLAT_LIMIT < SIZES[1]
    steps: list[str] = []
    options = IndexBenchmarkOptions((200,), ("flat",), dim=8, rounds=1, seconds=0.01)
    report = measure_index(options, on_step=steps.append, busy_cores=lambda: 0.0)
    assert [row.kind for row in report.rows] == ["flat"]
    assert steps[:2] == ["drawing 200 vectors", "building flat of 200 in float32"]
    assert index_table(report)


def test_an_unknown_kind_is_refused_with_those_that_are_known() -> None:
    refused = CliRunner().invoke(bench, ["index", "--kind", "tree"])
    assert "choose from flat, ivf, hnsw" in str(refused.exception)

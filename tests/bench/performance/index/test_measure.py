import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.performance.index.measure import FLAT_LIMIT, SIZES, IndexBenchmarkOptions, index_table, measure_index
from kar_bench.performance.index.mixture import mixture

pytestmark = pytest.mark.service


def test_the_mixture_is_of_unit_vectors_and_the_same_each_time() -> None:
    rows, queries = mixture(2000, 20, queries=10)
    assert (rows.shape, queries.shape, rows.dtype) == ((2000, 20), (10, 20), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows, mixture(2000, 20, queries=10)[0])
    assert not np.array_equal(rows, mixture(2000, 20, queries=10, seed=2)[0])
    nearest = np.sort(queries @ rows.T, axis=1)[:, -10:]
    assert 0.5 < nearest.mean() < 0.99  # near, and yet no copies


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
    report = measure_index(options, on_step=steps.append)
    assert [row.kind for row in report.rows] == ["flat"]
    assert steps[:2] == ["drawing 200 vectors", "building flat of 200 in float32"]
    assert index_table(report)


def test_an_unknown_kind_is_refused_with_those_that_are_known() -> None:
    refused = CliRunner().invoke(bench, ["index", "--kind", "tree"])
    assert "choose from flat, ivf, hnsw" in str(refused.exception)

"""The report carries the figures of its summary, as numbers and as heights."""

import pytest

from kar_offline.demo.report import plot_auc, plot_latency, write_report

pytestmark = pytest.mark.unit

AUC = {"dcnv2": {"control": 0.7736, "raw_text": 0.7741, "knowledge": 0.7720}}
STAGE = {"p50_ms": 0.25, "p95_ms": 0.5, "p99_ms": 0.75}
STAGES = dict.fromkeys(("assign", "fetch", "assemble", "score", "respond"), STAGE)
INTERVAL = {"mean": -0.0016, "low": -0.0042, "high": 0.0011}
SUMMARY = {
    "dataset": "ml-100k <script>",
    "samples": 77277,
    "positive_ratio": 0.5406,
    "release_id": "0123456789ab",
    "seconds": 123.0,
    "machine": "2 cores",
    "auc": AUC,
    "logloss": {"dcnv2": {"control": 0.5657, "raw_text": 0.5650, "knowledge": 0.5684}},
    "gauc": {"dcnv2": {"control": 0.7059, "raw_text": 0.7060, "knowledge": 0.7103}},
    "intervals": {"dcnv2": {"knowledge_minus_control": INTERVAL}},
    "caveats": ["Users are split, time is not."],
    "online": {
        "users": 189,
        "labelled_rows": 15000,
        "max_score_difference": 3.1e-7,
        "auc": {"control": 0.7512, "knowledge": 0.7498},
        "knowledge_minus_control": INTERVAL,
    },
    "serve": {
        **{"requests": 1000, "errors": 0, "candidates": 100, "p50_ms": 3.21, "p95_ms": 4.32, "p99_ms": 6.54},
        "stages": STAGES,
        "levels": {"full": 50000},
        "rungs": {"knowledge": 503, "backbone": 497},
        "arms": {"knowledge": 503, "control": 497},
        "triton_inferences": 1000,
    },
    "stages": [{"name": "dataset", "seconds": 1.5, "ran": True}, {"name": "prompts", "seconds": 0.1, "ran": False}],
}


def test_the_page_states_every_figure_and_escapes_names(tmp_path):
    write_report(SUMMARY, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for figure in ("77,277", "54.06", "0.7736", "0.7720", "-0.0016", "3.1e-07", "6.54", "503", "up to date"):
        assert figure in page
    assert "<script>" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_bars_are_as_high_as_the_auc():
    (axes,) = plot_auc(AUC).axes
    assert [bar.get_height() for bar in axes.patches] == [0.7736, 0.7741, 0.7720]
    bottom, top = axes.get_ylim()
    assert bottom < 0.7720
    assert top > 0.7741


def test_every_stage_has_a_bar_for_every_percentile():
    (axes,) = plot_latency(STAGES).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [0.25] * 5 + [0.5] * 5 + [0.75] * 5

import json

import pytest

from kar_offline.cli_options import write_json

pytestmark = pytest.mark.unit


def test_reports_are_strict_json(tmp_path):
    report = {"a": [1.5, float("nan"), (float("inf"), 2)], "b": {"c": "text", "d": None, "e": True}}
    write_json(tmp_path / "report.json", report)

    def refuse(constant):
        raise ValueError(constant)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, [None, 2]], "b": {"c": "text", "d": None, "e": True}}
    write_json(None, report)

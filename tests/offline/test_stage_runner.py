"""Stages run once for the same sources, again for others, and never leave half a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from kar_offline.stage_runner import draft_of, folder_hash, run_stage, settle
from kar_sidecar.errors import PreconditionError

pytestmark = pytest.mark.unit


def write_number(number):
    def build(draft: Path):
        (draft / "number.txt").write_text(str(number))
        return {"number": number}

    return build


def test_second_run_with_the_same_sources_does_nothing(tmp_path):
    options = {"inputs": {}, "params": {"seed": 1}, "version": 1}
    first = run_stage("numbers", tmp_path / "numbers", write_number(1), **options)
    second = run_stage("numbers", tmp_path / "numbers", write_number(2), **options)
    assert (first.ran, second.ran) == (True, False)
    assert second.report == {"number": 1}
    assert (tmp_path / "numbers" / "number.txt").read_text() == "1"


@pytest.mark.parametrize(
    "changed", [{"params": {"seed": 2}}, {"version": 2}, {"inputs": {"source": "other"}}], ids=lambda c: next(iter(c))
)
def test_other_sources_run_again(tmp_path, changed):
    for name in ("source", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    options = {"inputs": {"source": "source"}, "params": {"seed": 1}, "version": 1}

    def run(number, options):
        inputs = {key: tmp_path / folder for key, folder in options["inputs"].items()}
        return run_stage("numbers", tmp_path / "numbers", write_number(number), **{**options, "inputs": inputs})

    run(1, options)
    assert run(2, {**options, **changed}).ran
    assert (tmp_path / "numbers" / "number.txt").read_text() == "2"


def test_a_failing_stage_keeps_the_former_result_and_what_it_can_resume_from(tmp_path):
    folder = tmp_path / "numbers"
    run_stage("numbers", folder, write_number(1), inputs={}, params={}, version=1)

    def fail(draft: Path):
        with (draft / "journal").open("a") as journal:
            journal.write("line\n")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_stage("numbers", folder, fail, inputs={}, params={}, version=2)
    assert (folder / "number.txt").read_text() == "1"

    def resume(draft: Path):
        return {"lines": (draft / "journal").read_text().count("line")}

    assert run_stage("numbers", folder, resume, inputs={}, params={}, version=2).report == {"lines": 2}


def test_a_draft_of_other_sources_is_not_resumed(tmp_path):
    def fail(draft: Path):
        (draft / "journal").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("numbers", tmp_path / "numbers", fail, inputs={}, params={"seed": 1}, version=1)

    def look(draft: Path):
        return {"found": (draft / "journal").exists()}

    result = run_stage("numbers", tmp_path / "numbers", look, inputs={}, params={"seed": 2}, version=1)
    assert result.report == {"found": False}


def test_the_hash_of_a_folder_tells_contents_and_names(tmp_path):
    folders = {}
    for name, file, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
        folders[name] = folder_hash(tmp_path / name)
    assert folders["a"] == folders["b"]
    assert len({folders["a"], folders["c"], folders["d"]}) == 3


def test_two_processes_never_make_the_same_folder(tmp_path):
    def make_it_again(draft: Path):
        return run_stage("numbers", tmp_path / "numbers", write_number(2), inputs={}, params={}, version=2).report

    with pytest.raises(PreconditionError, match="another process is writing"):
        run_stage("numbers", tmp_path / "numbers", make_it_again, inputs={}, params={}, version=1)


@dataclass(frozen=True)
class Part:
    rows: int


@dataclass(frozen=True)
class Report:
    parts: dict[str, Part]
    ratio: float | None = None


def test_a_typed_report_is_the_same_from_a_run_and_from_the_record(tmp_path):
    report = Report({"user": Part(3), "item": Part(4)}, ratio=0.5)
    options = {"inputs": {}, "params": {}, "version": 1, "report_type": Report}
    results = [run_stage("counts", tmp_path / "counts", lambda draft: report, **options) for _ in range(2)]
    assert [(result.ran, result.report) for result in results] == [(True, report), (False, report)]
    record = json.loads((tmp_path / "counts" / "stage.json").read_text())
    assert record["report"] == {"parts": {"user": {"rows": 3}, "item": {"rows": 4}}, "ratio": 0.5}


def test_a_finished_draft_is_settled_where_its_folder_is_missing(tmp_path):
    run_stage("numbers", tmp_path / "numbers", write_number(1), inputs={}, params={}, version=1)
    (tmp_path / "numbers").rename(draft_of(tmp_path / "numbers"))
    settle(tmp_path / "numbers")
    assert (tmp_path / "numbers" / "number.txt").read_text() == "1"

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_offline.generate import Pack, ScriptedModel, generate, read_knowledge
from kar_offline.generate.command import generate as generate_command
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError, UnavailableError

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def write_prompts(work: Path, items: int = 4, users: int = 1) -> None:
    lines = [
        {
            "id": str(i),
            "kind": "factual" if i <= items else "reasoning",
            "entity": "item" if i <= items else "user",
            "template": "factual/1" if i <= items else "reasoning/1",
            "prompt": f"question {i}",
            "prompt_sha256": f"sha{i}",
            "history_cutoff": 0 if i <= items else 3,
            "raw_text": f"facts {i}",
        }
        for i in range(1, items + users + 1)
    ]
    (work / "prompts").mkdir(parents=True, exist_ok=True)
    (work / "prompts" / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "work")
    return tmp_path / "work"


def answer(prompt: str) -> str:
    return f"An answer to {prompt}"


def test_records_carry_their_provenance(work: Path) -> None:
    result = generate(work, ScriptedModel(answer, concurrency=3), now=lambda: NOON)
    assert [record.text for record in read_knowledge(work / "knowledge", "item")] == [
        f"An answer to question {i}" for i in (1, 2, 3, 4)
    ]
    (user,) = read_knowledge(work / "knowledge", "user")
    expected = records_pb2.KnowledgeRecord(
        id="5",
        entity=records_pb2.ENTITY_KIND_USER,
        text="An answer to question 5",
        template="reasoning/1",
        prompt_sha256="sha5",
        llm="scripted",
        history_cutoff=3,
    )
    expected.created_at.FromDatetime(NOON)
    assert user == expected
    assert result.report == {
        "source": "scripted",
        "records": 5,
        "kinds": {"item": 4, "user": 1},
        "calls": 5,
        "input_tokens": 10,
        "output_tokens": 25,
        "cost_usd": None,
        "quarantined": 0,
    }


def test_a_second_run_asks_nothing(work: Path) -> None:
    model = ScriptedModel(answer)
    assert generate(work, model).ran
    assert not generate(work, model).ran
    assert len(model.asked) == 5


def test_an_interrupted_run_resumes_and_asks_nothing_twice(work: Path) -> None:
    def breaks(prompt: str) -> str:
        if prompt == "question 4":
            raise UnavailableError("the endpoint went away")
        return answer(prompt)

    first = ScriptedModel(breaks)
    with pytest.raises(UnavailableError, match="went away"):
        generate(work, first)
    assert not (work / "knowledge").exists()
    # A kill may leave half a line.
    with (work / ".knowledge.journal.jsonl").open("a") as journal:
        journal.write('{"record": {"id": "4", "te')
    second = ScriptedModel(answer)
    result = generate(work, second)
    assert first.asked == ["question 1", "question 2", "question 3", "question 4"]
    assert second.asked == ["question 4", "question 5"]
    assert (result.report["records"], result.report["calls"], result.report["output_tokens"]) == (5, 5, 25)
    assert not (work / ".knowledge.journal.jsonl").exists()


def test_raising_the_limit_keeps_former_answers_and_another_model_does_not(work: Path) -> None:
    generate(work, ScriptedModel(answer), limit=2)
    more = ScriptedModel(answer)
    assert generate(work, more, limit=3).report["records"] == 3
    assert more.asked == ["question 3"]
    other = ScriptedModel(answer, provenance="another")
    generate(work, other, limit=3)
    assert other.asked == ["question 1", "question 2", "question 3"]


def test_a_changed_prompt_is_asked_again(work: Path) -> None:
    generate(work, ScriptedModel(answer))
    path = work / "prompts" / "prompts.jsonl"
    path.write_text(path.read_text().replace('"sha2"', '"new"').replace("question 2", "question two"))
    model = ScriptedModel(answer)
    generate(work, model)
    assert model.asked == ["question two"]


def test_kind_restricts_and_both_files_exist(work: Path) -> None:
    report = generate(work, ScriptedModel(answer), kind="user").report
    assert report["kinds"] == {"item": 0, "user": 1}
    assert read_knowledge(work / "knowledge", "item") == []


def test_an_empty_answer_leaves_the_entity_out(work: Path) -> None:
    report = generate(work, ScriptedModel(lambda prompt: "" if prompt == "question 2" else "text")).report
    assert (report["records"], report["calls"]) == (4, 5)
    assert [record.id for record in read_knowledge(work / "knowledge", "item")] == ["1", "3", "4"]


def test_a_pack_that_leaks_leaves_nothing_behind(work: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "pack.toml").write_text('llm = "A"\ncreated_at = 2026-11-01T00:00:00Z\ntemplates = {}\n')
    (pack / "item.jsonl").write_text("")
    (pack / "user.jsonl").write_text('{"id": "5", "cutoff": 4, "text": "Saw too much."}\n')
    with pytest.raises(IntegrityError, match="leakage"):
        generate(work, Pack.load(str(pack)))
    assert not (work / "knowledge").exists()


def test_knowledge_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="run `kar prompts` first"):
        generate(tmp_path, ScriptedModel(answer))


def test_a_broken_record_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "item.jsonl").write_text('{"id": "1"}\n{"id": \n')
    with pytest.raises(IntegrityError, match=r"item\.jsonl:2 is not a knowledge record"):
        read_knowledge(tmp_path, "item")


def test_command_writes_the_report_beside_the_table(work: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(generate_command)
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "pack.toml").write_text('llm = "A"\ncreated_at = 2026-11-01T00:00:00Z\ntemplates = {}\n')
    (pack / "item.jsonl").write_text('{"id": "3", "text": "A long film."}\n')
    (pack / "user.jsonl").write_text("")
    options = ["--work", str(work), "--pack", str(pack), "--show", "1", "--json", str(tmp_path / "report.json")]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    assert done.exit_code == 0
    assert "A long film." in done.output
    assert "question 3" in done.output
    assert json.loads((tmp_path / "report.json").read_text())["records"] == 1


def test_command_says_what_an_endpoint_needs(work: Path) -> None:
    app = typer.Typer()
    app.command()(generate_command)
    environment = {"KAR_LLM_BASE_URL": "", "KAR_LLM_MODEL": ""}
    for options, words in ((["--llm", "openai"], "--base-url"), (["--llm", "local", "--parameters", "[]"], "object")):
        done = CliRunner().invoke(app, [*options, "--work", str(work)], env=environment)
        assert isinstance(done.exception, InputError)
        assert words in str(done.exception)

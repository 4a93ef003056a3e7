import json
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kar_offline.cli_options import ConfigFile, Offered, settings_as_options, work_of
from kar_offline.settings import EncoderOptions, ProviderOptions
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError
from kar_sidecar.settings import Settings

pytestmark = pytest.mark.unit

FILE = """
work = "there"
[llm]
provider = "openai"
base_url = "http://file/v1"
model = "in-file"
price = [1, 4]
parameters = { temperature = 0.5 }
[encoder]
name = "mpnet"
threads = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kar.toml"
    path.write_text(FILE)
    return path


def run(command, *arguments: str, env: dict[str, str] | None = None):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), env={"KAR_LLM_BASE_URL": "", "KAR_LLM_MODEL": ""} | (env or {}))


@settings_as_options
def both(
    llm: ProviderOptions,
    encoder: Annotated[EncoderOptions, Offered(("name", "base_url", "model"))],
    config: ConfigFile = None,
) -> None:
    print(json.dumps({"llm": llm.model_dump(mode="json"), "encoder": encoder.model_dump(mode="json")}))


def test_every_setting_has_a_sentence_and_its_unit_in_the_name():
    for table in (ProviderOptions, EncoderOptions):
        fields = table.model_fields
        assert [name for name, field in fields.items() if not (field.description or "").endswith(".")] == []
        named = {name for name in fields if name.endswith("_s")}
        assert {name for name, field in fields.items() if "in seconds" in field.description} == named


def test_the_command_line_beats_the_environment_and_that_the_file(file: Path):
    done = run(both, "--config", str(file), "--model", "typed", env={"KAR_LLM_BASE_URL": "http://env/v1"})
    options = json.loads(done.output)
    assert (options["llm"]["model"], options["llm"]["base_url"]) == ("typed", "http://env/v1")
    assert (options["llm"]["provider"], options["llm"]["price"]) == ("openai", [1, 4])
    assert options["llm"]["parameters"] == {"temperature": 0.5}
    assert (options["llm"]["timeout_s"], options["llm"]["batch"]) == (120, False)


def test_settings_that_are_not_offered_come_from_the_file(file: Path):
    options = json.loads(run(both, "--config", str(file), "--encoder", "minilm").output)
    assert (options["encoder"]["name"], options["encoder"]["threads"]) == ("minilm", 3)
    assert run(both, "--threads", "2").exit_code == 2


def test_an_address_of_a_language_model_is_none_of_an_encoder():
    options = json.loads(run(both, "--base-url", "http://a/v1", "--encoder-url", "http://b/v1").output)
    assert (options["llm"]["base_url"], options["encoder"]["base_url"]) == ("http://a/v1", "http://b/v1")


def test_a_flag_of_the_file_can_be_taken_back(tmp_path: Path):
    file = tmp_path / "kar.toml"
    file.write_text("[llm]\nbatch = true\n")
    assert json.loads(run(both, "--config", str(file)).output)["llm"]["batch"] is True
    assert json.loads(run(both, "--config", str(file), "--no-batch").output)["llm"]["batch"] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[llm]\nmodle = 'm'", "'modle' in \\[llm\\].*is not a setting"),
        ("[llm]\nprovider = 'other'", "provider"),
        ("[llm]\nconcurrency = 0", "concurrency"),
        ("[llm]\nparameters = 3", "parameters.*JSON object"),
        ("[llm]\nprice = [1]", "price"),
        ("llm = 3", "not a table"),
        ("this is not TOML", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "kar.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        ProviderOptions.read(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.toml does not exist"):
        ProviderOptions.read(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["[llm]\napi_key = 'sk-secret'", "[llm]\nbatch = 'sk-secret'"])
def test_no_message_shows_what_could_be_a_key(tmp_path: Path, text: str):
    file = tmp_path / "kar.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        ProviderOptions.read(file)
    assert "sk-secret" not in str(caught.value)
    if "api_key" in text:
        assert "set $KAR_LLM_API_KEY instead" in str(caught.value)


def test_options_hold_no_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KAR_LLM_API_KEY", "sk-secret")
    assert "sk-secret" not in repr(ProviderOptions.read()) + repr(EncoderOptions.read())


def test_one_file_serves_the_sidecar_and_the_offline_commands(file: Path, tmp_path: Path):
    assert Settings.read(file).work == Path("there")
    assert work_of(None, file) == WorkFolder(Path("there"))
    assert work_of(WorkFolder(tmp_path), file) == WorkFolder(tmp_path)
    file.write_text(FILE.replace("work =", "wrok ="))
    with pytest.raises(InputError, match="wrok"):
        work_of(None, file)
    file.write_text(FILE.replace("threads =", "thraeds ="))
    with pytest.raises(InputError, match="thraeds"):
        work_of(WorkFolder(tmp_path), file)

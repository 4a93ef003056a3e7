from pathlib import Path

import pytest

from kar_sidecar.errors import InputError
from kar_sidecar.settings import ExperimentSettings, Settings

pytestmark = pytest.mark.unit


def test_defaults_listen_on_loopback_and_follow_the_work_folder():
    settings = Settings.read(work=Path("there"))
    assert settings.host == "127.0.0.1"
    assert settings.releases == Path("there/releases")
    assert settings.store == "lmdb:there/store"
    assert settings.mode == "prestored"
    assert settings.max_candidates == 1000


def test_every_setting_has_a_description():
    fields = {**Settings.model_fields, **ExperimentSettings.model_fields}
    assert [name for name, field in fields.items() if not (field.description or "").endswith(".")] == []


def test_durations_have_their_unit_in_the_name():
    named = {name for name in Settings.model_fields if name.endswith(("_ms", "_s"))}
    assert {name for name, field in Settings.model_fields.items() if "seconds" in (field.description or "")} == named


def test_arguments_override_the_environment_which_overrides_the_file(tmp_path, monkeypatch):
    file = tmp_path / "kar.toml"
    file.write_text("grpc_port = 1\nmetrics_port = 2\nmax_candidates = 3\n[experiment]\nseed = 's'\ncoverage = 0.25\n")
    monkeypatch.setenv("KAR_METRICS_PORT", "20")
    monkeypatch.setenv("KAR_MAX_CANDIDATES", "30")
    monkeypatch.setenv("KAR_EXPERIMENT__COVERAGE", "0.5")
    settings = Settings.read(file, max_candidates=300, grpc_port=None)
    assert (settings.grpc_port, settings.metrics_port, settings.max_candidates) == (1, 20, 300)
    assert (settings.experiment.seed, settings.experiment.coverage) == ("s", 0.5)


@pytest.mark.parametrize("name", ["KAR_GRPC_PROT", "KAR_EXPERIMENT__COVERAG"])
def test_an_unknown_variable_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=f"(?i){name.rsplit('_', 1)[-1]}"):
        Settings.read()


def test_variables_of_other_parts_are_ignored(monkeypatch):
    before = Settings.read().model_dump()
    monkeypatch.setenv("KAR_CACHE", "/somewhere")
    monkeypatch.setenv("KAR_LLM_API_KEY", "secret")
    assert Settings.read().model_dump() == before


@pytest.mark.parametrize(
    "text",
    [
        "typo = 1",
        "grpc_port = 70000",
        "store_timeout_ms = 0",
        "mode = 'fast'",
        "max_candidates = 'many'",
        "[experiment]\nweights = [0.5, 0.6]",
        "[experiment]\nweights = [1.0]",
        "[experiment]\nweights = [-0.5, 1.5]",
        "[experiment]\narms = ['control', 'other']",
        "[experiment]\narms = ['control', 'control']",
        "[experiment]\ncoverage = 1.5",
        "[experiment]\ntypo = 1",
        "this is not TOML",
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text):
    file = tmp_path / "kar.toml"
    file.write_text(text)
    with pytest.raises(InputError):
        Settings.read(file)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.toml"):
        Settings.read(tmp_path / "nothing.toml")


def test_the_experiment_is_built_from_its_settings():
    experiment = Settings.read(experiment={"key": "k", "coverage": 0.5, "weights": [0.9, 0.1]}).experiment.build()
    assert (experiment.key, experiment.coverage, experiment.weights) == ("k", 0.5, (0.9, 0.1))

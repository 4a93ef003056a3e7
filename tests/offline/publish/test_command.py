"""kar publish: settings, the active release, what it prints and its JSON report."""

import json
from pathlib import Path

import pytest
import typer
from tests.support.publishable import World, feature_line, make_release, schema_of
from typer.testing import CliRunner

from kar_offline.publish.command import publish as publish_command
from kar_sidecar.errors import InputError, UnavailableError
from kar_sidecar.releases.manifest import write_active

pytestmark = pytest.mark.service


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path)


def test_the_command_reads_store_and_cluster_from_settings(world: World, app: typer.Typer, tmp_path: Path) -> None:
    write_active(world.work.releases, world.release)
    config = tmp_path / "kar.toml"
    config.write_text(f"work = '{world.work}'\nstore = 'lmdb:{tmp_path / 'elsewhere'}'\n")
    done = CliRunner().invoke(app, ["--config", str(config), "--max-rate", "1000"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "elsewhere" / "data.mdb").is_file()
    config.write_text(f"work = '{world.work}'\n[aerospike]\ntls_name = 'a'\n")
    with pytest.raises(InputError, match="need tls = true"):
        CliRunner().invoke(app, ["--config", str(config)], catch_exceptions=False)
    config.write_text(f"work = '{world.work}'\n[aerospike]\nconnect_timeout_ms = 50\n")
    arguments = ["--config", str(config), "--store", "aerospike:127.0.0.1:1,127.0.0.1:2/test/kar"]
    with pytest.raises(UnavailableError, match=r"Aerospike 127\.0\.0\.1:1, 127\.0\.0\.1:2"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(publish_command)
    return app


def test_the_command_publishes_the_active_release_into_the_work_folder(world: World, app: typer.Typer) -> None:
    write_active(world.work.releases, world.release)
    report = world.work.root / "report.json"
    done = CliRunner().invoke(app, ["--work", str(world.work), "--json", str(report)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 users and 2 items" in done.output
    assert json.loads(report.read_text())["written"] == {"features": 5, "texts": 4, "adapted": 4, "encoded": 4}
    again = CliRunner().invoke(app, ["--work", str(world.work), "--json", str(report)], catch_exceptions=False)
    assert "nothing done" in again.output
    lent = ["--work", str(world.work), "--release", make_release(world.work, schema_of(), loans=("heat",))]
    told = CliRunner().invoke(app, lent, catch_exceptions=False, env={"COLUMNS": "200"})
    assert "2 users and 2 items (1 with imputed knowledge)" in told.output
    assert json.loads(report.read_text())["ran"] is False
    (world.work.root / "fresh.jsonl").write_text(feature_line())
    fresh = ["--work", str(world.work), "--features", str(world.work.root / "fresh.jsonl"), "--json", str(report)]
    assert "1 of 1 records" in CliRunner().invoke(app, fresh, catch_exceptions=False).output
    assert json.loads(report.read_text())["written"] == 1

"""How fresh texts and vectors are, counted by hand in a folder of eight films and four viewers."""

from datetime import timedelta
from pathlib import Path

import pytest
import typer
from tests.support.refreshable import LATER, NOON, make_work, model, published, refreshed
from typer.testing import CliRunner

from kar_offline.dataset.dataset import Dataset
from kar_offline.inspection.command import knowledge
from kar_offline.inspection.freshness import served_status, text_status
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.prompts import read_renderer
from kar_offline.refresh.knowledge_state import entity_traffic, knowledge_states
from kar_offline.refresh.plan import Budget
from kar_offline.refresh.policy import KnowledgeState, Policy
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store.lmdb import LmdbStore
from kar_sidecar.store.memory import MemoryStore

pytestmark = pytest.mark.service

AGES = {"<1": 0, "<7": 0, "<30": 0, "<90": 0, "90+": 0, "unknown": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, MemoryStore]:
    """One viewer's text was written anew an hour after the others."""
    work = WorkFolder(tmp_path_factory.mktemp("made") / "work")
    release_id = make_work(work)
    store = published(work, release_id)
    refreshed(work, model(), store, release_id, budget=Budget(calls=1))
    return work, release_id, store


def test_texts_are_counted_by_age_growth_and_what_is_due(made: tuple[Path, str, MemoryStore]) -> None:
    work, _, _ = made
    report = text_status(work, Policy(2), NOON + timedelta(days=1))
    assert report[EntityKind("item")].entities == report[EntityKind("item")].own_text == 8
    # Items' texts are a day old; of users' one was written an hour later.
    assert report[EntityKind("item")].age_days == AGES | {"<7": 8}
    assert report[EntityKind("user")].age_days == AGES | {"<1": 1, "<7": 3}
    assert report[EntityKind("user")].events_since == {"<1": 1, "<10": 3, "<30": 0, "<100": 0, "100+": 0}
    assert report[EntityKind("user")].due == {"new": 0, "grown": 3, "expired": 0, "season": 0, "template": 0}
    late = text_status(work, Policy(2), NOON + timedelta(days=31))
    assert (late[EntityKind("user")].expired, late[EntityKind("user")].due["expired"]) == (4, 4)
    assert late[EntityKind("user")].age_days == AGES | {"<90": 4}


def test_vectors_are_counted_as_they_are_served(made: tuple[Path, str, MemoryStore]) -> None:
    work, release_id, store = made
    release, dataset = Release.load(work.releases, release_id), work.read(Dataset)
    now_ms = round((NOON + timedelta(days=30, minutes=30)).timestamp() * 1000)
    served = served_status(dataset, release, store, now_ms)
    assert served[EntityKind("item")].vectors == "adapted"
    assert served[EntityKind("item")].levels == {"full": 8, "stale": 0, "neighbour": 0, "neutral": 0}
    assert served[EntityKind("item")].age_days == AGES | {"<90": 8}
    # Texts about users hold for 30 days; the newest has half an hour left.
    assert served[EntityKind("user")].vectors == "encoded"
    assert served[EntityKind("user")].levels == {"full": 1, "stale": 3, "neighbour": 0, "neutral": 0}
    assert served[EntityKind("user")].age_days == AGES | {"<30": 1, "<90": 3}
    nothing = served_status(dataset, release, MemoryStore(), now_ms)
    assert nothing[EntityKind("item")].levels == {"full": 0, "stale": 0, "neighbour": 0, "neutral": 8}


def test_the_state_of_each_entity_follows_from_its_record(made: tuple[Path, str, MemoryStore]) -> None:
    work, _, _ = made
    dataset, records = work.read(Dataset), Knowledge.load(work.knowledge).records
    del records["item"]["i0"]
    records["item"]["i1"].template = "factual/1"
    records["item"]["i2"].template = "unknown"
    renderer = read_renderer(work.prompts, LATER.date())
    found = {(state.kind, state.id): state for state in knowledge_states(dataset, records, renderer, LATER)}
    # All ratings lie in the window: viewer n gave six, from film n on.
    counts = entity_traffic(dataset)["item"].tolist()
    assert counts == [1 + sum((row - user) % 8 < 6 for user in range(4)) for row in range(8)]
    assert found["item", "i0"] == KnowledgeState("item", "i0", counts[0], has_text=False)
    assert found["item", "i1"] == KnowledgeState("item", "i1", counts[1], template_changed=True)
    assert found["item", "i2"] == KnowledgeState("item", "i2", counts[2])
    assert sorted(found["user", f"u{row}"].cutoff for row in range(4)) == [3, 3, 3, 6]


def test_traffic_is_what_happened_in_the_last_month_of_a_common_clock(made: tuple[Path, str, MemoryStore]) -> None:
    dataset = made[0].read(Dataset)
    day = 86_400
    latest = int(dataset.event_time.max())
    dataset.event_time[:6] = [latest - 31 * day, latest - 30 * day, *dataset.event_time[2:6]]
    assert entity_traffic(dataset)["user"].tolist() == [1 + 4, 1 + 6, 1 + 6, 1 + 6]


def test_the_command_prints_both(made: tuple[Path, str, MemoryStore], tmp_path: Path) -> None:
    work, release_id, _ = made
    published(work, release_id, LmdbStore(tmp_path / "store", map_size_bytes=1 << 24)).close()
    app = typer.Typer()
    app.add_typer(knowledge, name="knowledge")
    options = ["--work", str(work), "--store", f"lmdb:{tmp_path / 'store'}", "--json", str(tmp_path / "status.json")]
    result = CliRunner().invoke(app, ["knowledge", "status", *options], catch_exceptions=False)
    assert result.exit_code == 0
    for title in ("days since they were written", "events since they were written", f"vectors of release {release_id}"):
        assert title in result.output
    assert '"own_text": 8' in (tmp_path / "status.json").read_text()

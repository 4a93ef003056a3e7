"""A refresh adds what is new, rewrites the texts that are due and no others, and does not disturb serving."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from tests.support.refreshable import (
    DAY_S,
    LATER,
    NOON_S,
    TITLES,
    at,
    build_dataset,
    make_work,
    model,
    published,
    refreshed,
    write_lines,
)
from tests.support.rounding import SCORE_LIMIT
from typer.testing import CliRunner

from kar.ranking.v1.ranking_pb2 import Candidates, RankRequest, RankResponse, User
from kar.records.v1 import records_pb2
from kar_kernels import HybridExpertAdaptor
from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import Encoding
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.export import export
from kar_offline.generate import ScriptedModel, read_knowledge
from kar_offline.generate.ledger import Ledger
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.knowledge.records import record_line
from kar_offline.prompts import render_prompts
from kar_offline.publish.knowledge_update import publish_knowledge
from kar_offline.publish.release_target import ReleaseTarget
from kar_offline.publish.stage import publish_release
from kar_offline.refresh.command import refresh as command
from kar_offline.refresh.plan import Budget
from kar_offline.refresh.policy import Policy, Reason
from kar_offline.train import train
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, PreconditionError, UnavailableError
from kar_sidecar.features import FeatureLayout
from kar_sidecar.index.config import IndexConfig
from kar_sidecar.index.snapshot import open_snapshot, read_current
from kar_sidecar.ranking.probe import probe_tensors
from kar_sidecar.ranking.ranker import Ranker
from kar_sidecar.releases.manifest import Release
from kar_sidecar.releases.registry import Releases
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.scoring.memory import MemoryScorer
from kar_sidecar.settings import Settings
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, vector_part
from kar_sidecar.store.records import FULL, decode_vectors, read_header
from kar_sidecar.telemetry import Telemetry

pytestmark = pytest.mark.service

NEIGHBOUR, STALE = records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR, records_pb2.KNOWLEDGE_LEVEL_STALE
NEW_FILM = {
    "entity": "item",
    "id": "i8",
    "title": "Salt and Lanterns",
    "features": {"genres": ["Drama"]},
    "facts": {"genres": ["Drama"]},
}
NOTHING = {"features": 0, "adapted": 0, "encoded": 0, "affinity": 0, "texts": 0}


@dataclass
class World:
    """A work folder with a published release, and files of a new film and three events that name it."""

    work: WorkFolder
    release_id: str
    store: Store

    @property
    def files(self) -> dict[str, Path]:
        events = [
            {"user": "u0", "item": "i8", "rating": 5.0, "time": NOON_S},
            {"user": "u0", "item": "i7", "rating": 2.0, "time": NOON_S + 1},
            {"user": "new", "item": "i8", "rating": 4.0, "time": NOON_S},
        ]
        folder = self.work.root.parent
        return {
            "events": write_lines(folder / "events.jsonl", events),
            "entities": write_lines(folder / "entities.jsonl", [NEW_FILM]),
        }

    @property
    def release(self) -> Release:
        return Release.load(self.work.releases, self.release_id)

    def refresh(self, provider: Any = None, **options: Any) -> dict[str, Any]:
        return refreshed(self.work, provider or model(), self.store, self.release_id, **options)

    def dataset(self) -> Dataset:
        return self.work.read(Dataset)

    def records(self, kind: str) -> dict[str, records_pb2.KnowledgeRecord]:
        return {record.id: record for record in read_knowledge(self.work.knowledge, kind)}

    def vector(self, kind: int, id_: str, space: records_pb2.VectorSpace) -> tuple[np.ndarray, int]:
        """A served vector and its level, an hour after the refresh."""
        [record] = self.store.read([EntityKey(kind, id_)], [vector_part(space.space_id)])
        at_ms = round((LATER + timedelta(hours=1)).timestamp() * 1000)
        neutral = np.zeros(space.dim, np.float32)
        batch = decode_vectors(list(record), space.space_id, space.dim, neutral, dtype=space.dtype, at_ms=at_ms)
        return batch.vectors[0], int(batch.levels[0])

    def rank(self, user: str, *items: str) -> tuple[RankResponse, dict[str, np.ndarray]]:
        """What the sidecar answers, and the tensors that it gave the knowledge model."""
        served = ServedRelease(self.release, "prestored")

        def score(tensors: dict[str, np.ndarray]) -> np.ndarray:
            return np.full(len(tensors["item_index"]), 0.5, np.float32)

        scorer = MemoryScorer(dict.fromkeys(served.models(), score))

        async def run() -> RankResponse:
            releases = Releases(
                self.work.releases,
                self.store,
                scorer,
                "prestored",
                probe_tensors=probe_tensors,
                warm_timeout_s=30,
            )
            await releases.open()
            await releases.restore()
            generous = {"store_timeout_ms": 30_000, "score_timeout_ms": 30_000}
            settings = Settings.read(releases=self.work.releases, **generous)
            wall = at(LATER + timedelta(hours=1))
            ranker = Ranker(
                releases, self.store, scorer, settings, Telemetry(), wall_ms=lambda: round(wall().timestamp() * 1000)
            )
            forced = {"knowledge": "knowledge"}
            candidates = Candidates(ids=items)
            return await ranker.rank(
                RankRequest(user=User(id=user), candidates=candidates, experiment_overrides=forced, explain=True)
            )

        answer = asyncio.run(run())
        return answer, scorer.calls[-1][1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkFolder, str]:
    work = WorkFolder(tmp_path_factory.mktemp("made") / "work")
    return work, make_work(work)


@pytest.fixture
def world(made: tuple[WorkFolder, str], tmp_path: Path) -> World:
    """A copy for each test, so that no test changes another's."""
    shutil.copytree(made[0].root.parent, tmp_path, dirs_exist_ok=True)
    work, release_id = WorkFolder(tmp_path / "work"), made[1]
    return World(work, release_id, published(work, release_id))


def expected(release: Release, text: str) -> np.ndarray:
    """The adapted vector of a text, by the release's own adaptor in training form."""
    adaptor = HybridExpertAdaptor.load(release.folder / "adaptor.safetensors")
    encoded = torch.from_numpy(HashingEncoder().encode([text]))
    with torch.no_grad():
        return adaptor.adapt({"item": (encoded, torch.ones(1, dtype=torch.bool))})["item"].numpy()[0]


@pytest.fixture
def reader(world: World) -> Iterator[None]:
    """A thread that reads every vector of the release all the time, without an error or a missing vector."""
    manifest = world.release.manifest
    spaces = (manifest.adapted_space, manifest.encoded_space, manifest.affinity.space)
    ids = {ITEM: [f"i{row}" for row in range(8)], USER: [f"u{row}" for row in range(4)]}
    faults: list[BaseException] = []
    stop, began = threading.Event(), threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                for kind, space in ((ITEM, spaces[0]), (ITEM, spaces[1]), (ITEM, spaces[2]), (USER, spaces[1])):
                    records = world.store.read(
                        [EntityKey(kind, id_) for id_ in ids[kind]], [vector_part(space.space_id)]
                    )
                    neutral = np.zeros(space.dim, np.float32)
                    blobs = [blob for (blob,) in records]
                    batch = decode_vectors(blobs, space.space_id, space.dim, neutral, dtype=space.dtype, at_ms=0)
                    assert batch.levels.tolist() == [FULL] * len(ids[kind])
                began.set()
        except BaseException as error:  # for the test to see
            faults.append(error)
            began.set()

    thread = threading.Thread(target=read)
    thread.start()
    began.wait()
    yield
    stop.set()
    thread.join()
    assert not faults


@pytest.mark.usefixtures("reader")
def test_reads_go_on_and_then_give_the_new_vectors(world: World) -> None:
    before = world.records("item")
    report = world.refresh(**world.files)
    assert report["arrived"] == {"users": 1, "items": 1, "events": 3}
    # The film and the new viewer have no text; of the four others all did three more than their text knows.
    assert report["due"]["new"] == {"item": 1, "user": 1}
    assert report["due"]["grown"] == {"item": 0, "user": 4}
    assert (report["calls"], report["texts"]["written"]) == (6, 6)
    # Features: the film, u0 and the new viewer. The users pass through no adaptor and have no affinity vector.
    assert report["written"] == {"features": 3, "adapted": 1, "encoded": 6, "affinity": 1, "texts": 6}
    items, users = world.records("item"), world.records("user")
    assert {name: items[name] for name in before} == before
    assert {name: record.history_cutoff for name, record in users.items()} == {
        "u0": 8,
        "u1": 6,
        "u2": 6,
        "u3": 6,
        "new": 1,
    }
    answer, tensors = world.rank("new", "i8", "i0")
    assert list(answer.item_levels) == [FULL, FULL]
    np.testing.assert_allclose(
        tensors["item_knowledge"][0], expected(world.release, items["i8"].text), atol=SCORE_LIMIT
    )
    np.testing.assert_allclose(
        tensors["item_knowledge"][1], expected(world.release, items["i0"].text), atol=SCORE_LIMIT
    )
    # i8, which the new viewer rated, has an affinity vector of unit length.
    affinity, level = world.vector(ITEM, "i8", world.release.manifest.affinity.space)
    assert (level, float(np.linalg.norm(affinity))) == (FULL, pytest.approx(1))
    user, level = world.vector(USER, "u0", world.release.manifest.encoded_space)
    np.testing.assert_array_equal(user, HashingEncoder().encode([users["u0"].text])[0])
    [(features,)] = world.store.read([EntityKey(USER, "u0")], [FEATURES])
    told = FeatureLayout(world.release.manifest.feature_schema, USER).decode_user(features)
    assert told.history.item_ids == ("i0", "i1", "i2", "i3", "i4", "i5", "i8", "i7")
    assert told.written_at_ms == (NOON_S + 1) * 1000
    assert (
        answer.explanation.knowledge_written_at.ToMilliseconds() == world.release.manifest.created_at.ToMilliseconds()
    )


def test_the_same_refresh_again_does_nothing(world: World) -> None:
    world.refresh(**world.files)
    content = {path: path.read_bytes() for path in world.work.root.rglob("*.jsonl")}
    current = read_current(world.work.index / world.release_id / "item")
    provider = model()
    report = world.refresh(provider, **world.files)
    assert report["arrived"] == {"users": 0, "items": 0, "events": 0}
    assert (report["chosen"], report["calls"], provider.asked) == ({"item": 0, "user": 0}, 0, [])
    assert report["written"] == NOTHING
    assert {path: path.read_bytes() for path in world.work.root.rglob("*.jsonl")} == content
    assert read_current(world.work.index / world.release_id / "item") == current


def test_a_dry_run_changes_and_sends_nothing(world: World) -> None:
    before = {path: path.read_bytes() for path in world.work.root.rglob("*") if path.is_file()}
    provider = model(price=lambda read, written: read + written)
    report = world.refresh(provider, dry_run=True, **world.files)
    assert (report["calls"], report["chosen"], provider.asked) == (6, {"item": 1, "user": 5}, [])
    assert report["cost_usd"] > 0
    lock = world.work.root / ".refresh.lock"
    assert {path: path.read_bytes() for path in world.work.root.rglob("*") if path.is_file() and path != lock} == before


def test_a_budget_buys_the_most_valuable_and_moves_only_their_cutoffs(world: World) -> None:
    # u3 did two things in the window that nobody else did: traffic 1 + 8 and staleness 5 / 8 are the most.
    events = [{"user": "u3", "item": "i1", "rating": 4.0, "time": NOON_S + n} for n in range(2)]
    files = {"events": write_lines(world.work.root.parent / "more.jsonl", events)}
    before = world.records("user")
    provider = model()
    report = world.refresh(provider, budget=Budget(calls=1), **files)
    assert (len(provider.asked), report["calls"], report["chosen"]) == (1, 1, {"item": 0, "user": 1})
    assert report["waiting"]["user"] == 3
    # Traffic 1 + 6, and three of six events are not in the text.
    assert report["waiting"]["most_valuable"][0] == {"kind": "user", "id": "u0", "reasons": ["grown"], "value": 3.5}
    assert world.dataset().cutoff.tolist() == [3, 3, 3, 8]
    after = world.records("user")
    assert [name for name in after if after[name] != before[name]] == ["u3"]
    assert after["u3"].history_cutoff == 8


def test_a_budget_in_dollars_buys_the_texts_that_are_expected_to_fit(world: World) -> None:
    provider = model(price=lambda read, written: 1.0)
    report = world.refresh(provider, budget=Budget(usd=2.5))
    assert (report["calls"], report["chosen"], report["waiting"]["user"]) == (2, {"item": 0, "user": 2}, 2)
    assert report["cost_usd"] == 2


def test_only_the_reasons_asked_for_count(world: World) -> None:
    report = world.refresh(policy=Policy(2, frozenset({Reason.NEW})), **world.files)
    assert report["chosen"] == {"item": 1, "user": 1}
    assert report["due"]["grown"] == {"item": 0, "user": 0}


def test_a_refused_text_leaves_the_old_one_in_use(world: World) -> None:
    before = world.records("user")
    report = world.refresh(ScriptedModel(lambda prompt: "I cannot help with that."))
    assert (report["texts"]["written"], report["texts"]["refused"]) == (0, 4)
    assert world.records("user") == before
    assert report["written"] == NOTHING
    # It is still due, and the ledger knows the answer: asking again costs nothing.
    again = world.refresh(ScriptedModel(lambda prompt: "I cannot help with that."))
    assert (again["chosen"]["user"], again["calls"]) == (4, 0)


def test_a_killed_refresh_is_completed_by_the_next(world: World) -> None:
    asked = []

    def fail(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) == 3:
            raise UnavailableError("it is gone: start it")
        return model().script(prompt)

    with pytest.raises(UnavailableError):
        world.refresh(ScriptedModel(fail), **world.files)
    # Cut-offs are moved, texts are not there: nothing that a text may know is a sample.
    assert world.dataset().cutoff.tolist() == [8, 6, 6, 6, 1]
    provider = model()
    report = world.refresh(provider, **world.files)
    assert report["texts"]["written"] == 6
    assert len(provider.asked) == 4
    with Ledger.read(world.work) as ledger:
        assert ledger.costs([])[0].answered == 12 + 6
    assert report["written"] == {"features": 3, "adapted": 1, "encoded": 6, "affinity": 1, "texts": 6}


def test_the_vector_of_a_film_beyond_the_budget_is_imputed(world: World) -> None:
    report = world.refresh(budget=Budget(calls=0), **world.files)
    assert (report["calls"], report["waiting"]["item"]) == (0, 1)
    assert (report["written"]["encoded"], report["written"]["texts"]) == (1, 0)
    vector, level = world.vector(ITEM, "i8", world.release.manifest.encoded_space)
    assert (level, float(np.linalg.norm(vector))) == (NEIGHBOUR, pytest.approx(1))
    # Its own text replaces the imputed vector.
    world.refresh(now=at(LATER + timedelta(minutes=1)), **world.files)
    vector, level = world.vector(ITEM, "i8", world.release.manifest.encoded_space)
    assert level == FULL
    np.testing.assert_array_equal(vector, HashingEncoder().encode([world.records("item")["i8"].text])[0])


def test_an_older_template_is_less_stale_than_growth_and_its_text_is_replaced(world: World) -> None:
    scenario = world.work.root.parent / "films.toml"
    folder = world.work.root.parent / "templates" / "factual"
    folder.mkdir(parents=True)
    (folder / "9.j2").write_text("Describe {{ facts.title }} in {{ wanted }} words, anew.\n")
    scenario.write_text(scenario.read_text().replace("factual/2", "factual/9"))
    render_prompts(world.work, scenario, LATER.date())
    report = world.refresh(budget=Budget(calls=5))
    assert report["due"]["template"] == {"item": 8, "user": 0}
    assert report["chosen"] == {"item": 1, "user": 4}
    [changed] = [r for r in world.records("item").values() if r.template == "factual/9"]
    _, tensors = world.rank("u0", changed.id)
    np.testing.assert_allclose(tensors["item_knowledge"][0], expected(world.release, changed.text), atol=SCORE_LIMIT)
    [(stored,)] = world.store.read([EntityKey(ITEM, changed.id)], [TEXT])
    assert records_pb2.KnowledgeRecord.FromString(stored) == changed


def test_expired_texts_are_rewritten(world: World) -> None:
    report = world.refresh(policy=Policy(100), now=at(LATER + timedelta(days=31)))
    # It is Christmas by then: the season is one more reason.
    assert (report["due"]["expired"], report["calls"]) == ({"item": 0, "user": 4}, 4)
    assert {record.context["season"] for record in world.records("user").values()} == {"christmas"}


def test_the_dataset_keeps_its_split_and_training_sees_the_moved_cutoffs(world: World) -> None:
    before = world.dataset()
    world.refresh(**world.files)
    after = world.dataset()
    assert after.split == before.split
    assert (after.offsets[-1] - after.offsets[0], len(after.sample_events)) == (27, 0)
    assert [int(after.event_split[after.offsets[row]]) for row in range(4)] == [
        int(before.event_split[before.offsets[row]]) for row in range(4)
    ]


def test_training_refuses_texts_that_know_samples(world: World) -> None:
    world.refresh()
    build_dataset(world.work)
    with pytest.raises(PreconditionError, match=r"'u0' was written from 6 events, .* samples from event 4 on"):
        train(world.work, ["dcnv2"], ["knowledge"], workers=0)
    assert world.refresh()["calls"] == 0
    assert world.dataset().cutoff.tolist() == [6, 6, 6, 6]


def test_a_kill_between_taking_a_folder_away_and_putting_the_new_one_there_loses_nothing(world: World) -> None:
    world.refresh(**world.files)
    (world.work.dataset).rename(world.work.root / ".dataset.draft")
    assert world.refresh(**world.files)["arrived"]["events"] == 0
    assert len(world.dataset().event_item) == 27


def test_a_wrong_line_changes_nothing(world: World) -> None:
    before = (world.work.dataset / "stage.json").read_bytes()
    files = {"events": write_lines(world.work.root.parent / "wrong.jsonl", [{"user": "u0", "item": "gone"}])}
    with pytest.raises(InputError, match="line 1"):
        world.refresh(**files)
    assert (world.work.dataset / "stage.json").read_bytes() == before


def test_a_release_that_is_not_published_is_named_before_anything_is_paid(world: World) -> None:
    provider = model()
    world.store.write_meta(f"space:{world.release.manifest.adapted_space.space_id}", None)
    with pytest.raises(PreconditionError, match="run `kar publish` first"):
        world.refresh(provider)
    assert not provider.asked


def test_a_dry_run_of_the_command_prints_the_plan(world: World, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    lines = [{"id": "i8", "text": model().script(f'About "{TITLES[0]}"')}]
    write_lines(tmp_path / "pack" / "item.jsonl", lines)
    app = typer.Typer()
    app.command()(command)
    options = [
        *("--work", str(world.work), "--events", str(world.files["events"]), "--dry-run"),
        *("--entities", str(world.files["entities"]), "--pack", str(tmp_path / "pack"), "--grown-by", "2"),
        *("--json", str(tmp_path / "report.json")),
    ]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert "new: 1 users, 1 items, 3 events" in result.output
    assert "nothing was changed or sent" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    # The release's model reads no texts about users.
    assert (report["chosen"], report["waiting"]["user"]) == ({"item": 1, "user": 0}, 0)
    CliRunner().invoke(app, [*options, "--kind", "item", "--kind", "user"], catch_exceptions=False)
    report = json.loads((tmp_path / "report.json").read_text())
    # The pack knows the film alone.
    assert (report["chosen"], report["waiting"]["user"]) == ({"item": 1, "user": 0}, 5)


def test_events_that_come_late_reach_the_store(world: World) -> None:
    world.refresh(**world.files)
    schema = world.release.manifest.feature_schema
    for hours in (1, 2):
        late = [{"user": "u0", "item": f"i{5 + hours}", "rating": 3.0, "time": NOON_S - hours * 3600}]
        files = {"events": write_lines(world.work.root.parent / "late.jsonl", late)}
        assert world.refresh(policy=Policy(100), **files)["written"]["features"] == 1
        assert world.refresh(policy=Policy(100), **files)["written"]["features"] == 0
        [(features,)] = world.store.read([EntityKey(USER, "u0")], [FEATURES])
        told = FeatureLayout(schema, USER).decode_user(features).history.item_ids
        assert told == ("i0", "i1", "i2", "i3", "i4", "i5", *(["i7"] if hours == 2 else []), "i6", "i8", "i7")


def test_fresher_features_of_others_stay(world: World) -> None:
    layout = FeatureLayout(world.release.manifest.feature_schema, USER)
    theirs = layout.encode(layout.row({"age": 77}), written_at_ms=(NOON_S + 2) * 1000)
    world.store.write(FEATURES, [(EntityKey(USER, "u0"), theirs)])
    world.refresh(**world.files)
    assert world.store.read([EntityKey(USER, "u0")], [FEATURES]) == [(theirs,)]


def test_the_index_keeps_the_recall_that_it_was_published_with(world: World) -> None:
    root = world.work.index / world.release_id
    options = {"force": True, "indexing": IndexConfig(recall=0.75)}
    publish_release(world.release, world.dataset(), world.store, root, **options)
    before = read_current(root / "item")
    world.refresh(**world.files)
    after = read_current(root / "item")
    assert before != after is not None
    held = open_snapshot(root / "item" / after.snapshot_id)
    held.lock.close()
    assert (held.record["count"], held.record["recall"]["required"]) == (9, 0.75)


def test_a_release_of_other_vectors_than_its_training_is_refused(world: World) -> None:
    world.refresh(policy=Policy(2, kinds=frozenset({"item"})), **world.files)
    other = str(export(world.work, "dcnv2", now_s=LATER.timestamp).report.release_id)
    assert other != world.release_id
    provider = model()
    with pytest.raises(PreconditionError, match="exported from other vectors than its model was trained on"):
        refreshed(world.work, provider, published(world.work, other), other)
    assert not provider.asked


def test_an_imputed_vector_expires_with_its_neighbours_new_text(world: World) -> None:
    release = world.release
    for folder, days in ((release.folder, 30), (world.work.root, 90)):
        records = {record.id: record for record in read_knowledge(folder / "knowledge", "user")}
        records["u0"].expires_at.FromSeconds(NOON_S + days * DAY_S)
        loan = records_pb2.Loan(id="u0", weight=1)
        records["u1"].CopyFrom(records_pb2.KnowledgeRecord(id="u1", entity=USER.number, loans=[loan]))
        lines = "".join(record_line(record) + "\n" for record in records.values())
        (folder / "knowledge" / "user.jsonl").write_text(lines)
    now_ms = round(LATER.timestamp() * 1000)
    # u0's record has another expiry; u1's record and vector are the same.
    knowledge, encoding = world.work.read(Knowledge), world.work.read(Encoding)
    written = publish_knowledge(
        ReleaseTarget.check(release, world.store, world.dataset(), encoding),
        world.store,
        world.work.index / release.release_id,
        dataset=world.dataset(),
        knowledge=knowledge,
        encoding=encoding,
        clock=lambda: now_ms,
    )
    assert written["encoded"] == 2
    part = vector_part(release.manifest.encoded_space.space_id)
    for (blob,) in world.store.read([EntityKey(USER, "u0"), EntityKey(USER, "u1")], [part]):
        assert read_header(blob).expires_at_ms == (NOON_S + 90 * DAY_S) * 1000

"""A simulated month: days cut by hand, what budgets buy, what is known on a morning, and no look ahead."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.studies.freshness.inputs import KnowledgeByMorning
from kar_bench.studies.freshness.measure import measure_freshness
from kar_bench.studies.freshness.simulation import (
    DAY_S,
    NEVER,
    Call,
    Month,
    SimulatedHistory,
    preference_text,
    simulate,
)
from kar_bench.studies.freshness.study import FreshnessBenchmarkOptions, FreshnessVariant
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.encode import encode
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.evaluate.metrics import auc
from kar_offline.knowledge.records import write_knowledge
from kar_offline.prompts import render_prompts
from kar_offline.refresh.policy import Reason
from kar_offline.train.arms import ARMS
from kar_offline.train.features import encode_dataset
from kar_offline.train.settings import TrainSettings
from kar_offline.train.vectors import TextVectors, torch
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER, EntityKind
from kar_sidecar.errors import InputError, PreconditionError

pytestmark = pytest.mark.unit

SETTINGS = TrainSettings(epochs=1, batch=64, dedicated_experts=1, shared_experts=1, expert_hidden=8)
SMALL = FreshnessBenchmarkOptions(budgets=(2,), model="dcn", seeds=(0,), share=0.5, days=3)
GENRES = ("War", "Drama", "Comedy")


def log(user, item, rating, day, users=None, items=None):
    """A dataset of events at noon of days, seconds apart in the order given."""
    user, item = np.array(user), np.array(item)
    return Dataset.from_events(
        "log",
        records_pb2.FeatureSchema(
            history_length=4,
            features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
        ),
        [Entity(f"u{i}", {"age": i}, {}) for i in range(users or user.max() + 1)],
        [
            Entity(f"i{i:02}", {}, {"title": f"Film {i}", "genres": [GENRES[i % 3]]})
            for i in range(items or item.max() + 1)
        ],
        user=user,
        item=item,
        rating=np.array(rating, np.float32),
        time=np.array(day) * DAY_S + DAY_S // 2 + np.arange(len(user)),
        positive_above=3,
    )


@pytest.fixture
def small():
    """Two users and four items on days 0 to 4; item 3 comes after the month."""
    return log(
        user=[0, 0, 1, 0, 1, 1, 0, 1],
        item=[0, 1, 0, 2, 1, 2, 1, 3],
        rating=[5, 1, 4, 5, 2, 3, 4, 5],
        day=[0, 0, 1, 1, 2, 2, 3, 4],
    )


def month_of(dataset):
    return Month.of(dataset, share=0.5, days=2)


def test_the_days_of_a_month_by_hand(small):
    month = month_of(small)
    # Four of eight events come before day 2; the month is days 2 and 3.
    assert (month.first, month.end) == (2, 4)
    assert month.dataset.event_user.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert month.event_day.tolist() == [0, 0, 1, 3, 1, 2, 2]
    assert month.dataset.event_split.tolist() == [TRAIN, TRAIN, VALIDATION, TEST, VALIDATION, TEST, TEST]
    assert month.dataset.samples(TEST).tolist() == [3, 5, 6]
    assert month.item_day.tolist() == [0, 0, 1, NEVER]
    assert month.events_by_morning.tolist() == [0, 0, 2, 3, 0, 1, 1]


def test_a_log_without_a_clock_or_without_a_month_is_refused(small):
    with pytest.raises(PreconditionError, match="has no times"):
        month_of(replace(small, shared_clock=False))
    with pytest.raises(InputError, match="begins after a share"):
        Month.of(small, share=1, days=2)
    with pytest.raises(PreconditionError, match="too few events"):
        Month.of(small, share=0.01, days=2)


def test_one_call_a_day_by_hand(small):
    # Evening 0: user 0 with two events before items with one each. Evening 1: item 0 with two before all with one.
    # Evening 2: user 1 with three before items 1 and 2 with two. Evening 3: item 1 with three.
    life = simulate(month_of(small), ("item", "user"), 1)
    assert [(call.day, call.kind, call.row, call.cutoff, call.reason) for call in life.calls] == [
        (0, "user", 0, 2, Reason.NEW),
        (1, "item", 0, 0, Reason.NEW),
        (2, "user", 1, 3, Reason.NEW),
        (3, "item", 1, 0, Reason.NEW),
    ]
    assert life.waiting.tolist() == [2, 3, 2, 1]
    assert life.asked_on(4).tolist() == [1, 3, NEVER, NEVER]
    # User 0 has a text on days 1 and 3, user 1 would from day 3 on.
    assert life.version_at(month_of(small)).tolist() == [-1, -1, 0, 0, -1, -1, -1]


def random_log(events=600, days=10, seed=0):
    rng = np.random.default_rng(seed)
    user, day = rng.integers(0, 15, events), np.sort(rng.integers(0, days, events))
    return log(user, rng.integers(0, 20, events), rng.integers(1, 6, events), day, 15, 20)


@pytest.mark.parametrize("kinds", [("item",), ("item", "user")])
def test_no_budget_asks_nothing_and_any_number_leaves_nothing_waiting(kinds):
    month = month_of(random_log())
    nothing, everything = simulate(month, kinds, 0), simulate(month, kinds, None)
    assert nothing.calls == ()
    assert nothing.waiting[-1] >= len(np.unique(month.dataset.event_item))
    assert not everything.waiting.any()
    assert {call.row for call in everything.calls if call.kind == "item"} == set(month.dataset.event_item.tolist())
    assert {call.kind for call in everything.calls} == set(kinds)


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_day_never_takes_more_calls_than_its_budget(budget):
    life = simulate(month_of(random_log()), ("item", "user"), budget)
    of_day = Counter(call.day for call in life.calls)
    assert max(of_day.values()) == budget
    # What waits is asked about before a call is left over.
    assert all(life.waiting[day] == 0 for day in range(len(life.waiting)) if of_day[day] < budget)


def test_texts_about_users_know_what_there_was_on_their_evening_and_are_in_use_the_day_after():
    month = month_of(random_log())
    life = simulate(month, ("item", "user"), 4)
    start = month.dataset.offsets
    for call in life.versions:
        own = month.event_day[start[call.row] : start[call.row + 1]]
        assert call.cutoff == np.sum(own <= call.day)
    version = life.version_at(month)
    for event, number in enumerate(version.tolist()):
        earlier = [
            at
            for at, call in enumerate(life.versions)
            if call.row == month.dataset.event_user[event] and call.day < month.event_day[event]
        ]
        assert number == (earlier[-1] if earlier else -1)
        if number >= 0:
            assert life.versions[number].cutoff <= event - start[month.dataset.event_user[event]]
    grown = [call for call in life.versions if call.reason is Reason.GROWN]
    assert grown
    for call in grown:
        before = [one for one in life.versions if one.row == call.row and one.day < call.day][-1]
        assert call.cutoff - before.cutoff >= 10


def test_a_template_made_text_by_hand():
    films = [Entity(str(n), {}, {"title": f"Film {n}", "genres": [GENRES[n % 3]]}) for n in range(4)]
    # Mean 3: War +2 - 1 = 1, Drama 1, Comedy -2.
    told = preference_text(list(zip(films, [5, 4, 1, 2], strict=True)))
    assert told == "Likes the genres Drama, War. Enjoyed Film 0, Film 1. Likes less the genres Comedy. " + (
        "Did not enjoy Film 2, Film 3."
    )
    assert preference_text([(Entity("7", {}, {}), 3.0)]) == "Enjoyed 7."


@pytest.fixture
def mornings(small):
    """Item 0 is asked about on evening 0, item 1 on evening 1, where the text of item 1 was refused."""
    month = month_of(small)
    calls = (Call(0, "item", 0, 0, Reason.NEW), Call(1, "item", 1, 0, Reason.NEW), Call(1, "user", 0, 3, Reason.NEW))
    own = torch.eye(4)
    released = TextVectors("e", torch.zeros(2, 4), torch.zeros(2) > 0, own, torch.tensor([True, False, True, True]))
    raw = np.ones((4, 4), np.float32)
    life = SimulatedHistory(calls, np.zeros(4, np.int64))
    versions = np.full((1, 4), 0.5, np.float32)
    return KnowledgeByMorning.of(month, encode_dataset(month.dataset), life, ARMS["paper"], released, raw, versions)


def test_what_is_known_of_items_on_a_morning_by_hand(mornings):
    vectors, present = mornings.items(0)
    assert not present.any()
    assert not vectors.any()
    # On day 1 item 0 has its text and item 1 borrows it; item 2 was not seen by then.
    vectors, present = mornings.items(1)
    assert present.tolist() == [True, True, False, False]
    np.testing.assert_allclose(vectors[:2], torch.eye(4)[[0, 0]])
    vectors, present = mornings.items(3)
    assert present.tolist() == [True, True, True, False]
    assert mornings.items(3, impute=False)[1].tolist() == [True, False, False, False]


def test_what_is_known_of_users_by_hand(mornings):
    # User 0 has a text, written from three events, on day 3; its row comes behind those of both users without.
    assert mornings.user_row.tolist() == [0, 0, 0, 2, 1, 1, 1]
    assert mornings.data.columns["user_numeric"].tolist() == [[0], [1], [0]]  # of training users, the first alone
    given = mornings.inputs(3)
    assert given.texts.user_present.tolist() == [False, False, True]
    assert given.texts.user[2].tolist() == [0.5] * 4


def test_levels_by_hand(mornings):
    # Events 3 (user 0, item 1, day 3), 5 and 6 (user 1, items 1 and 2, day 2).
    found = to_json(mornings.levels(mornings.month.dataset.samples(TEST)))
    assert found["item"] == {"full": 0, "lent": 1, "neutral": 0}
    assert found["user"] == {"full": pytest.approx(1 / 3), "neutral": pytest.approx(2 / 3)}
    assert found["age_days"] == {"item": None, "user": 2}
    assert found["unknown_ratio"] == pytest.approx(2 / 3)  # nothing, all and all of one's events


def prepare(work, dataset, refused=()):
    """All stages up to the vectors; items `refused` have no text."""
    work.dataset.mkdir(parents=True)
    dataset.save(work.dataset)
    render_prompts(work)
    work.knowledge.mkdir()
    write_knowledge(
        work.knowledge,
        [
            records_pb2.KnowledgeRecord(
                id=one.id, entity=EntityKind(kind).number, text=f"A text about {one.id}, {GENRES[at % 3]}"
            )
            for kind, entities in (("item", dataset.items), ("user", dataset.users))
            for at, one in enumerate(entities)
            if one.id not in refused
        ],
    )
    encode(work, HashingEncoder())
    return work


def measure(work, options=SMALL):
    """The report as JSON."""
    return to_json(measure_freshness(work, "encoding", options, SETTINGS, HashingEncoder, workers=0, resamples=20))


def test_the_report_tells_what_the_predictions_give_and_a_second_run_trains_nothing(tmp_path):
    work = prepare(WorkFolder(tmp_path), random_log())
    heard = []
    report = to_json(
        measure_freshness(
            work,
            "encoding",
            SMALL,
            SETTINGS,
            HashingEncoder,
            workers=0,
            resamples=20,
            on_epoch=lambda *told: heard.append(told[1:]),
        )
    )
    assert heard[-1] == (0, 8, 8)
    assert [(e["arm"], e["budget"], e["loans"]) for e in report["summary"]] == [
        FreshnessVariant("control", 0, "never"),
        *(FreshnessVariant("knowledge", budget, "never") for budget in (0, 2, None)),
        FreshnessVariant("knowledge", 2, "served"),
        FreshnessVariant("knowledge", 2, "trained"),
        *(FreshnessVariant("paper", budget, "never") for budget in (0, 2, None)),
    ]
    month = Month.of(work.read(Dataset), share=0.5, days=3)
    labels = month.dataset.labels[month.dataset.samples(TEST)]
    folder = work.root / "freshness" / "3_days_from_0.5"
    for row in report["rows"]:
        name = f"dcn_{row['arm']}_{'any' if row['budget'] is None else row['budget']}"
        name += ("_on_loans" if row["loans"] == "trained" else "") + "_seed0"
        assert row["auc"] == auc(labels, np.load(folder / name / f"predictions_{row['loans']}.npy"))
    mean = {(e["arm"], e["budget"], e["loans"]): e["auc"] for e in report["summary"]}
    assert mean == {(row["arm"], row["budget"], row["loans"]): row["auc"] for row in report["rows"]}
    summary = {(e["arm"], e["budget"]): e for e in report["summary"] if e["loans"] == "never"}
    served = next(e for e in report["summary"] if e["loans"] == "served")
    assert served["levels"]["item"]["lent"] > 0
    assert served["levels"]["item"]["full"] == summary["knowledge", 2]["levels"]["item"]["full"] > 0
    assert summary["knowledge", 2]["levels"]["item"]["lent"] == 0
    some = summary["paper", 2]
    assert sum(some["calls"].values()) <= 3 * 2
    assert some["calls_before"] == 2 * month.first
    assert summary["paper", 0]["calls"] == {}
    assert summary["paper", 0]["usd"] == 0
    assert set(some["minus"]) == {"control", "no_calls", "all_calls"}
    assert some["minus"]["no_calls"]["mean"] == pytest.approx(some["auc"] - summary["paper", 0]["auc"])
    assert summary["knowledge", None]["waiting"] == 0
    assert summary["knowledge", None]["levels"]["user"]["full"] == 0
    assert summary["paper", None]["levels"]["user"]["full"] > 0.5
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert measure(work) == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == times


def test_an_item_whose_released_text_was_refused_has_none_of_its_own(tmp_path):
    work = prepare(WorkFolder(tmp_path), random_log(), refused={"i05"})
    report = measure(work, replace(SMALL, arms=("knowledge",), budgets=()))
    month = Month.of(work.read(Dataset), share=0.5, days=3)
    others = month.dataset.event_item[month.dataset.samples(TEST)] != 5
    [levels] = [e["levels"]["item"] for e in report["summary"] if e["arm"] == "knowledge" and e["budget"] is None]
    assert levels == {"full": others.mean(), "lent": 0, "neutral": (~others).mean()}
    assert others.mean() < 1


def test_the_scores_of_a_day_use_no_later_event(tmp_path):
    dataset = random_log()
    month = Month.of(dataset, share=0.5, days=3)
    last = (dataset.event_time - dataset.event_time.min()) // DAY_S >= month.end - 1
    rating = np.where(last, 6 - dataset.event_rating, dataset.event_rating)
    item = np.where(last, (dataset.event_item + 1) % 20, dataset.event_item)
    changed = replace(dataset, event_rating=rating.astype(np.float32), event_item=item.astype(np.int32))
    files = []
    for name, one in (("as_it_was", dataset), ("changed", changed)):
        measure(prepare(WorkFolder(tmp_path / name), one))
        files.append(sorted((tmp_path / name / "freshness").rglob("predictions*.npy")))
    earlier = month.event_day[month.dataset.samples(TEST)] < month.end - 1
    assert 0 < earlier.sum() < len(earlier)
    assert len(files[0]) == 9
    for one, other in zip(*files, strict=True):
        scores = np.load(one), np.load(other)
        np.testing.assert_array_equal(scores[0][earlier], scores[1][earlier])
        assert (scores[0][~earlier] != scores[1][~earlier]).any()


def test_the_command_writes_json_and_a_picture(tmp_path):
    work = prepare(WorkFolder(tmp_path / "work"), random_log())
    options = ["freshness", "--dataset", "prepared", "--work", str(work), "--model", "dcn", "--arm", "knowledge"]
    more = ["--budget", "2", "--share", "0.5", "--days", "3", "--seed", "0", "--epochs", "1", "--workers", "0"]
    out = ["--usd-per-million", "1", "2", "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]
    done = CliRunner().invoke(bench, [*options, *more, *out], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "f.json").read_text())
    assert [entry["budget"] for entry in report["summary"]] == [0, 0, 2, None, 2, 2]
    spent = report["summary"][2]
    assert spent["usd"] == pytest.approx((spent["tokens_read"] + 2 * spent["tokens_written"]) / 1e6, abs=2e-6)
    assert "template-made" in done.output
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_arm_is_refused(tmp_path):
    told = CliRunner().invoke(bench, ["freshness", "--dataset", "prepared", "--work", str(tmp_path), "--arm", "cf"])
    assert told.exit_code != 0
    assert "arm 'cf' is not known" in str(told.exception)

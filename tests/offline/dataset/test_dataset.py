from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import PROMPT_EVENTS, Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION, hash_fraction, split_of
from kar_offline.prompts import Renderer, load_scenario
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError

pytestmark = pytest.mark.unit

Event = tuple[int, int, float, int]  # user, item, rating, time
USERS, ITEMS = 3, 80


def make(events: list[Event], users: int = USERS, items: int = ITEMS) -> Dataset:
    user, item, rating, time = (np.array(column) for column in zip(*events, strict=True))
    return Dataset.from_events(
        "made",
        records_pb2.FeatureSchema(history_length=5),
        [Entity(f"u{row}", {"age": row}, {"age": row}) for row in range(users)],
        [Entity(f"i{row}", {}, {"title": f"<{row}>"}) for row in range(items)],
        user=user.astype(np.int64),
        item=item.astype(np.int64),
        rating=rating.astype(np.float32),
        time=time.astype(np.int64),
        seed=7,
        positive_above=3.0,
    )


def of_user(events: list[Event], user: int) -> list[Event]:
    return sorted((e for e in events if e[0] == user), key=lambda e: (e[3], e[1]))


logs = st.lists(
    st.tuples(
        st.integers(0, USERS - 1),
        st.integers(0, ITEMS - 1),
        st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=120,
    unique_by=lambda event: event[:2],
)


@settings(deadline=None)
@given(logs)
def test_events_are_in_time_order_and_ties_in_item_order(events: list[Event]) -> None:
    dataset = make(events)
    ordered = [event for user in range(USERS) for event in of_user(events, user)]
    assert dataset.event_user.tolist() == [event[0] for event in ordered]
    assert dataset.event_item.tolist() == [event[1] for event in ordered]
    assert dataset.event_rating.tolist() == [event[2] for event in ordered]
    assert dataset.event_time.tolist() == [event[3] for event in ordered]


@settings(deadline=None)
@given(logs, st.integers(1, 12))
def test_a_history_is_the_last_events_before_the_target(events: list[Event], length: int) -> None:
    dataset = make(events)
    samples = dataset.sample_events
    items, ratings = dataset.history_windows(samples, length)
    assert items.shape == ratings.shape == (len(samples), length)
    for row, sample in enumerate(samples.tolist()):
        user = int(dataset.event_user[sample])
        own = of_user(events, user)
        target = next(place for place, event in enumerate(own) if event[1] == dataset.event_item[sample])
        before = own[max(0, target - length) : target]
        padding = length - len(before)
        assert items[row].tolist() == [event[1] for event in before] + [-1] * padding
        assert ratings[row].tolist() == [event[2] for event in before] + [0.0] * padding
        assert dataset.event_item[dataset.history(sample, length)].tolist() == [event[1] for event in before]
        assert own[target][1] not in items[row]


@settings(deadline=None)
@given(logs)
def test_prompts_show_exactly_the_events_that_are_no_samples(events: list[Event]) -> None:
    dataset = make(events)
    sampled = {(int(dataset.event_user[e]), int(dataset.event_item[e])) for e in dataset.sample_events}
    prompts = {p.id: p for p in Renderer(load_scenario()).render(dataset) if p.entity == "user"}
    for user in range(USERS):
        own = of_user(events, user)
        shown = own[: min((len(own) + 1) // 2, 30)]
        assert {item for u, item in sampled if u == user} == {event[1] for event in own[len(shown) :]}
        if own:
            prompt = prompts[f"u{user}"]
            assert prompt.history_cutoff == len(shown)
            for text in (prompt.prompt, prompt.raw_text):
                assert {i for i in range(ITEMS) if f"<{i}>" in text} == {event[1] for event in shown}
        else:
            assert f"u{user}" not in prompts


def test_cutoffs_by_hand() -> None:
    lengths = [1, 2, 3, 59, 60, 61, 80]
    events = [(user, item, 4.0, item) for user, length in enumerate(lengths) for item in range(length)]
    dataset = make(events, users=len(lengths))
    assert dataset.cutoff.tolist() == [1, 1, 2, 30, 30, 30, 30]
    assert PROMPT_EVENTS == 30
    assert len(dataset.sample_events) == 0 + 1 + 1 + 29 + 30 + 31 + 50
    assert dataset.prompt_events(2) == slice(3, 5)


def test_labels_are_ratings_above_three() -> None:
    dataset = make([(0, item, float(item + 1), item) for item in range(5)], users=1)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]


def test_each_sample_is_in_the_split_of_its_user() -> None:
    dataset = make([(user, item, 4.0, 0) for user in range(40) for item in range(4)], users=40)
    by_split = [dataset.samples(split) for split in range(len(SPLITS))]
    assert sorted(np.concatenate(by_split).tolist()) == dataset.sample_events.tolist()
    for split, samples in enumerate(by_split):
        assert {split_of(7, f"u{row}") for row in dataset.event_user[samples]} <= {split}


def test_splits_have_their_shares_and_follow_the_seed() -> None:
    splits = np.array([split_of(1, str(user)) for user in range(20_000)])
    shares = np.bincount(splits, minlength=3) / len(splits)
    # Three standard deviations of a share near one half at this size are 0.011.
    np.testing.assert_allclose(shares[[TRAIN, VALIDATION, TEST]], [0.72, 0.08, 0.20], atol=0.011)
    assert any(split_of(1, str(user)) != split_of(2, str(user)) for user in range(100))
    assert hash_fraction(1, "23") != hash_fraction(12, "3")


def test_a_saved_dataset_loads_equal(tmp_path: Path) -> None:
    dataset = make([(user, item, item % 5 + 1.0, item // 2) for user in range(USERS) for item in range(9)])
    dataset.save(tmp_path)
    loaded = Dataset.load(tmp_path)
    assert (loaded.name, loaded.schema, loaded.positive_above) == (dataset.name, dataset.schema, 3.0)
    assert (loaded.users, loaded.items) == (dataset.users, dataset.items)
    for name in ("offsets", "event_item", "event_rating", "event_time", "cutoff", "event_split"):
        one, other = getattr(dataset, name), getattr(loaded, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_missing_dataset_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="kar dataset"):
        Dataset.load(tmp_path)


@pytest.mark.parametrize("file", ["dataset.json", "users.jsonl", "items.jsonl", "events.npz"])
def test_a_corrupt_dataset_is_refused(file: str, tmp_path: Path) -> None:
    make([(0, 0, 4.0, 0), (1, 1, 4.0, 0)]).save(tmp_path)
    (tmp_path / file).write_text("{")
    with pytest.raises(IntegrityError, match=str(tmp_path)):
        Dataset.load(tmp_path)


def test_inconsistent_events_are_refused() -> None:
    dataset = make([(0, 0, 4.0, 1), (0, 1, 4.0, 2)], users=1)
    with pytest.raises(IntegrityError, match="order"):
        replace(dataset, event_time=dataset.event_time[::-1].copy())
    with pytest.raises(IntegrityError, match="sizes"):
        replace(dataset, cutoff=np.array([3], dtype=np.int32))


def many(users: int = 500) -> Dataset:
    return make([(user, item, 4.0, 0) for user in range(users) for item in range(3)], users=users)


def test_every_user_is_tested_in_exactly_one_fold() -> None:
    folds = [many().split_by_user(fold, folds=4, seed=3) for fold in range(4)]
    tested = np.stack([dataset.event_split == TEST for dataset in folds])
    assert (tested.sum(0) == 1).all()
    for dataset in folds:
        of_user = dataset.event_split.reshape(-1, 3)
        assert (of_user == of_user[:, :1]).all()
        # One in ten of the users that are not tested, 500 * .75 * .1, within four standard deviations.
        assert abs((of_user[:, 0] == VALIDATION).sum() - 37.5) < 24
    assert folds[2].split == "users, fold 2 of 4, seed 3"


def test_the_first_of_five_folds_tests_the_lowest_hashes() -> None:
    dataset = many().split_by_user(seed=7)
    fractions = np.array([hash_fraction(7, user.id) for user in dataset.users])
    expected = np.where(fractions < 0.2, TEST, np.where(fractions < 0.28, VALIDATION, TRAIN))
    assert dataset.event_split[::3].tolist() == expected.tolist()
    np.testing.assert_array_equal(dataset.event_split, many().event_split)


def test_less_training_takes_whole_training_users_and_nobody_else() -> None:
    whole = many().split_by_user(seed=7)
    half, tenth = whole.with_less_training(0.5), whole.with_less_training(0.1)
    for less, share in ((half, 0.5), (tenth, 0.1)):
        for split in (VALIDATION, TEST):
            before, after = whole.samples(split), less.samples(split)
            for name in ("event_user", "event_item", "event_rating", "event_time", "labels"):
                np.testing.assert_array_equal(getattr(whole, name)[before], getattr(less, name)[after])
        trained = len(np.unique(less.event_user[less.event_split == TRAIN]))
        assert abs(trained - 360 * share) < 4 * (360 * share * (1 - share)) ** 0.5  # four standard deviations
        assert set(np.bincount(less.event_user, minlength=500)) == {0, 3}
    assert set(tenth.event_user) < set(half.event_user) < set(whole.event_user)
    assert whole.with_less_training(1).event_item.tolist() == whole.event_item.tolist()


def test_a_fold_that_does_not_exist_is_refused() -> None:
    for fold, folds in ((5, 5), (-1, 5), (0, 1)):
        with pytest.raises(InputError, match=f"fold {fold} of {folds}"):
            many(3).split_by_user(fold, folds)


def test_a_split_by_time_by_hand() -> None:
    # Each user's first two of four events may be shown; samples are at 3, 5 | 4, 9 | 6, 6 | 7, 8 | 9, 9.
    times = [(1, 2, 3, 5), (0, 1, 4, 9), (2, 9, 9, 9), (6, 6, 6, 6), (1, 7, 7, 8)]
    dataset = make([(u, i, 4.0, t) for u, own in enumerate(times) for i, t in enumerate(own)], users=5)
    assert dataset.event_time[dataset.sample_events].tolist() == [3, 5, 4, 9, 9, 9, 6, 6, 7, 8]
    # Sorted 3 4 5 6 6 7 8 9 9 9: the last four begin at 8 (place 6), the two before them at 6, which is a tie.
    split = dataset.split_by_time(test_share=0.4, validation_share=0.2)
    expected = [[TRAIN if t < 6 else VALIDATION if t < 8 else TEST for t in own] for own in times]
    assert split.event_split.reshape(5, 4).tolist() == expected
    assert {int(t) for t in split.event_time[split.samples(TEST)]} == {8, 9}
    assert split.split.startswith("time")


def test_a_split_by_time_needs_times() -> None:
    alike = make([(user, item, 4.0, 5) for user in range(2) for item in range(6)])
    with pytest.raises(PreconditionError, match="no train samples"):
        alike.split_by_time()
    with pytest.raises(PreconditionError, match="only each user's order"):
        replace(many(), shared_clock=False).split_by_time()


def test_a_stored_split_is_loaded(tmp_path: Path) -> None:
    replace(many().split_by_user(1), shared_clock=False).save(tmp_path)
    loaded = Dataset.load(tmp_path)
    assert (loaded.split, loaded.shared_clock) == ("users, fold 1 of 5, seed 2024", False)
    np.testing.assert_array_equal(loaded.event_split, many().split_by_user(1).event_split)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(IntegrityError, match="sizes"):
        replace(many(3), event_split=np.full(9, 3, dtype=np.uint8))

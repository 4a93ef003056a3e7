"""Which entities share a text: near-duplicates, clusters, neighbours, and how many prompts that leaves."""

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.generate import collective
from kar_offline.generate.collective import cluster, duplicates, event_counts, plan_calls
from kar_offline.knowledge import imputation
from kar_offline.knowledge.imputation import neighbour_weights
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.unit

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]
"""Directions at 0 and 90 degrees."""


def at(degrees, length=1.0):
    """A vector of two components in that direction."""
    return length * np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], -1).astype(np.float32)


def told(loans):
    return [(loan.id, pytest.approx(loan.weight, abs=1e-6)) for loan in loans]


def softmax(cosines):
    odds = np.exp(np.array(cosines) / 0.1)
    return (odds / odds.sum()).tolist()


def cosine(degrees):
    return np.cos(np.radians(degrees))


def test_two_clear_groups():
    # Centres at 2.33 and 91.33 degrees, whatever the lengths.
    found = cluster(at(np.array([0.0, 90, 2, 91, 5, 93]), np.array([[1], [5], [1], [2], [9], [1]])), 2)
    assert {tuple(members) for members in found.members} == {(2, 0, 4), (3, 1, 5)}
    east = next(number for number, members in enumerate(found.members) if members[0] == 2)
    np.testing.assert_allclose(found.centres[[east, 1 - east]], at(np.array([2.333, 91.333])), atol=1e-4)


def test_with_enough_calls_everybody_is_alone():
    for calls in (3, 4):
        found = cluster(at(np.array([0.0, 0, 90])) * 3, calls)
        assert [members.tolist() for members in found.members] == [[0], [1], [2]]
        np.testing.assert_allclose(found.centres, [EAST, EAST, NORTH], atol=1e-6)


def test_equal_vectors_leave_no_empty_cluster():
    found = cluster(np.array([EAST] * 5 + [NORTH] * 4, np.float32), 5)
    assert sorted(map(len, found.members)) == [4, 5]
    assert found.centres.shape == (2, 2)


def test_zeros_are_a_vector_too():
    found = cluster(np.array([[0, 0], EAST, EAST, NORTH, [0, 0]], np.float32), 3)
    assert sorted(row for members in found.members for row in members) == [0, 1, 2, 3, 4]
    _, weights = neighbour_weights(np.zeros((1, 2), np.float32), found.centres, 2)
    assert weights.tolist() == [[0.5, 0.5]]


def test_a_seed_says_it_all_and_threads_nothing():
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    once, again, other = cluster(vectors, 20, seed=1), cluster(vectors, 20, seed=1, threads=2), cluster(vectors, 20)
    assert [m.tolist() for m in once.members] == [m.tolist() for m in again.members]
    assert [m.tolist() for m in once.members] != [m.tolist() for m in other.members]


def test_the_nearer_neighbour_weighs_more():
    nearest, weights = neighbour_weights(at(np.array([10.0, 80]), 7), at(np.array([0.0, 30, 90])), 2)
    assert nearest.tolist() == [[0, 1], [2, 1]]
    assert weights.dtype == np.float32
    assert weights.tolist() == [
        pytest.approx(softmax(cosine([10, 20])), rel=1e-5),
        pytest.approx(softmax(cosine([10, 50])), rel=1e-5),
    ]
    everybody, _ = neighbour_weights(at(np.array([10.0])), at(np.array([0.0, 30, 90])), 9)
    assert everybody.tolist() == [[0, 1, 2]]


def test_many_clusters_are_found_in_two_steps_and_cover_everybody_once():
    rng = np.random.default_rng(0)
    count, calls = 4000, collective.DIRECT + 200
    groups = rng.normal(size=(calls, 8))
    vectors = (groups[rng.integers(0, calls, count)] + 0.01 * rng.normal(size=(count, 8))).astype(np.float32)
    found = cluster(vectors, calls)
    assert sorted(np.concatenate(found.members).tolist()) == list(range(count))
    assert 0.9 * calls < len(found.members) <= calls
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert len(found.centres) == len(found.members)
    pairs = zip(found.members, found.centres, strict=True)
    assert np.mean([unit[members[0]] @ centre for members, centre in pairs]) > 0.95
    assert np.concatenate([unit[members] @ unit[members[0]] for members in found.members]).mean() > 0.9


def test_neighbours_among_many_are_found_without_looking_at_all():
    count = imputation.EXACT_SEARCH + 100
    vectors = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    vectors[count - 40 :] = vectors[:40]
    texts = [f"film {number}" for number in range(count - 40)] + [f"Film {number}" for number in range(40)]
    first = duplicates(vectors, texts)
    assert (first[: count - 40] == np.arange(count - 40)).all()
    assert (first[count - 40 :] == np.arange(40)).all()


def test_near_duplicates_share_with_the_first():
    words = " ".join(f"word{'abcdefghij'[i]}" for i in range(10))
    texts = [
        "Heat (1995). genres: Crime.",
        f"{words} {words} red",  # 21 words
        "HEAT, 1995! Genres: crime",  # the same words
        "Heat (1995). genres: Crime.",
        f"{words} {words} blue",  # 2 of 42 words differ: less than 5 %
        "Heat 2 (1995). genres: Crime.",  # a sequel
        "Heat (1995). genres: Crime.",  # the same words about something else: another vector
        "Ran (1985). genres: War.",
    ]
    vectors = at(np.array([0.0, 90, 3, 1, 93, 0, 40, 0]))
    assert duplicates(vectors, texts).tolist() == [0, 1, 0, 0, 1, 5, 6, 7]


def test_a_chain_of_near_duplicates_is_one_group():
    # 0 and 2 are 16 degrees apart, a cosine of .961; each is 8 degrees from 1, .990.
    assert duplicates(at(np.array([0.0, 8, 16])), ["same"] * 3).tolist() == [0, 0, 0]
    assert duplicates(at(np.array([0.0, 60, 16])), ["same"] * 3).tolist() == [0, 1, 2]


def test_one_entity_or_none():
    assert duplicates(np.zeros((0, 2), np.float32), []).tolist() == []
    assert duplicates(at(np.array([7.0])), ["one"]).tolist() == [0]
    nobody, one = (
        plan_calls([], [], np.zeros((0, 2), np.float32), 0.5),
        plan_calls(["a"], ["one"], at(np.array([7.0])), 0.01),
    )
    assert (nobody.calls, one.calls, one.own.tolist(), one.neighbour_weights(0)) == (0, 1, [0], [])


FILMS = ["a", "b", "c", "d", "e", "f"]
TEXTS = ["one", "two", "three", "four", "five", "ONE"]
ANGLES = np.array([0.0, 2, 40, 90, 92, 1])
"""f is a near-duplicate of a."""


def test_with_all_calls_only_near_duplicates_have_a_neighbour():
    found = plan_calls(FILMS, TEXTS, at(ANGLES), 1.0)
    assert found.own.tolist() == [0, 1, 2, 3, 4]
    assert found.clusters == {}
    assert found.calls == 5
    assert [told(found.neighbour_weights(row)) for row in range(6)] == [[]] * 5 + [[("a", 1)]]


def test_fewer_calls_cluster_the_rest():
    found = plan_calls(FILMS, TEXTS, at(ANGLES), 0.5)  # three calls for a and b, c, d and e
    assert found.calls == 3
    assert found.own.tolist() == [2]
    assert sorted(sorted(rows.tolist()) for rows in found.clusters.values()) == [[0, 1], [3, 4]]
    name = {min(rows): id_ for id_, rows in found.clusters.items()}
    # b is 1 degree from its centre, 38 from c and 89 from the third: there are no more.
    expected = dict(zip([name[0], "c", name[3]], softmax(cosine([1, 38, 89])), strict=True))
    assert {loan.id: loan.weight for loan in found.neighbour_weights(1)} == pytest.approx(expected, rel=1e-3)
    assert found.neighbour_weights(5) == found.neighbour_weights(
        0
    )  # the near-duplicate has the neighbours of the first of them
    # c has a prompt of its own, and others for the case that its text is refused: 39 and 51 degrees away.
    expected = dict(zip([name[0], name[3]], softmax(cosine([39, 51])), strict=True))
    assert {loan.id: loan.weight for loan in found.neighbour_weights(2)} == pytest.approx(expected, rel=1e-3)


def test_a_near_duplicate_of_an_entity_with_its_own_prompt_has_that_text():
    found = plan_calls(["a", "b", "c", "d"], ["one", "two", "three", "Two"], at(np.array([0.0, 90, 2, 90])), 0.5)
    assert found.own.tolist() == [1]
    assert told(found.neighbour_weights(3)) == [("b", 1)]


def test_one_neighbour():
    found = plan_calls(FILMS, TEXTS, at(ANGLES), 0.5, neighbours=1)
    assert [len(found.neighbour_weights(row)) for row in range(6)] == [1, 1, 0, 1, 1, 1]
    assert all(loan.weight == 1 for row in range(6) for loan in found.neighbour_weights(row))


def test_the_most_frequent_ask_for_themselves():
    # Two calls of three are for the head: e has 9 events, a and its near-duplicate f have 4 + 3.
    counts = np.array([4, 6, 6, 2, 9, 3])
    found = plan_calls(FILMS, TEXTS, at(ANGLES), 0.5, counts=counts)
    assert found.own.tolist() == [0, 4]
    ((name, rows),) = found.clusters.items()
    assert sorted(rows.tolist()) == [1, 2, 3]
    assert found.calls == 3
    assert told(found.neighbour_weights(5)) == [("a", 1)]
    # d stands 2 degrees from e, 90 from a, and where it stands from the cluster's centre.
    centre = sum(at(float(ANGLES[row])) for row in (1, 2, 3))
    angle = np.degrees(np.arctan2(centre[1], centre[0]))
    expected = dict(zip(["e", "a", name], softmax(cosine([2, 90, 90 - angle])), strict=True))
    assert {loan.id: loan.weight for loan in found.neighbour_weights(3)} == pytest.approx(expected, rel=1e-3)
    assert {loan.id for loan in found.neighbour_weights(0)} == {"e", name}


def test_without_a_head_there_are_clusters_alone():
    counts = np.array([4, 6, 6, 2, 9, 3])
    alone, unknown = (
        plan_calls(FILMS, TEXTS, at(ANGLES), 0.5, counts=counts, head=0),
        plan_calls(FILMS, TEXTS, at(ANGLES), 0.5),
    )
    assert alone.own.tolist() == unknown.own.tolist() == [2]
    one = plan_calls(FILMS, TEXTS, at(ANGLES), 0.01, counts=counts, head=1)
    assert (one.calls, one.own.tolist()) == (1, [])


def test_events_that_prompts_may_show_are_counted():
    people, films = [Entity(f"u{i}", {}, {}) for i in range(3)], [Entity(f"i{i}", {}, {}) for i in range(4)]
    dataset = Dataset(
        name="tiny",
        schema=records_pb2.FeatureSchema(history_length=3),
        users=people,
        items=films,
        offsets=np.array([0, 3, 3, 5]),
        event_item=np.array([0, 1, 2, 1, 3], np.int32),
        event_rating=np.ones(5, np.float32),
        event_time=np.arange(5),
        cutoff=np.array([2, 0, 1], np.int32),
        event_split=np.zeros(5, np.uint8),
        positive_above=3,
    )
    counts = event_counts(dataset)
    assert counts["item"].tolist() == [1, 2, 0, 0]
    assert counts["user"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("counts", [None, np.arange(100) % 7])
@pytest.mark.parametrize(("share", "calls"), [(0.1, 10), (0.305, 30), (0.001, 1)])
def test_no_more_calls_than_asked_for(share, calls, counts):
    vectors = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    found = plan_calls([str(i) for i in range(100)], [f"text {i}" for i in range(100)], vectors, share, counts=counts)
    assert found.calls == calls
    with_text = {*found.clusters, *(str(row) for row in found.own)}
    for row in range(100):
        loans = found.neighbour_weights(row)
        assert {loan.id for loan in loans} <= with_text - {str(row)}
        assert sum(loan.weight for loan in loans) == pytest.approx(1 if loans else 0, abs=1e-6)
        assert loans or calls == 1


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InputError, match="give one above 0 and at most 1"):
        plan_calls(FILMS, TEXTS, at(ANGLES), share)


def test_ids_that_look_like_clusters_are_refused():
    with pytest.raises(InputError, match="'cluster/1' is one of a cluster"):
        plan_calls(["cluster/1"], ["one"], at(np.array([0.0])), 0.5)

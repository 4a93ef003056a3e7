"""Expected values are the test vectors that GrowthBook publishes for its SDKs, and sums by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kar_sidecar.errors import InputError
from kar_sidecar.experiments.assignment import Assignment, Experiment, bucket_ranges, choose, fnv1a32, position

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("text", "expected"), [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968)])
def test_fnv1a32_gives_the_values_of_its_authors(text, expected):
    assert fnv1a32(text) == expected


def test_fnv1a32_reads_utf8():
    value = 0x811C9DC5
    for byte in (0xC3, 0xA9):
        value = (value ^ byte) * 16777619 % 2**32
    assert fnv1a32("é") == value


@pytest.mark.parametrize(
    ("seed", "value", "expected"),
    [
        ("seed", "a", 0.0505),
        ("seed", "b", 0.2696),
        ("foo", "ab", 0.2575),
        ("foo", "def", 0.2019),
        ("89123klj", "8952klfjas09ujkasdf", 0.124),
        ("90850943850283058242805", "123", 0.7516),
        ("()**(%$##$%#$#", '___)((*":&', 0.0128),
    ],
)
def test_positions_equal_growthbooks_vectors(seed, value, expected):
    assert position(seed, value) == expected


@pytest.mark.parametrize(
    ("count", "coverage", "weights", "expected"),
    [
        (2, 1, None, [(0, 0.5), (0.5, 1)]),
        (2, 0.5, None, [(0, 0.25), (0.5, 0.75)]),
        (2, 0, None, [(0, 0), (0.5, 0.5)]),
        (4, 1, None, [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]),
        (2, 1, [0.4, 0.6], [(0, 0.4), (0.4, 1)]),
        (3, 1, [0.2, 0.3, 0.5], [(0, 0.2), (0.2, 0.5), (0.5, 1)]),
        (3, 0.2, [0.2, 0.3, 0.5], [(0, 0.04), (0.2, 0.26), (0.5, 0.6)]),
        (2, -0.2, None, [(0, 0), (0.5, 0.5)]),
        (2, 1.5, None, [(0, 0.5), (0.5, 1)]),
        (2, 1, [0.4, 0.1], [(0, 0.5), (0.5, 1)]),
        (2, 1, [0.7, 0.6], [(0, 0.5), (0.5, 1)]),
        (4, 1, [0.4, 0.4, 0.2], [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]),
        (2, 1, [0.4, 0.5999], [(0, 0.4), (0.4, 0.9999)]),
    ],
)
def test_ranges_equal_growthbooks_vectors(count, coverage, weights, expected):
    ranges = bucket_ranges(count, coverage, weights)
    assert [bound for pair in ranges for bound in pair] == pytest.approx([bound for pair in expected for bound in pair])


HALVES, REDUCED, EMPTY = [(0, 0.5), (0.5, 1)], [(0, 0.25), (0.5, 0.75)], [(0, 0.5), (0.5, 0.5), (0.5, 1)]


@pytest.mark.parametrize(
    ("at", "ranges", "expected"),
    [
        (0, HALVES, 0),
        (0.4, HALVES, 0),
        (0.5, HALVES, 1),
        (0.8, HALVES, 1),
        (0.2, REDUCED, 0),
        (0.25, REDUCED, None),
        (0.4, REDUCED, None),
        (0.5, REDUCED, 1),
        (0.8, REDUCED, None),
        (0.5, EMPTY, 2),
    ],
)
def test_choices_equal_growthbooks_vectors(at, ranges, expected):
    assert choose(at, ranges) == expected


def test_users_inside_get_the_arm_of_their_range():
    experiment = Experiment(seed="seed", weights=(0.1, 0.9))
    assert experiment.assign("a") == Assignment("control", "knowledge")  # 0.0505
    assert experiment.assign("b") == Assignment("knowledge", "knowledge")  # 0.2696


def test_users_outside_get_the_first_arm_and_no_experiment():
    assert Experiment(seed="seed", coverage=0.1).assign("b") == Assignment("control", "")


shares = st.floats(0, 1)


@given(st.text(max_size=20), st.text(max_size=20), shares, shares, st.floats(0, 1))
def test_a_larger_coverage_moves_no_user_to_another_arm(seed, user, one, other, weight):
    low, high = sorted((one, other))
    weights = (weight, 1 - weight)
    before = Experiment(seed=seed, coverage=low, weights=weights).assign(user)
    after = Experiment(seed=seed, coverage=high, weights=weights).assign(user)
    assert not before.experiment or after == before


def test_arms_are_assigned_in_their_shares():
    experiment = Experiment(seed="shares", coverage=0.5, weights=(0.2, 0.8))
    drawn = [experiment.assign(f"user-{i}") for i in range(20_000)]
    inside = [assignment.arm for assignment in drawn if assignment.experiment]
    # Five standard deviations of a binomial.
    assert len(inside) / 20_000 == pytest.approx(0.5, abs=5 * (0.25 / 20_000) ** 0.5)
    assert inside.count("control") / len(inside) == pytest.approx(0.2, abs=5 * (0.16 / len(inside)) ** 0.5)


def test_overrides_force_an_arm_outside_of_the_experiment():
    experiment = Experiment(seed="seed")
    assert experiment.assign("a", {}) == Assignment("control", "knowledge")
    assert experiment.assign("a", {"knowledge": "knowledge"}) == Assignment("knowledge", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"other": "control"}, "experiment 'other'.*'knowledge'"),
        ({"knowledge": "best"}, "arm 'best'.*control, knowledge"),
        ({"knowledge": "control", "other": "control"}, "experiment 'other'"),
    ],
)
def test_unknown_overrides_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        Experiment().assign("a", overrides)

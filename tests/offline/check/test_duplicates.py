import random
from collections.abc import Sequence

import pytest

from kar_offline.check import Subject, near_duplicates
from kar_offline.check.name_matching import Names, fold

pytestmark = pytest.mark.unit

PRAISE = (
    "{} is a moving film about love and loss, with fine performances and a score that stays with the viewer for days"
)
HEAT = "A weary detective hunts a disciplined thief through a cold blue city, and both pay for it with their lives"
VOCABULARY = [f"w{number}" for number in range(5_000)]


def about(**titles: str) -> dict[str, Subject]:
    return {
        key: Subject("item", key, Names.of((fold(title),)), frozenset((fold(title),))) for key, title in titles.items()
    }


def text(chance: random.Random, words: int = 80) -> list[str]:
    return chance.choices(VOCABULARY, k=words)


def with_changes(chance: random.Random, words: Sequence[str], changes: int) -> str:
    changed = list(words)
    for at in chance.sample(range(len(changed)), changes):
        changed[at] = chance.choice(VOCABULARY)
    return " ".join(changed)


def test_the_first_of_two_keeps_its_text() -> None:
    assert near_duplicates({"a": HEAT, "b": HEAT}) == {"b": ("a", 1.0)}
    assert near_duplicates({"b": HEAT, "a": HEAT}) == {"a": ("b", 1.0)}


def test_every_later_one_fails() -> None:
    found = near_duplicates(dict.fromkeys(range(50), HEAT))
    assert sorted(found) == list(range(1, 50))
    assert all(similarity == 1.0 and other < key for key, (other, similarity) in found.items())


def test_titles_do_not_hide_a_template() -> None:
    titles = {"a": "The Big Sleep", "b": "M", "c": "What? (C++ [a]*"}
    texts = {key: PRAISE.format(title) for key, title in titles.items()}
    assert near_duplicates(texts, about(**titles)) == {"b": ("a", 1.0), "c": ("a", 1.0)}


def test_similarity_is_that_of_sets_of_three_words() -> None:
    # 10 words have 8 shingles; another word in the middle changes 3 of them: 5 in common of 11.
    first, second = "a b c d e f g h i j", "a b c d x f g h i j"
    assert near_duplicates({1: first, 2: second}) == {2: (1, pytest.approx(5 / 11))}
    assert near_duplicates({1: first, 2: second}, threshold=0.5) == {}


def test_titles_of_users_texts_are_what_they_say() -> None:
    users = {key: Subject("user", key, Names.of(("heat", "big")), frozenset((key,))) for key in ("heat", "big")}
    texts = {"heat": "likes heat a lot", "big": "likes big a lot"}
    assert near_duplicates(texts, users) == {}
    assert set(near_duplicates(texts, about(heat="Heat", big="Big"))) == {"big"}


@pytest.mark.parametrize("texts", [{}, {1: ""}, {1: "", 2: ""}, {1: "two words", 2: "two words"}, {1: HEAT, 2: ""}])
def test_texts_with_next_to_no_words_are_nobody_s_duplicate(texts: dict[int, str]) -> None:
    assert near_duplicates(texts) == {}


def test_half_a_character_does_no_harm() -> None:
    assert near_duplicates({1: f"{HEAT} \ud800", 2: f"{HEAT} \ud800"}) == {2: (1, 1.0)}


def test_nearly_all_are_found_among_many_and_nothing_else() -> None:
    chance = random.Random(0)
    texts = {number: text(chance) for number in range(3_000)}
    originals = {key: " ".join(words) for key, words in texts.items()}
    # Five changed words leave at least 63 of 78 shingles: a similarity of 63 / 93 or more.
    copies = {3_000 + key: with_changes(chance, texts[key], 5) for key in range(0, 3_000, 10)}
    found = near_duplicates(originals | copies)
    assert set(found) <= set(copies)
    assert len(found) >= 0.99 * len(copies)
    assert all(other == key - 3_000 and similarity >= 63 / 93 for key, (other, similarity) in found.items())

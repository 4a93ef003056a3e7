"""Owns the facts and opinions that members of a cluster share: values of facts, titles that they liked or disliked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Final, NamedTuple

from kar_offline.prompts.untrusted import WITHHELD, Part, plain, quoted

__all__ = ["MOST_TITLES", "CountedTitle", "Opinions", "common_facts", "counted", "opinions"]

MOST_TITLES: Final = 20
"""Largest number of titles in one list (items, liked or disliked) of a prompt about a cluster."""
MOST_VALUES: Final = 5
"""Largest number of values of one fact in a prompt about a cluster."""

CountedTitle = tuple[str, int]
"""A title, or a value of a fact, and the number of members."""


class Opinions(NamedTuple):
    """Titles with the number of users who liked, or disliked, each; largest numbers first."""

    liked: list[CountedTitle]
    disliked: list[CountedTitle]


def common_facts(members: Sequence[Mapping[str, Sequence[Part]]], allowed: Sequence[str]) -> dict[str, str]:
    """Values of facts that members have in common, by fact: texts with the number of members, numbers as a range.

    A text is shown if at least two members, and at least a quarter of all members, have it.

    Args:
        members: The parts of each member's facts.
        allowed: Names of the facts to look at, in order.
    """
    common = {}
    fewest = max(2, len(members) / 4)
    for name in allowed:
        # `fromkeys`: a value counts once for a member, and values of equal counts keep their order.
        values = Counter(part for facts in members for part in dict.fromkeys(facts.get(name, ())))
        numbers = [value for value in values if isinstance(value, int | float)]
        frequent = [(quoted(value), count) for value, count in values.most_common(MOST_VALUES) if count >= fewest]
        if numbers:
            common[name] = f"{plain(min(numbers))} to {plain(max(numbers))}"
        elif frequent:
            common[name] = counted(frequent, ", ")
    return common


def opinions(histories: Sequence[Sequence[tuple[str, float]]]) -> Opinions:
    """Titles that more users liked than disliked, and titles that more users disliked than liked.

    A rating at or above the mean of all ratings is a like, a lower rating a dislike.

    Args:
        histories: For each user, the rated titles with their ratings.
    """
    ratings = [rating for history in histories for _, rating in history]
    mean_rating = mean(ratings) if ratings else 0.0
    likes: Counter[str] = Counter()
    dislikes: Counter[str] = Counter()
    for history in histories:
        for title, rating in history:
            (likes if rating >= mean_rating else dislikes)[title] += 1
    return Opinions(_more_frequent(likes, dislikes), _more_frequent(dislikes, likes))


def _more_frequent(counts: Counter[str], other_counts: Counter[str]) -> list[CountedTitle]:
    """The titles that have a larger count in `counts` than in `other_counts`."""
    titles = [(title, n) for title, n in counts.most_common() if n > other_counts[title] and title != WITHHELD]
    return titles[:MOST_TITLES]


def counted(values: Sequence[CountedTitle], between: str) -> str:
    """Values with their numbers as one text: "Heat (3), Ran (2)"."""
    return between.join(f"{value} ({number})" for value, number in values)

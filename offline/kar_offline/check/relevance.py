"""Owns the gates that ask what a text speaks of: its subject, and items that a user met only later."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.gate_result import PASSED, Finding, failed, unknown
from kar_offline.check.name_matching import Mention, Words

__all__ = ["leak", "subject"]

ENOUGH_PEOPLE: Final = 5
"""People known of an item from which a text that names none of them speaks of something else."""
MANY: Final = re.compile(
    r"(?:['’]s?)?(?:[ -][\w'’]+){0,3}?"
    r"[ -](?:trilogy|saga|series|sequels?|prequels?|films|movies|franchise|entries|fans?|types?)\b"
)
"""What follows a title that stands for more than one item: "both Star Wars and Star Trek sequels"."""
BEFORE_A_KIND: Final = frozenset(("the", "a", "an", "both", "all", "every", "these", "first", "second", "third"))
"""What comes before a title that says of which kind something is: "the Ed Wood documentary"."""
NUMBER: Final = re.compile(r"\d+|ii|iii|iv|v|vi{1,3}|ix|x")
"""What follows a title in that of a sequel."""
BETWEEN: Final = re.compile(r"['’\"”]?(?:,| and| or|, and|, or) ['‘\"“]?")
"""What stands between the titles of a list."""
ENGLISH: Final = "en"
FORECAST: Final = re.compile(
    r" (?:expect\w*|recommend\w*|suggest\w*|should|would|will|could|might|may|likely|probably|possibly|offer|try|"
    r"advis\w*|next|bets?|safe\w*|ought|candidates?|point\w*|steer|avoid|skip|seek|promis\w*|appeal|looks?|"
    r"suit\w*|fits?|worth) "
)
"""Words of a sentence about what a user would like: what it names is a guess, which the question asks for."""
LONG_TITLE: Final = 6
"""Words of a title, such as a headline, that texts about users are not expected to repeat."""
SENTENCE_ENDS: Final = re.compile(r"(?<!\.[A-Z])(?<! [A-Z])(?<!\b[DM]r)(?<!\bSt)(?<!\bMrs)[.!?](?=['\"’”)]*\s)")


def subject(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    """Whether a text speaks of its subject: names an item and people in it; of a user, items that the prompt shows."""
    if not about.titles:
        return unknown("nothing is known to tell its subject by")
    return _user(words, about, mentions) if about.entity == "user" else _item(words, about, rules, mentions)


def _item(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    people = len(about.names.forms - about.titles)
    if any(mention.name not in about.titles for mention in mentions):
        return PASSED
    if mentions:
        # Who writes of an item without anybody in it, asked for them, writes what would fit any item.
        vague = rules.people and people >= ENOUGH_PEOPLE
        return failed(f"names nobody of {people} known to be in it, though asked for them") if vague else PASSED
    if people >= ENOUGH_PEOPLE:
        return failed("names neither its subject nor anybody in it")
    if not _has_names(words):
        return failed("names nothing and nobody")
    return unknown("names neither its subject nor anybody known to be in it, and few are known")


def _user(words: Words, about: Subject, mentions: Sequence[Mention]) -> Finding:
    shown = {mention.name for mention in mentions} & about.titles
    if not shown:
        if sum(title.count(" ") >= LONG_TITLE for title in about.titles) * 2 > len(about.titles):
            return unknown("names none of the items that the prompt shows, whose titles are too long to be repeated")
        return failed("names none of the items that the prompt shows")
    others = {
        mention.name
        for number, mention in enumerate(mentions)
        if mention.name not in about.titles and _is_one(words, mentions, number)
    }
    if len(others) > len(shown):
        return failed(f"names more items that the prompt does not show than it shows: {', '.join(sorted(others)[:3])}")
    return PASSED


def leak(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    """Whether a text tells of an item that its user met after the cut-off, but for guesses at what they would like."""
    for number, mention in enumerate(mentions):
        if mention.name not in about.later or not _is_one(words, mentions, number):
            continue
        if any(f" {mention.name} " in f" {title} " for title in about.titles):
            continue
        if rules.language != ENGLISH:
            return unknown(f"names what came after the cut-off, perhaps as a guess: {words.written(mention)}")
        if not FORECAST.search(_sentence(words, mention)):
            return failed(f"tells of what came after the cut-off: {words.written(mention)}")
    return PASSED


def _is_one(words: Words, mentions: Sequence[Mention], number: int) -> bool:
    """Whether a mention means one item: quoted, listed, or several words that are no series and no kind of thing."""
    mention = mentions[number]
    if words.quoted(mention):
        return True
    if mention.after < len(words.folded) and NUMBER.fullmatch(words.folded[mention.after]):
        return False
    if mention.first and words.folded[mention.first - 1] in BEFORE_A_KIND:
        return False
    if MANY.match(words.text, words.spans[mention.after - 1][1]):
        return False
    return mention.after - mention.first > 1 or _listed(words, mentions, number)


def _listed(words: Words, mentions: Sequence[Mention], number: int) -> bool:
    """Whether nothing but a comma or "and" stands between a mention and the one before or after it."""
    near = mentions[max(number - 1, 0) : number + 2]
    return any(
        BETWEEN.fullmatch(words.text[words.spans[one.after - 1][1] : words.spans[other.first][0]])
        for one, other in pairwise(near)
    )


def _sentence(words: Words, mention: Mention) -> str:
    """The folded sentence around a mention, with spaces around."""
    start, end = words.spans[mention.first][0], words.spans[mention.after - 1][1]
    ends = [found.end() for found in SENTENCE_ENDS.finditer(words.text)]
    first = max((at for at in ends if at <= start), default=0)
    last = min((at for at in ends if at >= end), default=len(words.text))
    return f" {' '.join(w for w, (at, _) in zip(words.folded, words.spans, strict=True) if first <= at < last)} "


def _has_names(words: Words) -> bool:
    """Whether a text has names: words with a capital letter inside of a sentence."""
    text = words.text
    return any(
        text[start].isupper() and text[start - 1] in " '\"‘“(" and text[start - 2] not in ".!?:\n"
        for start, _ in words.spans[1:]
    )

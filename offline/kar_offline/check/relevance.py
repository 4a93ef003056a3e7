"""Owns the gates of relevance: a text must be about its subject, and must not mention a user's later items."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.gate_result import PASSED, Finding, failed, unknown
from kar_offline.check.name_matching import Mention, Words

__all__ = ["leak", "subject"]

ENOUGH_PEOPLE: Final = 5
"""If at least this number of people is known, a text about an item that names none of them is about something else."""
MANY: Final = re.compile(
    r"(?:['’]s?)?(?:[ -][\w'’]+){0,3}?"
    r"[ -](?:trilogy|saga|series|sequels?|prequels?|films|movies|franchise|entries|fans?|types?)\b"
)
"""Words after a title that stands for several items: "both Star Wars and Star Trek sequels"."""
BEFORE_A_KIND: Final = frozenset(("the", "a", "an", "both", "all", "every", "these", "first", "second", "third"))
"""Words before a title that describes another thing: "the Ed Wood documentary"."""
NUMBER: Final = re.compile(r"\d+|ii|iii|iv|v|vi{1,3}|ix|x")
"""Numbers of sequels, which follow the title."""
BETWEEN: Final = re.compile(r"['’\"”]?(?:,| and| or|, and|, or) ['‘\"“]?")
"""Text between two titles of a list."""
ENGLISH: Final = "en"
FORECAST: Final = re.compile(
    r" (?:expect\w*|recommend\w*|suggest\w*|should|would|will|could|might|may|likely|probably|possibly|offer|try|"
    r"advis\w*|next|bets?|safe\w*|ought|candidates?|point\w*|steer|avoid|skip|seek|promis\w*|appeal|looks?|"
    r"suit\w*|fits?|worth) "
)
"""Words that mark a sentence as a guess at what the user would like. The prompt asks for guesses: they may name later
items."""
LONG_TITLE: Final = 6
"""Texts about users need not repeat titles of this number of words or more, such as headlines."""
SENTENCE_ENDS: Final = re.compile(r"(?<!\.[A-Z])(?<! [A-Z])(?<!\b[DM]r)(?<!\bSt)(?<!\bMrs)[.!?](?=['\"’”)]*\s)")


def subject(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    """Fails a text that is not about its subject: the item and its people, or the items in the user's prompt."""
    if not about.titles:
        return unknown("nothing is known to tell its subject by")
    return _user(words, about, mentions) if about.entity == "user" else _item(words, about, rules, mentions)


def _item(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    people = len(about.names.forms - about.titles)
    if any(mention.name not in about.titles for mention in mentions):
        return PASSED
    if mentions:
        # A text that names no person, although people were asked for, is probably generic.
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
        if mention.name not in about.titles and _is_single_item(words, mentions, number)
    }
    if len(others) > len(shown):
        return failed(f"names more items that the prompt does not show than it shows: {', '.join(sorted(others)[:3])}")
    return PASSED


def leak(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    """Fails a text that mentions an item after the user's cut-off, except as a guess at what the user would like."""
    for number, mention in enumerate(mentions):
        if mention.name not in about.later or not _is_single_item(words, mentions, number):
            continue
        if any(f" {mention.name} " in f" {title} " for title in about.titles):
            continue
        if rules.language != ENGLISH:
            return unknown(f"names what came after the cut-off, perhaps as a guess: {words.written(mention)}")
        if not FORECAST.search(_sentence(words, mention)):
            return failed(f"tells of what came after the cut-off: {words.written(mention)}")
    return PASSED


def _is_single_item(words: Words, mentions: Sequence[Mention], number: int) -> bool:
    """Whether a mention means a single item: quoted, in a list, or of several words and no series or kind of thing."""
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
    """Whether only a comma or "and" separates a mention from the mention before or after it."""
    near = mentions[max(number - 1, 0) : number + 2]
    return any(
        BETWEEN.fullmatch(words.text[words.spans[left.after - 1][1] : words.spans[right.first][0]])
        for left, right in pairwise(near)
    )


def _sentence(words: Words, mention: Mention) -> str:
    """The folded sentence that contains a mention, with a space at both ends."""
    start, end = words.spans[mention.first][0], words.spans[mention.after - 1][1]
    ends = [match.end() for match in SENTENCE_ENDS.finditer(words.text)]
    sentence_start = max((position for position in ends if position <= start), default=0)
    sentence_end = min((position for position in ends if position >= end), default=len(words.text))
    spans = zip(words.folded, words.spans, strict=True)
    return f" {' '.join(word for word, (position, _) in spans if sentence_start <= position < sentence_end)} "


def _has_names(words: Words) -> bool:
    """Whether a text has names: words with a capital letter inside a sentence."""
    text = words.text
    return any(
        text[start].isupper() and text[start - 1] in " '\"‘“(" and text[start - 2] not in ".!?:\n"
        for start, _ in words.spans[1:]
    )

"""Owns the gate of facts: a text about an item must not contradict its known directors, cast, years and genres.

Only explicit claims in English are read, and a claim fails only if a known fact contradicts it.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import chain, pairwise, takewhile
from typing import Final, NamedTuple

from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.gate_result import PASSED, Finding, failed, unknown
from kar_offline.check.name_matching import Mention, Words, person_forms
from kar_sidecar.entities import ITEM

__all__ = ["facts"]

CAPITAL: Final = r"[^\W\d_a-zß-öø-ÿ]"
NAME: Final = rf"(?:(?:{CAPITAL}\.)+|(?:St|Dr|Mrs?)\.|{CAPITAL}[\w'’-]*)"
"""A word that begins with a capital letter, or initials."""
PERSON: Final = rf"{NAME}(?: (?:(?:de|del|della|di|da|la|le|van|von|der|den|ten|el|al|bin|and|y) )*{NAME}){{1,3}}"
DIRECTED: Final = re.compile(rf"\b[Dd]irected (?:(?!by )[\w,-]+ ){{0,6}}by (?:[a-z-]+ ){{0,3}}(?P<who>{PERSON})")
DIRECTOR: Final = re.compile(
    rf"(?<!Best )\b[Dd]irectors?(?:\b[^.:\n]{{0,30}}:|,| is| was| named)? (?P<who>{PERSON})"
    rf"|\b(?:debut of|(?:film|movie|drama|comedy|thriller|documentary|western|musical) by) (?:[a-z-]+ ){{0,3}}{PERSON}"
)
STARRING: Final = re.compile(
    rf"\b(?:[Ss]tarring|[Ss]tars|[Aa]ctors?(?::| (?:is|are|was|were|include))|[Pp]layed by|[Vv]oiced by)"
    rf" (?:(?!as |in |opposite )[a-z-]+ ){{0,3}}(?P<who>{PERSON})"
)
WITH: Final = re.compile(
    rf"\b(?:[Cc]ast includes|[Ff]eaturing|[Ff]eatures|[Ww]ith) {PERSON}(?: as |, {PERSON}| and {PERSON})"
)
ACTS: Final = frozenset(("stars", "star", "plays", "play"))
DIRECTS: Final = frozenset(("directs",))
WINDOW: Final = 16
"""Number of words from the beginning of a list of people that are searched for a known person."""
OTHERS: Final = frozenset(("starring", "stars", "from", "with", "based", "featuring", "written", "produced"))
"""Words that end a list of people; people with another role follow."""
RICH_CAST: Final = 10
"""Smallest size of a cast list that can contradict a text: if it has none of the named actors, the text is wrong."""
ALIKE: Final = 0.78
"""Similarity from which two spellings are the same name: "Djordjadze", "Jorjadze"."""
SHORT: Final = 3
"""Names of at most this number of letters are compared exactly."""
PSEUDONYM: Final = "smithee"
"""Pseudonym of directors who disowned their film."""

YEAR_GAP: Final = range(-1, 2)
"""Allowed difference between a claimed and the known year of an item, in years: catalogues differ by one."""
RELEASE_GAP: Final = range(-1, 4)
"""Allowed difference between a claimed year of release and the known year: some films are released late."""
AWARD_GAP: Final = range(-1, 5)
"""Allowed difference between the year of an award and the known year."""
YEAR: Final = r"(?P<year>1[89]\d\d|20\d\d)"
ANY_YEAR: Final = re.compile(r"1[89]\d\d|20\d\d")
AFTER_TITLE: Final = re.compile(rf"['\"’”*]*,? \({YEAR}\)")
BEFORE_TITLE: Final = re.compile(rf"{YEAR}['’]s? ['\"‘“*]*$")
RELEASED: Final = re.compile(
    r"(?<![\w-])(?:released|premiered|came out|debuted) (?:(?!DVD|video|home|again)[\w-]+ ){0,4}?in (?:[A-Z][a-z]+ )?"
    rf"{YEAR}\b"
)
AWARD: Final = (
    r"(?:Oscars?(?! [A-Z])|Academy Awards?|Golden Globes?|Golden Lions?|BAFTAs?|Emmys?|Grammys?|Palme d['’]Or)"
)
AWARD_YEAR: Final = re.compile(
    rf"{AWARD}[^.,;]{{0,60}}? (?:in|of) {YEAR}\b|\b{YEAR} (?:[\w-]+ ){{0,2}}?{AWARD}"
    rf"|(?:^|[.\n] )In {YEAR}, [^.]{{0,90}}?\b(?:won|awarded|nominated)\b".replace("?P<year>", "")
)
OTHER_WORK: Final = re.compile(
    r"\b(?:re-?ma[dk]\w+|original\w*|versions?|based|sequels?|prequels?|follow\w*|predecess\w+|than|inspir\w+|updat\w+|"
    r"adapt\w+|re-?work\w*|re-?released?|restor\w+|anniversary|like|after|his|her|their|who|whose|had|earlier|previous\w*|"
    r"honorary|lifetime|record)\b|['’]s? $",
    re.IGNORECASE,
)
"""Words which show that the year after them belongs to another work, or to another event in a maker's life."""
BEFORE: Final = 60
"""Number of characters before a year that are searched for `OTHER_WORK`."""

GENRE_WORDS: Final = {
    "documentary": "documentary",
    "horror": "horror",
    "western": "western",
    "musical": "musical",
    "animated": "animation",
    "science fiction": "sci-fi",
    "science-fiction": "sci-fi",
    "sci-fi": "sci-fi",
    "war": "war",
    "romantic comedy": "romance",
    "romance": "romance",
    "thriller": "thriller",
    "comedy": "comedy",
    "family": "family",
    "children's": "family",
    "action": "action",
    "fantasy": "fantasy",
}
_LIGHT: Final = frozenset(("comedy", "family", "children's", "animation", "musical", "music", "romance", "fantasy"))
_DARK: Final = frozenset(("thriller", "crime", "mystery", "film-noir", "horror"))
_LOUD: Final = frozenset(("action", "adventure", "sci-fi", "war", "western", "thriller", "crime"))
NEAR: Final = {
    "documentary": frozenset(("documentary", "biography", "music")),
    "horror": frozenset(("fantasy", "sci-fi")) | _DARK,
    "western": frozenset(("western", "action", "adventure")),
    "musical": frozenset(("musical", "music", "animation", "family", "children's")),
    "animation": frozenset(("animation", "family", "children's")),
    "sci-fi": frozenset(("sci-fi", "fantasy", "horror", "action", "adventure")),
    "war": frozenset(("war", "history", "drama", "action", "adventure", "biography")),
    "romance": frozenset(("romance", "comedy", "drama", "musical")),
    "thriller": frozenset(("drama", "history")) | _DARK | _LOUD,
    "comedy": frozenset(("drama", "action", "adventure")) | _LIGHT,
    "family": frozenset(("drama", "adventure", "sport")) | _LIGHT,
    "action": frozenset(("horror", "fantasy", "sport", "mystery", "history")) | _LOUD,
    "fantasy": frozenset(("drama", "adventure", "sci-fi", "horror", "action")) | _LIGHT,
}
"""By claimed genre, the genres that agree with it. Catalogues omit genres, so only distant genres contradict."""
GENRES: Final = frozenset().union(*NEAR.values())
"""The genres that this gate knows; an item with another genre, such as "Fiction", is not judged."""
ENOUGH_GENRES: Final = 2
"""Fewest known genres that can contradict a claim: a single genre is often incomplete."""
NOT_A_KIND: Final = "mock|fake|spoof|parody|an?|the|of|about|in|on|by|with|for|from|to|than|that|which|who"
"""Words that end the description of a kind of film, or reverse its meaning."""


class Claim(NamedTuple):
    """A claim of a text, and whether it agrees with the known facts."""

    quotation: str
    agrees: bool | None
    """None: no known fact agrees or contradicts."""
    known: str = ""
    """The known fact, in words."""


def facts(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Finding:
    """Fails a text about an item that contradicts a known fact."""
    if about.entity != ITEM:
        return PASSED
    claims = [
        *_directors(words, about),
        *_cast(words, about, mentions),
        *_years(words, about, rules, mentions),
        *_genres(words, about, rules),
    ]
    if wrong := dict.fromkeys(f"{claim.quotation} ({claim.known})" for claim in claims if claim.agrees is False):
        return failed(f"contradicts what is known: {'; '.join(wrong)}")
    if any(claim.agrees for claim in claims) or any(mention.name not in about.titles for mention in mentions):
        return PASSED
    return unknown("nothing that it says can be held against known facts")


def _directors(words: Words, about: Subject) -> Iterator[Claim]:
    explicit = list(DIRECTED.finditer(words.text))
    # These phrases may be about another film's director; the item's own director is then named elsewhere.
    loose = [match.group() for match in (DIRECTOR.search(words.text),) if match] + _people_before(words, DIRECTS)
    if explicit or loose:
        window = _after(words, explicit)
        can_contradict = about.directors and PSEUDONYM not in window
        agrees = _names_any(window, about.directors) or _spells_any(window, about.directors) if can_contradict else None
        yield Claim(
            explicit[0].group() if explicit else loose[0], agrees, f"directed by {', '.join(about.directors[:3])}"
        )


def _cast(words: Words, about: Subject, mentions: Sequence[Mention]) -> Iterator[Claim]:
    explicit = list(STARRING.finditer(words.text))
    loose = [match.group() for match in (WITH.search(words.text),) if match] + _people_before(words, ACTS)
    if explicit or loose:
        named = {mention.name for mention in mentions}
        agrees = any(not named.isdisjoint(person_forms(name)) for name in about.cast)
        agrees = agrees or (bool(explicit) and _names_any(_after(words, explicit), about.cast))
        known = f"nobody named is among the {len(about.cast)} known to be in it"
        quotation = explicit[0].group() if explicit else loose[0]
        yield Claim(quotation, agrees or (False if len(about.cast) >= RICH_CAST else None), known)


def _after(words: Words, matches: Sequence[re.Match[str]]) -> list[str]:
    """Folded words that begin with a capital: those from the people of each match on, or all without matches."""
    starts = [bisect_left(words.spans, (match.start("who"), 0)) for match in matches]
    numbers: Iterable[int] = range(len(words.folded))
    if matches:
        numbers = chain.from_iterable(
            takewhile(
                lambda number: words.folded[number] not in OTHERS, range(start, min(start + WINDOW, len(words.folded)))
            )
            for start in starts
        )
    return [words.folded[number] for number in numbers if words.capital(number)]


def _people_before(words: Words, verbs: frozenset[str]) -> list[str]:
    """Phrases of two words with capitals before one of the verbs: "Lee Tamahori directs"."""
    if not any(f" {verb} " in words.line for verb in verbs):
        return []
    return [
        words.text[words.spans[number - 2][0] : words.spans[number][1]]
        for number, word in enumerate(words.folded)
        if word in verbs and number > 1 and words.capital(number - 1) and words.capital(number - 2)
    ]


def _names_any(window: Sequence[str], people: Sequence[str]) -> bool:
    """Whether folded words include the last name of one of the people, or two parts of a name."""
    window_words = set(window)
    names = [person_forms(name)[-1].split() for name in people if person_forms(name)]
    return any(name[-1] in window_words or len(window_words.intersection(name)) > 1 for name in names)


def _spells_any(window: Sequence[str], people: Sequence[str]) -> bool:
    """Whether folded words, alone or joined in pairs, are another spelling of the last name of one of the people."""
    spelt = {word for word in (*window, *map("".join, pairwise(window))) if len(word) > SHORT}
    last = {forms[-1].split()[-1] for person in people if (forms := person_forms(person))}
    return any(
        SequenceMatcher(None, word, name).ratio() >= ALIKE for name in last if len(name) > SHORT for word in spelt
    )


def _years(words: Words, about: Subject, rules: Rules, mentions: Sequence[Mention]) -> Iterator[Claim]:
    text = words.text
    if not about.years or not ANY_YEAR.search(text):
        return
    known = f"it is of {' or '.join(map(str, about.years))}"

    def claim(quotation: str, year: int, within: range) -> Claim:
        return Claim(quotation, min(about.years) + within[0] <= year <= max(about.years) + within[-1], known)

    title_claims = []
    for mention in mentions:
        if mention.name in about.titles and not _ends_longer_name(words, mention):
            start, end = words.spans[mention.first][0], words.spans[mention.after - 1][1]
            if (after := AFTER_TITLE.match(text, end)) and not _other_work(text, start):
                title_claims.append(claim(text[start : after.end()], int(after["year"]), YEAR_GAP))
            if before := BEFORE_TITLE.search(text[:start]):
                title_claims.append(claim(text[before.start() : end], int(before["year"]), YEAR_GAP))
    # If the text also has the title with the right year, another year beside the title is that of another version.
    yield from [title_claim for title_claim in title_claims if title_claim.agrees] or title_claims
    for pattern, within in (
        (_year_before_noun(rules.nouns), YEAR_GAP),
        (RELEASED, RELEASE_GAP),
        (AWARD_YEAR, AWARD_GAP),
    ):
        for match in pattern.finditer(text):
            year = int(next(filter(None, match.groups())))
            if not _other_work(text, match.start()):
                yield claim(match.group().strip(" .\n"), year, within)
    for match in _decade(rules.nouns).finditer(text):
        yield claim(match.group(), int(match["year"]), range(-9 + YEAR_GAP[0], YEAR_GAP[-1] + 1))


def _other_work(text: str, position: int) -> bool:
    """Whether the sentence before a position speaks of another work."""
    return bool(OTHER_WORK.search(re.split(r"[.!?]\s", text[max(position - BEFORE, 0) : position])[-1]))


def _ends_longer_name(words: Words, mention: Mention) -> bool:
    """Whether a mention is only the end of a longer name: "Frankenstein Meets the Wolf Man"."""
    if words.ends_quote(mention):
        return True
    before = mention.first - 1
    if before > 0 and words.folded[before] in ("the", "a", "an"):
        before -= 1
    if before < 0 or words.quoted(mention):
        return False
    between = words.text[words.spans[before][1] : words.spans[mention.first][0]]
    return words.capital(before) and not any(c in between for c in ".!?:;,\"“'‘(")


def _kinds(nouns: Sequence[str]) -> str:
    return "|".join((*map(re.escape, nouns), "comedy", "drama", "thriller", "western", "musical", "documentary"))


@lru_cache(maxsize=32)
def _year_before_noun(nouns: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:an?|[Tt]his) {YEAR} (?:[\w-]+ ){{0,5}}?(?:{_kinds(nouns)})\b")


@lru_cache(maxsize=32)
def _decade(nouns: Sequence[str]) -> re.Pattern[str]:
    return re.compile(
        rf"\b(?:is|was) an? (?:[\w-]+ ){{0,2}}?(?P<year>1[89]\d0|20\d0)s (?:[\w-]+ ){{0,4}}?(?:{_kinds(nouns)})\b"
    )


@lru_cache(maxsize=32)
def _genre(nouns: Sequence[str]) -> re.Pattern[str]:
    kinds, things = "|".join(sorted(GENRE_WORDS, key=len, reverse=True)), "|".join(map(re.escape, nouns))
    return re.compile(
        rf"\b(?:(?:is|was) an?|[Tt]his) (?P<kind>(?:(?!(?:{NOT_A_KIND}|{things}) )[\w'-]+ ){{0,5}}?(?:{kinds}))"
        rf"(?: (?:{things})\b|(?=[,.;:)]| (?:directed|about|by|starring|set|that|which|from|with|based|is|was)\b))"
    )


def _genres(words: Words, about: Subject, rules: Rules) -> Iterator[Claim]:
    known_genres = {genre.lower() for genre in about.genres}
    if len(known_genres) < ENOUGH_GENRES or not known_genres <= GENRES:
        return
    for match in _genre(rules.nouns).finditer(words.text):
        claimed = [
            genre for word, genre in GENRE_WORDS.items() if re.search(rf"\b{word}\b", match["kind"], re.IGNORECASE)
        ]
        agrees = any(not NEAR[genre].isdisjoint(known_genres) for genre in claimed)
        yield Claim(match.group(), agrees, f"its genres are {', '.join(sorted(known_genres))}")

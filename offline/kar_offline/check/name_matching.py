"""Owns names: the forms in which catalogues write titles and people, and where a text mentions them."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = [
    "Mention",
    "Names",
    "Words",
    "fold",
    "person_forms",
    "runs",
    "title_forms",
    "title_parts",
    "whole_titles",
    "year_of",
]

WORD: Final = re.compile(r"\w+|&")
FORMAT: Final = re.compile(r"\((?:V|TV|VG)\)\s*$")
"""How catalogues mark what was not made for cinemas."""
YEAR: Final = re.compile(r"\((1[89]\d\d|20\d\d)\)")
BRACKETS: Final = re.compile(r"\(([^()]*)\)")
ARTICLES: Final = "the|an?|la|les?|il|lo|gli|i|das|der|die|ein|eine|el|los|las|det|den|de|het|o|os|as|une?|l"
ARTICLE_LAST: Final = re.compile(rf"(?P<name>.+), (?P<article>(?:{ARTICLES})'?)", re.IGNORECASE)
ARTICLE_FIRST: Final = re.compile(r"^(?:the|an?|la|les?|il|lo|el|los|las|das|der|eine?|une?|det|den) (?=.)")
"""Folded; without those that are words in English titles: "Die Hard", "As Good As It Gets"."""
PARTS: Final = re.compile(r": | - | – |/")
LETTERS: Final = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "æ": "ae", "Æ": "Ae"}
    | {"œ": "oe", "Œ": "Oe", "ı": "i"}
)
"""Letters that are written in plain ones elsewhere and that Unicode does not take apart."""
QUOTES: Final = frozenset("'\"‘’“”«»*_`")
SUFFIXES: Final = frozenset({"jr", "sr", "ii", "iii"})


@lru_cache(maxsize=65536)
def _fold_word(word: str) -> str:
    if word.isascii():
        return "and" if word == "&" else word.lower()
    apart = unicodedata.normalize("NFKD", word.translate(LETTERS))
    return "".join(c for c in apart if not unicodedata.combining(c)).casefold()


def fold(text: str) -> str:
    """Text as it is compared: words without accents, case or punctuation, one space between them."""
    return " ".join(map(_fold_word, WORD.findall(unicodedata.normalize("NFC", text))))


def runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every `length` words in a row."""
    return zip(*(words[at:] for at in range(length)), strict=False)


def year_of(title: str) -> int | None:
    """The year that a title ends with, as catalogues write it: "Heat (1995)"."""
    years = YEAR.findall(title)
    return int(years[-1]) if years else None


@lru_cache(maxsize=65536)
def whole_titles(title: str) -> tuple[str, ...]:
    """The folded names that a title holds, the best first: the title without its year, and alternatives in brackets.

    >>> whole_titles("Usual Suspects, The (1995)")
    ('the usual suspects',)
    >>> whole_titles("Seven (Se7en) (1995)")
    ('seven', 'se7en')
    """
    title = YEAR.sub("", FORMAT.sub("", title))
    turned = (_turn(name.strip()) for name in (BRACKETS.sub("", title), *BRACKETS.findall(title)))
    return tuple(dict.fromkeys(folded for name in turned if (folded := fold(name))))


@lru_cache(maxsize=65536)
def title_forms(title: str) -> tuple[str, ...]:
    """`whole_titles`, and the same without their articles.

    >>> title_forms("Postino, Il (1994)")
    ('il postino', 'postino')
    """
    whole = whole_titles(title)
    return tuple(dict.fromkeys((*whole, *(ARTICLE_FIRST.sub("", name, count=1) for name in whole))))


@lru_cache(maxsize=65536)
def title_parts(title: str) -> tuple[str, ...]:
    """The folded parts of a title with a subtitle, each of two words or more: either may stand for it.

    >>> title_parts("Star Trek: The Wrath of Khan (1982)")
    ('star trek', 'the wrath of khan')
    """
    parts = PARTS.split(BRACKETS.sub("", title))
    return tuple(form for part in parts if " " in (form := fold(_turn(part.strip())))) if len(parts) > 1 else ()


def _turn(name: str) -> str:
    """A name with its article in front."""
    turned = ARTICLE_LAST.fullmatch(name)
    return f"{turned['article']} {turned['name']}" if turned else name


@lru_cache(maxsize=65536)
def person_forms(name: str) -> tuple[str, ...]:
    """The folded forms of a person's name: as it is, and without initials and suffixes.

    >>> person_forms("Samuel L. Jackson")
    ('samuel l jackson', 'samuel jackson')
    """
    words = fold(name).split()
    short = [word for word in words if len(word) > 1 and word not in SUFFIXES]
    return tuple(dict.fromkeys(form for form in (" ".join(words), " ".join(short)) if form))


class Mention(NamedTuple):
    """A name in a text: its folded form and the numbers of its first word and of the word after its last."""

    name: str
    first: int
    after: int


@dataclass(frozen=True, slots=True)
class Names:
    """Folded names to look for. Construct with `Names.of`."""

    forms: frozenset[str]
    longest: Mapping[str, int]
    """Words of the longest name that begins with a word."""

    @staticmethod
    def of(forms: Iterable[str]) -> "Names":
        """Index names by their first word."""
        forms = frozenset(forms)
        longest: dict[str, int] = {}
        for form in forms:
            first = form.split(" ", 1)[0]
            longest[first] = max(longest.get(first, 0), form.count(" ") + 1)
        return Names(forms, longest)


@dataclass(frozen=True, slots=True)
class Words:
    """A text and its words, folded, with their places in it."""

    text: str
    folded: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    line: str
    """The folded words with spaces before, between and after."""

    @staticmethod
    def of(text: str) -> "Words":
        """Split a text into words. Places are those in the text's NFC form, which is kept as `text`."""
        # Halves of a character, which a hostile server may send, can be written nowhere.
        text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
        spans = tuple(match.span() for match in WORD.finditer(text))
        folded = tuple(_fold_word(text[start:end]) for start, end in spans)
        return Words(text, folded, spans, f" {' '.join(folded)} ")

    def written(self, mention: Mention) -> str:
        """A mention as the text writes it."""
        return self.text[self.spans[mention.first][0] : self.spans[mention.after - 1][1]]

    def capital(self, number: int) -> bool:
        """Whether a word begins with no small letter."""
        return not self.text[self.spans[number][0]].islower()

    def quoted(self, mention: Mention) -> bool:
        """Whether a mention stands between quotation marks."""
        return self._opens(mention.first) and self._closes(mention.after - 1)

    def ends_quote(self, mention: Mention) -> bool:
        """Whether a mention is but the end of what stands between quotation marks."""
        return self._closes(mention.after - 1) and not self._opens(mention.first)

    def mentions(self, names: Names) -> Iterator[Mention]:
        """Names in the text, from left to right, the longest where several begin at a word.

        Names are told from mere words by how they are written: between quotation marks, or with no small letter at the
        beginning of the first and of the last word.
        """
        at, count = 0, len(self.folded)
        while at < count:
            if longest := names.longest.get(self.folded[at]):
                capital, opens = self.capital(at), self._opens(at)
                for after in range(min(at + longest, count), at, -1):
                    written = (capital and self.capital(after - 1)) or (opens and self._closes(after - 1))
                    if written and (name := " ".join(self.folded[at:after])) in names.forms:
                        yield Mention(name, at, after)
                        at = after - 1
                        break
            at += 1

    def _opens(self, number: int) -> bool:
        start = self.spans[number][0]
        return start > 0 and self.text[start - 1] in QUOTES

    def _closes(self, number: int) -> bool:
        end = self.spans[number][1]
        return self.text[end : end + 2].lstrip(",.!?")[:1] in QUOTES

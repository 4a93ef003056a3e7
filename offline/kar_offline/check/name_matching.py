"""Owns name matching: the forms in which catalogues write titles and people, and mentions of them in a text."""

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
"""Marks of catalogues for films that were not made for cinemas."""
YEAR: Final = re.compile(r"\((1[89]\d\d|20\d\d)\)")
BRACKETS: Final = re.compile(r"\(([^()]*)\)")
ARTICLES: Final = "the|an?|la|les?|il|lo|gli|i|das|der|die|ein|eine|el|los|las|det|den|de|het|o|os|as|une?|l"
ARTICLE_LAST: Final = re.compile(rf"(?P<name>.+), (?P<article>(?:{ARTICLES})'?)", re.IGNORECASE)
ARTICLE_FIRST: Final = re.compile(r"^(?:the|an?|la|les?|il|lo|el|los|las|das|der|eine?|une?|det|den) (?=.)")
"""Folded articles; without "die" and "as", which begin English titles: "Die Hard", "As Good As It Gets"."""
PARTS: Final = re.compile(r": | - | – |/")
LETTERS: Final = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "æ": "ae", "Æ": "Ae"}
    | {"œ": "oe", "Œ": "Oe", "ı": "i"}
)
"""Letters that are often replaced by plain ones and that Unicode does not decompose."""
QUOTES: Final = frozenset("'\"‘’“”«»*_`")
SUFFIXES: Final = frozenset({"jr", "sr", "ii", "iii"})


@lru_cache(maxsize=65536)
def _fold_word(word: str) -> str:
    if word.isascii():
        return "and" if word == "&" else word.lower()
    apart = unicodedata.normalize("NFKD", word.translate(LETTERS))
    return "".join(c for c in apart if not unicodedata.combining(c)).casefold()


def fold(text: str) -> str:
    """Text for comparison: words without accents, case or punctuation, with one space between them."""
    return " ".join(map(_fold_word, WORD.findall(unicodedata.normalize("NFC", text))))


def runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every `length` words in a row."""
    return zip(*(words[start:] for start in range(length)), strict=False)


def year_of(title: str) -> int | None:
    """The year that a title ends with, as catalogues write it: "Heat (1995)"."""
    years = YEAR.findall(title)
    return int(years[-1]) if years else None


@lru_cache(maxsize=65536)
def whole_titles(title: str) -> tuple[str, ...]:
    """The folded names in a title, the best first: the title without its year, then alternatives in brackets.

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
    """`whole_titles`, then the same names without articles.

    >>> title_forms("Postino, Il (1994)")
    ('il postino', 'postino')
    """
    whole = whole_titles(title)
    return tuple(dict.fromkeys((*whole, *(ARTICLE_FIRST.sub("", name, count=1) for name in whole))))


@lru_cache(maxsize=65536)
def title_parts(title: str) -> tuple[str, ...]:
    """The folded parts of a title with a subtitle, each of at least two words: a text may use one part alone.

    >>> title_parts("Star Trek: The Wrath of Khan (1982)")
    ('star trek', 'the wrath of khan')
    """
    parts = PARTS.split(BRACKETS.sub("", title))
    return tuple(form for part in parts if " " in (form := fold(_turn(part.strip())))) if len(parts) > 1 else ()


def _turn(name: str) -> str:
    """A name with its article moved to the front."""
    turned = ARTICLE_LAST.fullmatch(name)
    return f"{turned['article']} {turned['name']}" if turned else name


@lru_cache(maxsize=65536)
def person_forms(name: str) -> tuple[str, ...]:
    """The folded forms of a person's name: complete, and without initials and suffixes.

    >>> person_forms("Samuel L. Jackson")
    ('samuel l jackson', 'samuel jackson')
    """
    words = fold(name).split()
    short = [word for word in words if len(word) > 1 and word not in SUFFIXES]
    return tuple(dict.fromkeys(form for form in (" ".join(words), " ".join(short)) if form))


class Mention(NamedTuple):
    """A name in a text: its folded form, the number of its first word, and the number of the word after it."""

    name: str
    first: int
    after: int


@dataclass(frozen=True, slots=True)
class Names:
    """Folded names to search for. Construct with `Names.of`."""

    forms: frozenset[str]
    longest: Mapping[str, int]
    """By first word, the number of words of the longest name that begins with it."""

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
    """A text with its folded words and their positions."""

    text: str
    folded: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    line: str
    """The folded words with spaces before, between and after."""

    @staticmethod
    def of(text: str) -> "Words":
        """Split a text into words. Positions refer to the text's NFC form, which is kept as `text`."""
        # A hostile server may send half of a surrogate pair, which cannot be stored.
        text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
        spans = tuple(match.span() for match in WORD.finditer(text))
        folded = tuple(_fold_word(text[start:end]) for start, end in spans)
        return Words(text, folded, spans, f" {' '.join(folded)} ")

    def written(self, mention: Mention) -> str:
        """A mention as the text writes it."""
        return self.text[self.spans[mention.first][0] : self.spans[mention.after - 1][1]]

    def capital(self, number: int) -> bool:
        """Whether a word does not begin with a small letter."""
        return not self.text[self.spans[number][0]].islower()

    def quoted(self, mention: Mention) -> bool:
        """Whether a mention stands between quotation marks."""
        return self._opens(mention.first) and self._closes(mention.after - 1)

    def ends_quote(self, mention: Mention) -> bool:
        """Whether a mention is only the end of a quotation."""
        return self._closes(mention.after - 1) and not self._opens(mention.first)

    def mentions(self, names: Names) -> Iterator[Mention]:
        """Names in the text from left to right; the longest one where several begin at a word.

        A name counts only if it is written as one: between quotation marks, or with a first and a last word that do not
        begin with small letters.
        """
        first, count = 0, len(self.folded)
        while first < count:
            if longest := names.longest.get(self.folded[first]):
                capital, opens = self.capital(first), self._opens(first)
                for after in range(min(first + longest, count), first, -1):
                    written = (capital and self.capital(after - 1)) or (opens and self._closes(after - 1))
                    if written and (name := " ".join(self.folded[first:after])) in names.forms:
                        yield Mention(name, first, after)
                        first = after - 1
                        break
            first += 1

    def _opens(self, number: int) -> bool:
        start = self.spans[number][0]
        return start > 0 and self.text[start - 1] in QUOTES

    def _closes(self, number: int) -> bool:
        end = self.spans[number][1]
        return self.text[end : end + 2].lstrip(",.!?")[:1] in QUOTES

"""Owns the gate against personal data: contact details, and facts about users that the scenario withholds."""

import re
from typing import Final

from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.gate_result import PASSED, Finding, failed
from kar_offline.check.name_matching import Words, fold

__all__ = ["personal"]

CONTACTS: Final = {
    "an e-mail address": re.compile(r"[\w.+-]{1,64}@[\w-]+\.[a-zA-Z]{2,}"),
    "a handle": re.compile(r"(?<![\w.@])@[A-Za-z_]\w{2,}"),
    "a telephone number": re.compile(
        r"\+\d{1,3}[ .-]?\(?\d[\d() .-]{6,16}\d|\(\d{3}\) ?\d{3}[ .-]\d{4}|(?<![\w-])\d{3}([ .-])\d{3}\1\d{4}(?![\w-])"
        r"|(?<![\w-])0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}(?![\w-])"
    ),
    "a social security number": re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
    "an address": re.compile(
        r"\d{1,5}[A-Za-z]? (?:[A-Z][\w'’]+ ){1,3}(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Drive|Court)"
        r"\b[^\n]{0,40}?\b(?:\d{5}|[A-Z]{1,2}\d[\dA-Z]? \d[A-Z]{2})\b"
    ),
}
CARD: Final = re.compile(r"(?<![\w-])(?:\d[ -]?){12,18}\d(?![\w-])")
DIGIT: Final = re.compile(r"\d")
FEWEST_DIGITS: Final = 4
"""Texts with fewer digits hold no telephone number, card number or address."""

OCCUPATIONS: Final = (
    "accountant|administrator|artist|clerk|developer|designer|doctor|educator|engineer|entertainer|executive|homemaker|"
    "lawyer|librarian|manager|marketer|nurse|programmer|retiree|salesman|salesperson|scientist|student|teacher|technician|"
    "writer"
)
AGED: Final = "(?:young|younger|older|elderly|teenage)"
DEMOGRAPHICS: Final = {
    "age": re.compile(
        r" (?:years? old (?!film|movie|book|classic)|aged? \d\d? |at \d\d (?:this|he|she) |"
        r"(?:his|her|their) (?:\w+ )?(?:teens|twenties|thirties|forties|fifties|sixties|seventies|eighties) |"
        r"teenager |adolescent |middle aged |pensioner )"
    ),
    "gender": re.compile(
        r" (?:he|she|him|himself|herself|this (?:\w+ )?(?:man|woman|guy|lady|gentleman|boy|girl)|"
        r"(?:male|female) (?:viewer|user|rater|reader|listener|customer)|"
        r"(?:his|her) (?:\w+ ){0,2}?(?:fives?|fours?|threes?|twos?|ones?|ratings?|tastes?|scores?|marks?|favou?rites?|"
        r"record|list|history|choices?|highest|top|preferences?)) "
    ),
    "occupation": re.compile(
        rf" (?:this (?:{OCCUPATIONS})|(?:this|an?) (?:\w+ ){{0,2}}?(?:{OCCUPATIONS}) (?:who|with|whose|likes|loves)) "
    ),
}
"""Phrases that reveal a fact about the user anywhere in a text, by the name of the fact; folded."""
INTRODUCTIONS: Final = {
    "age": re.compile(
        rf"(?:^ (?:this|an?|another) (?:\w+ ){{0,4}}?{AGED} \w+|"
        rf" {AGED} (?:\w+ )?(?:viewer|user|rater|reader|listener|fan)) "
    ),
    "gender": re.compile(r" (?:his|her|man|woman|guy|lady|gentleman) "),
    "occupation": re.compile(rf"(?:^ an?| this) (?:\w+ ){{0,5}}?(?:{OCCUPATIONS}) "),
}
"""Phrases that reveal a fact about the user only at the beginning of a text, which introduces the user."""
OPENING: Final = 30
"""Number of words in the beginning of a text."""
SHORTEST: Final = 3
"""Withheld values of fewer characters are not searched for: they occur in any text."""


def personal(words: Words, about: Subject, rules: Rules) -> Finding:
    """Fails a text with contact details; about a user, also a text with a fact that the scenario withholds."""
    text = words.text
    if "@" in text or len(DIGIT.findall(text)) >= FEWEST_DIGITS:
        for what, pattern in CONTACTS.items():
            if match := pattern.search(text):
                return failed(f"has {what}: {match.group()}")
        if (match := CARD.search(text)) and _luhn(match.group()):
            return failed("has a number that could be a payment card's")
    if about.entity != "user":
        return PASSED
    opening = f" {' '.join(words.folded[:OPENING])} "
    for fact, pattern in DEMOGRAPHICS.items():
        if fact in rules.allowed:
            continue
        if match := pattern.search(words.line) or INTRODUCTIONS[fact].search(opening):
            return failed(f"tells the {fact}, which the scenario withholds: {match.group().strip()}")
    for fact, value in about.withheld.items():
        # Names and numbers are searched for everywhere, other words only in the opening: later they may be about items.
        distinctive = value[:1].isupper() or sum(c.isdigit() for c in value) >= SHORTEST
        if len(value) >= SHORTEST and f" {fold(value)} " in (words.line if distinctive else opening):
            return failed(f"tells the {fact}, which the scenario withholds")
    return PASSED


def _luhn(number: str) -> bool:
    """Whether a number has a correct check digit of payment cards (ISO/IEC 7812-1)."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in digits[1::2]) % 10

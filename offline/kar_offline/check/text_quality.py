"""Owns the gates of text quality: refusal, language, length, completeness, repetition, shape.

They need no facts about the entity.
"""

import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from kar_offline.check.gate_context import INSTRUCTION, Rules
from kar_offline.check.gate_result import PASSED, Finding, failed, unknown
from kar_offline.check.name_matching import Words, fold, runs

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

__all__ = ["complete", "language", "length", "refusal", "repetition", "shape"]

QUOTED_CHARS: Final = 60
"""Number of characters of a text that a reason quotes."""
NOTHING: Final = r"(?:do not|don t) (?:\w+ )?(?:know|recogni[sz]e) (?:this|that|the|any|of|anything|what|who|about)"
NO_DETAILS: Final = r"(?:do not|don t) (?:\w+ )?have (?:\w+ ){0,3}(?:information|knowledge|access|details|data)"
UNABLE: Final = (
    r"(?:can t|cannot|can not|could not|couldn t|won t|will not) (?:\w+ )?(?:provide|help|assist|answer|write|find|"
    r"fulfill?|comply|describe|introduce|discuss|verify|confirm|determine|generate|create|comment|identify|complete|offer|"
    r"share|analy[sz]e)"
)
MACHINE: Final = r"an? (?:ai|artificial intelligence|(?:large )?language model)"
REFUSALS: Final = (
    # For folded text. Each begins with letters, which makes the search fast.
    re.compile(rf" as {MACHINE} "),
    re.compile(
        rf" i (?:(?:m|am) (?:(?:just |only )?{MACHINE}|(?:very |so |really )?sorry|not able to|unable to)|apologi[sz]e|"
        rf"{UNABLE}|{NO_DETAILS}|{NOTHING}) "
    ),
    re.compile(r" (?:my|our) (?:guidelines|policy|policies|programming|knowledge cut ?off|training data) "),
    re.compile(
        r" (?:no|insufficient|not enough) (?:\w+ )?(?:information|data|details) (?:(?:is|are) )?(?:available|given) "
    ),
)
OPENINGS: Final = re.compile(
    r"\W*(?:(?:system|user|assistant|human|question|answer)\W*:|(?:sure|certainly|of course|absolutely|okay)\s*[,!.:]"
    r"|here(?:['’]s| is| are) (?:a|an|the|my|your|one|some)\b)",
    re.IGNORECASE,
)
CLOSINGS: Final = re.compile(r" (?:let me know|feel free to|hope (?:this|that|it) helps) ")
TOKENS: Final = re.compile(r"<\|?/?(?:im_\w+|end\w*|eot_id|start_\w+|assistant|user|system|s)\|?>|\[/?INST\]|<</?SYS>>")
MARKUP: Final = re.compile(
    r"\s{0,3}#{1,6}\s|\s*(?:[-*+•–]|\d{1,2}[.)])\s|\W{0,4}[A-Z][\w /]{2,30}\W{0,2}:\W*$|\s*[\[{]\s*[\"{\[]|"
    r"\s*\"\w+\"\s*:|\|"
)
"""Beginnings of lines that are no prose: headings, lists, labels on their own line, JSON, tables."""
INLINE: Final = re.compile(r"\*\*|```|\{\{|\{%|</?(?:p|br|div|b|i|ul|li|h\d|span|a)\b[^>]*>")
URL: Final = re.compile(r"https?://|www\.\w")
LABEL: Final = re.compile(r"(?:^|[\n,;.\"'*-])[ \"'*-]*((?:[\w/]+ ?){1,4})[\"'*]*$")
LABELS: Final = 2
"""An answer with at least this number of labels named like a factor or fact of the prompt is a list."""
META: Final = re.compile(
    r" (?:(?:the|this|your|that) (?:prompt|query|instructions?)|in this (?:example|scenario)|(?:the|this) (?:question|"
    r"answer) (?:is|to|must|should|requires?|asks?|lies|provided)|as (?:you )?(?:requested|asked)) "
)
FIRST_PERSON: Final = re.compile(
    r"I(?:['’](?:ve|m|ll|d)| (?:am|have|will|would|can|think|believe|hope|must|need|was|had)) [a-z]"
)
BEFORE_I: Final = re.compile(r"(?:[.!?:;,]|\b[a-z]+)\s+$")
"""Text before an "I" that is not part of a title such as "But I'm a Cheerleader"."""
QUOTED: Final = re.compile(r"(?<!\w)['\"‘“][^'\"‘’“”]{1,80}['\"’”](?!\w)")
IN_BRACKETS: Final = re.compile(r"\([^()]*\)")
END: Final = re.compile(r"[.!?…。！？।؟][)\]\"'”’»]*$")
SENTENCE: Final = re.compile(r"(?<=[.!?])\s+")
RUN: Final = 4
"""Number of words in the runs that are counted to find loops."""
MOST_REPEATED: Final = 0.2
"""The largest allowed share of runs that occurred before."""
LONG_RUN: Final = 8
"""This number of words in a row may not occur twice, except in a long name or a list of names."""
FEWEST_SMALL: Final = 6
"""A run with fewer words that begin with a small letter is a long name or a list of names."""
ECHOED: Final = 2
"""An answer with at least this number of runs of `INSTRUCTION` words of the prompt's own lines repeats the prompt."""
ECHOED_FACTORS: Final = 3
"""An answer with at least this number of factors in the prompt's own words repeats the prompt."""
LONG_FACTOR: Final = 4
"""A factor of this number of words or more, in the prompt's own words, repeats the prompt."""

LANGUAGES: Final = (
    "ar bg ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv th tr uk vi"
    " zh"
)
"""The languages to choose from. With all languages of the model, lists of names would count as rare languages."""
WINDOW: Final = 110
"""Number of characters at both ends of a text by which its language is recognised."""
SHORTEST_RECOGNISED: Final = 40
"""Fewest characters for which a language is recognised."""
PLAIN: Final = 0.95
"""If both ends together are in the wanted language with this confidence, the ends are not examined one by one."""
SURE: Final = 0.6
"""If one end is in another language with this confidence, the text fails."""


def refusal(words: Words) -> Finding:
    """Fails a text that declines to answer."""
    for pattern in REFUSALS:
        if match := pattern.search(words.line):
            return failed(f"declines to answer: {_around(words.line, match)}")
    return PASSED


@lru_cache(maxsize=8)
def _identifier(language: str) -> "LanguageIdentifier | None":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        return None
    identifier.set_languages({*LANGUAGES.split(), language})
    return identifier


def language(words: Words, rules: Rules) -> Finding:
    """Fails a text whose beginning or end is in another language than the scenario's.

    Source of the model: Lui and Baldwin, "langid.py" (ACL 2012). A change of language in the middle is not seen,
    because only both ends are read, whatever the length of the text.
    """
    identifier = _identifier(rules.language)
    if identifier is None:
        return unknown(f"no model knows the language {rules.language!r}")
    # Names in brackets and quotation marks are often in other languages.
    text = " ".join(QUOTED.sub(" ", IN_BRACKETS.sub(" ", words.text)).split())
    if len(text) < SHORTEST_RECOGNISED:
        return unknown("too short to tell its language")
    windows = (text,) if len(text) <= WINDOW else (text[:WINDOW], text[-WINDOW:])
    recognised, confidence = identifier.classify(" ".join(windows))
    if recognised == rules.language and confidence >= PLAIN:
        return PASSED
    for window in windows:
        recognised, confidence = identifier.classify(window)
        if recognised != rules.language and confidence >= SURE:
            return failed(f"written in {recognised!r}, not in {rules.language!r}: {_cut(window)}")
    return PASSED


def length(words: Words, rules: Rules) -> Finding:
    """Fails a text with fewer or more words than the scenario allows; white space separates words."""
    count, (fewest, most) = len(words.text.split()), rules.words
    if count < fewest:
        return failed(f"{count} words, fewer than {fewest}")
    return failed(f"{count} words, more than {most}") if count > most else PASSED


def complete(words: Words, finish: str) -> Finding:
    """Fails a text that was cut off, by the model's `finish` or by the last character."""
    if finish == "length":
        return failed("cut off at the most tokens that the model may write")
    text = words.text.rstrip()
    return PASSED if END.search(text) else failed(f"ends in the middle of a sentence: ...{text[-QUOTED_CHARS:]}")


def repetition(words: Words) -> Finding:
    """Fails a text that repeats itself: a sentence, a long run of words, or many short runs."""
    short_runs = Counter(runs(words.folded, RUN))
    if len(short_runs) == short_runs.total():
        return PASSED
    sentence, times = Counter(map(fold, SENTENCE.split(words.text))).most_common(1)[0]
    if times > 1 and sentence.count(" ") >= RUN:
        return failed(f"says {times} times: {_cut(sentence)}")
    earlier: set[tuple[str, ...]] = set()
    for first, run in enumerate(runs(words.folded, LONG_RUN)):
        if run in earlier and sum(not words.capital(first + word) for word in range(LONG_RUN)) >= FEWEST_SMALL:
            return failed(f"says twice: {' '.join(run)}")
        earlier.add(run)
    if (again := 1 - len(short_runs) / short_runs.total()) > MOST_REPEATED:
        most = " ".join(short_runs.most_common(1)[0][0])
        return failed(f"{again:.0%} of its runs of {RUN} words came before: {most}")
    return PASSED


def shape(words: Words, rules: Rules) -> Finding:
    """Fails a text that is not plain prose: it has markup, chat, parts of the prompt, or talks about the task."""
    text = words.text
    for line in text.split("\n"):
        for pattern, what in ((OPENINGS, "talks as in a chat"), (MARKUP, "has a heading, a list or data")):
            if match := pattern.match(line):
                return failed(f"{what}: {_around(line, match)}")
    for pattern, what in ((TOKENS, "has tokens of a chat"), (INLINE, "has markup"), (URL, "has an address")):
        if match := pattern.search(text):
            return failed(f"{what}: {_around(text, match)}")
    if len(echoed := rules.instructions.intersection(runs(words.folded, INSTRUCTION))) >= ECHOED:
        return failed(f"repeats the prompt: {' '.join(min(echoed))}")
    named = [factor for factor in rules.factors if f" {factor} " in words.line]
    if len(named) >= ECHOED_FACTORS or any(factor.count(" ") + 1 >= LONG_FACTOR for factor in named):
        return failed(f"repeats the prompt's factors: {', '.join(named)}")
    if len(labels := _labels(text, rules)) >= LABELS:
        return failed(f"is a list of labels: {', '.join(labels)}")
    for pattern in (META, CLOSINGS):
        if match := pattern.search(words.line):
            return failed(f"talks about the task: {_around(words.line, match)}")
    bare = QUOTED.sub(" ", text) if FIRST_PERSON.search(text) else ""
    for match in FIRST_PERSON.finditer(bare):
        if match.start() == 0 or BEFORE_I.search(bare[max(match.start() - QUOTED_CHARS, 0) : match.start()]):
            return failed(f"speaks of itself: {_around(bare, match)}")
    return PASSED


def _labels(text: str, rules: Rules) -> list[str]:
    """Words before a colon that are named like a factor or a fact of the prompt."""
    heads = (LABEL.search(part[-QUOTED_CHARS:]) for part in text.split(": ")[:-1])
    return [head[1] for head in heads if head and not rules.vocabulary.isdisjoint(fold(head[1]).split())]


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED_CHARS else text[:QUOTED_CHARS].rstrip() + "..."


def _around(text: str, match: re.Match[str]) -> str:
    return _cut(" ".join(text[match.start() : match.start() + 2 * QUOTED_CHARS].split()))

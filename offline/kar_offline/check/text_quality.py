"""Owns the gates that look at a text's form: refusal, language, length, completeness, repetition, shape.

None of them needs to know anything of the entity.
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

SAID: Final = 60
"""Characters of a text that a reason quotes."""
NOTHING: Final = r"(?:do not|don t) (?:\w+ )?(?:know|recogni[sz]e) (?:this|that|the|any|of|anything|what|who|about)"
NO_DETAILS: Final = r"(?:do not|don t) (?:\w+ )?have (?:\w+ ){0,3}(?:information|knowledge|access|details|data)"
UNABLE: Final = (
    r"(?:can t|cannot|can not|could not|couldn t|won t|will not) (?:\w+ )?(?:provide|help|assist|answer|write|find|"
    r"fulfill?|comply|describe|introduce|discuss|verify|confirm|determine|generate|create|comment|identify|complete|offer|"
    r"share|analy[sz]e)"
)
MACHINE: Final = r"an? (?:ai|artificial intelligence|(?:large )?language model)"
REFUSALS: Final = (
    # In folded text. Each begins with letters, which makes the search fast.
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
"""How a line of markup begins: headings, lists, labels by themselves, JSON, tables."""
INLINE: Final = re.compile(r"\*\*|```|\{\{|\{%|</?(?:p|br|div|b|i|ul|li|h\d|span|a)\b[^>]*>")
URL: Final = re.compile(r"https?://|www\.\w")
LABEL: Final = re.compile(r"(?:^|[\n,;.\"'*-])[ \"'*-]*((?:[\w/]+ ?){1,4})[\"'*]*$")
LABELS: Final = 2
"""Labels named like a factor or a fact of the question that an answer may not have."""
META: Final = re.compile(
    r" (?:(?:the|this|your|that) (?:prompt|query|instructions?)|in this (?:example|scenario)|(?:the|this) (?:question|"
    r"answer) (?:is|to|must|should|requires?|asks?|lies|provided)|as (?:you )?(?:requested|asked)) "
)
FIRST_PERSON: Final = re.compile(
    r"I(?:['’](?:ve|m|ll|d)| (?:am|have|will|would|can|think|believe|hope|must|need|was|had)) [a-z]"
)
BEFORE_I: Final = re.compile(r"(?:[.!?:;,]|\b[a-z]+)\s+$")
"""What stands before it but in a title such as "But I'm a Cheerleader"."""
QUOTED: Final = re.compile(r"(?<!\w)['\"‘“][^'\"‘’“”]{1,80}['\"’”](?!\w)")
IN_BRACKETS: Final = re.compile(r"\([^()]*\)")
END: Final = re.compile(r"[.!?…。！？।؟][)\]\"'”’»]*$")
SENTENCE: Final = re.compile(r"(?<=[.!?])\s+")
RUN: Final = 4
"""Words in a row that are counted for loops."""
MOST_REPEATED: Final = 0.2
"""Share of such runs that may have come before."""
LONG_RUN: Final = 8
"""Words in a row that may not come twice, unless they are a long name or a list of names."""
FEWEST_SMALL: Final = 6
"""Words of such a run that begin with a small letter."""
ECHOED: Final = 2
"""Runs of `INSTRUCTION` words that an answer may not have in common with the prompt's own lines."""
ECHOED_FACTORS: Final = 3
"""Factors of several words that an answer may not all name as the prompt does."""
LONG_FACTOR: Final = 4
"""Words of a factor that an answer may not name so at all: "director and leading actors"."""

LANGUAGES: Final = (
    "ar bg ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv th tr uk vi"
    " zh"
)
"""What a text is taken for. Among all languages that the model knows, lists of names are taken for rare ones."""
WINDOW: Final = 110
"""Characters that a language is told from: the first and the last so many of a text."""
SHORTEST_TOLD: Final = 40
PLAIN: Final = 0.95
"""Confidence in the language asked for, of both ends together, from which neither is in another."""
SURE: Final = 0.6
"""Confidence from which another language than the one asked for is a failure."""


def refusal(words: Words) -> Finding:
    """Whether the model declines to answer."""
    for pattern in REFUSALS:
        if found := pattern.search(words.line):
            return failed(f"declines to answer: {_around(words.line, found)}")
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
    """Whether both ends of a text are in the language asked for.

    Source of the model: Lui and Baldwin, "langid.py" (ACL 2012). A change of language in between is not seen: two
    windows are what a text of any length can afford.
    """
    identifier = _identifier(rules.language)
    if identifier is None:
        return unknown(f"no model knows the language {rules.language!r}")
    # Names in brackets and quotation marks are often in other languages.
    text = " ".join(QUOTED.sub(" ", IN_BRACKETS.sub(" ", words.text)).split())
    if len(text) < SHORTEST_TOLD:
        return unknown("too short to tell its language")
    windows = (text,) if len(text) <= WINDOW else (text[:WINDOW], text[-WINDOW:])
    told, confidence = identifier.classify(" ".join(windows))
    if told == rules.language and confidence >= PLAIN:
        return PASSED
    for window in windows:
        told, confidence = identifier.classify(window)
        if told != rules.language and confidence >= SURE:
            return failed(f"written in {told!r}, not in {rules.language!r}: {_cut(window)}")
    return PASSED


def length(words: Words, rules: Rules) -> Finding:
    """Whether a text has as many words as the scenario asks for; words are what white space separates."""
    count, (fewest, most) = len(words.text.split()), rules.words
    if count < fewest:
        return failed(f"{count} words, fewer than {fewest}")
    return failed(f"{count} words, more than {most}") if count > most else PASSED


def complete(words: Words, finish: str) -> Finding:
    """Whether a text was written to its end, by what the model told (`finish`) and by its last character."""
    if finish == "length":
        return failed("cut off at the most tokens that the model may write")
    text = words.text.rstrip()
    return PASSED if END.search(text) else failed(f"ends in the middle of a sentence: ...{text[-SAID:]}")


def repetition(words: Words) -> Finding:
    """Whether a text goes in circles: many words in a row that come twice, or many runs of some words."""
    short_runs = Counter(runs(words.folded, RUN))
    if len(short_runs) == short_runs.total():
        return PASSED
    sentence, times = Counter(map(fold, SENTENCE.split(words.text))).most_common(1)[0]
    if times > 1 and sentence.count(" ") >= RUN:
        return failed(f"says {times} times: {_cut(sentence)}")
    seen: set[tuple[str, ...]] = set()
    for at, run in enumerate(runs(words.folded, LONG_RUN)):
        if run in seen and sum(not words.capital(at + word) for word in range(LONG_RUN)) >= FEWEST_SMALL:
            return failed(f"says twice: {' '.join(run)}")
        seen.add(run)
    if (again := 1 - len(short_runs) / short_runs.total()) > MOST_REPEATED:
        most = " ".join(short_runs.most_common(1)[0][0])
        return failed(f"{again:.0%} of its runs of {RUN} words came before: {most}")
    return PASSED


def shape(words: Words, rules: Rules) -> Finding:
    """Whether a text is prose about its subject: no markup, no chat, nothing of the prompt, no talk about the task."""
    text = words.text
    for line in text.split("\n"):
        for pattern, what in ((OPENINGS, "talks as in a chat"), (MARKUP, "has a heading, a list or data")):
            if found := pattern.match(line):
                return failed(f"{what}: {_around(line, found)}")
    for pattern, what in ((TOKENS, "has tokens of a chat"), (INLINE, "has markup"), (URL, "has an address")):
        if found := pattern.search(text):
            return failed(f"{what}: {_around(text, found)}")
    if len(echoed := rules.instructions.intersection(runs(words.folded, INSTRUCTION))) >= ECHOED:
        return failed(f"repeats the prompt: {' '.join(min(echoed))}")
    named = [factor for factor in rules.factors if f" {factor} " in words.line]
    if len(named) >= ECHOED_FACTORS or any(factor.count(" ") + 1 >= LONG_FACTOR for factor in named):
        return failed(f"repeats the prompt's factors: {', '.join(named)}")
    if len(labels := _labels(text, rules)) >= LABELS:
        return failed(f"is a list of labels: {', '.join(labels)}")
    for pattern in (META, CLOSINGS):
        if found := pattern.search(words.line):
            return failed(f"talks about the task: {_around(words.line, found)}")
    bare = QUOTED.sub(" ", text) if FIRST_PERSON.search(text) else ""
    for found in FIRST_PERSON.finditer(bare):
        if found.start() == 0 or BEFORE_I.search(bare[max(found.start() - SAID, 0) : found.start()]):
            return failed(f"speaks of itself: {_around(bare, found)}")
    return PASSED


def _labels(text: str, rules: Rules) -> list[str]:
    """What stands before a colon and is named like a factor or a fact of the question."""
    heads = (LABEL.search(part[-SAID:]) for part in text.split(": ")[:-1])
    return [head[1] for head in heads if head and not rules.vocabulary.isdisjoint(fold(head[1]).split())]


def _cut(text: str) -> str:
    return text if len(text) <= SAID else text[:SAID].rstrip() + "..."


def _around(text: str, found: re.Match[str]) -> str:
    return _cut(" ".join(text[found.start() : found.start() + 2 * SAID].split()))

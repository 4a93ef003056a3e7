"""Owns the search for text that addresses a language model: phrases, markers of roles, tokens of chat templates.

The search is a heuristic: text that it misses enters prompts, but only as quoted data. It also finds disguised phrases:
look-alike letters of other scripts, accents, full-width forms, invisible characters, digits for letters, spaced
letters.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from kar_offline.prompts.folded_text import LOOK_ALIKES, fold_with_positions, visible

__all__ = ["MARKUP", "Finding", "find_instruction"]

# Patterns are for folded text. Every repetition is bounded or ends at a border, so no search takes long on any text.
SEP: Final = r"[\W_]+"
GAP: Final = rf"(?:{SEP}[^\W_]+){{0,4}}?{SEP}"


def _phrases(*phrases: str) -> re.Pattern[str]:
    """One pattern for several phrases. A space matches any separator of two words; `~` also up to four words."""
    alternatives = "|".join(phrase.replace("~", GAP).replace(" ", SEP) for phrase in phrases)
    return re.compile(rf"(?<![^\W_])(?:{alternatives})(?![^\W_])")


CHAT_TOKEN: Final = re.compile(
    r"<\|[^\s<>|]{0,60}\|>|<\||\|>"
    r"|<</?sys>>|</?s>"
    r"|\[/?(?:inst|system_prompt|available_tools|tool_calls|tool_results|bos|eos|pad|cls|sep|mask)\]"
    r"|</?(?:start|begin|end|bos|eos|eot|eom|pad|unk|im|think|tool|system|user|assistant|human)[\w▁ -]{0,40}>"
)
MARKUP: Final = re.compile(
    CHAT_TOKEN.pattern + r"|</?[a-z][\w-]{0,40}(?: [^<>]{0,200}=[^<>]{0,200})?/?>|<!--|-->"  # tags
    r"|\{\{|\}\}|\{%|%\}|\{#|#\}|\$\{|<%|%>"  # templates
    r"|`{2,}|#{2,}|[-=_~#*]{4,}|[-=_~]{3}|(?<!\w)\*{3}"  # fences, headings, rulers; F***ed stays
)

_WORK: Final = "(?:film|movie|item|book|article|track|song|album|product|user|viewer|reader|listener)s?"
_MODEL: Final = "(?:(?:ai|llm|gpt|chatgpt|claude|gemini|(?:large )?language model|assistant|chatbot|model)s?)"
_ANSWER: Final = "(?:answer|response|reply|output)"
ENGLISH: Final[Mapping[str, re.Pattern[str]]] = {
    "tells to ignore instructions": _phrases(
        "(?:ignor(?:e|es|ing)|disregard(?:ing)?|forget(?:ting)?|overrid(?:e|ing)|bypass|discard|neglect|skip|"
        "pay no attention to)~(?:instructions?|prompts?|guidelines|directives?|directions|commands|constraints|"
        "previous|prior|preceding|foregoing|above|(?:you were|been) told)",
        "(?:stop|do not|don t|never|no longer)~(?:follow|following|obey|obeying|comply)~"
        "(?:instructions?|prompts?|rules|guidelines|above)",
    ),
    "speaks of the prompt": _phrases(
        "(?:system|developer) (?:prompt|message|instructions?)",
        "(?:your|hidden|initial|original|this|the above|entire|full) prompt",
        "(?:repeat|print|reveal|show|output|translate|summari[sz]e|leak|display|echo|copy)~"
        "(?:prompts?|instructions|(?:text|words|everything|messages?|contents?|lines?) (?:above|before this|verbatim))",
        "(?:begin|start|end) of(?: the)? (?:data|inputs?|prompt|instructions?|context|attributes|facts)",
        "(?:developer|god|jailbreak|dan) mode (?:on|enabled|activated)",
        "do anything now",
    ),
    "gives instructions": _phrases(
        "your (?:new|real|actual|only|next|true) (?:task|job|role|goal|instructions?|objective)",
        "you (?:are|re) now (?:an?|the|my|in|no|free|acting|called|going|operating|dan)",
        "(?:act|behave|respond|reply|answer|speak|write) (?:as|like) (?:if you|dan|an? (?:ai|assistant|unrestricted))",
        "(?:pretend|imagine) (?:to be|that you|you are|you re) (?:an?|the|no|my) (?:ai|assistant|unrestricted|model)",
        "from now on (?:you|your|always|only|answer|respond|reply|ignore|write|every|all|any|call)",
        "you (?:must|should|shall|have to)(?: now| always| only)? (?:say|write|answer|respond|reply|output|describe|"
        "recommend|include|rate|state|praise)",
        "when (?:summari[sz]ing|describing|introducing|answering|you (?:describe|summari[sz]e|introduce|write about))",
        "(?:say|write|print|output|return|echo|answer|respond|reply)(?: with)? the (?:words?|text|string|following)",
        "(?:always|must|please) (?:recommend|promote|praise|rate|rank|describe|mention|say|write|answer|respond)",
        "(?:do not|don t|never|must not|avoid)(?: ever)? (?:mention|mentioning|describe|describing|summari[sz]e)",
    ),
    "addresses a model": _phrases(
        f"(?:attention|dear|hey|hello|note to|message (?:to|for)|instructions? (?:to|for))(?: the| all| any)? {_MODEL}",
        "(?:as|if you are|if you re) an? (?:ai|llm|(?:large )?language model)",
        f"{_MODEL} (?:must|reading this|processing this|reads this|summari[sz]ing this)",
    ),
    "says how to answer": _phrases(
        "(?:respond|reply|answer|output|return|print)(?: [^\\W_]+){0,2}? (?:only|just|exactly|solely|nothing but)",
        "(?:respond|reply|answer|write|say) (?:with|in) (?:one|only|just|exactly|english|french|german|spanish|italian|"
        "russian|chinese|json|yaml|xml|html)",
        f"(?:your|the|every|this) {_ANSWER} (?:must|should|shall|has to)",
        f"(?:end|begin|start|finish|replace) (?:your|the|every|this) {_ANSWER}",
        "(?:instead|then) (?:respond|reply|output|print|answer with)",
        "instead (?:write|say|describe|recommend|answer)",
        "without headings or lists",
        "(?:describe|introduce|analy[sz]e) (?:these|the following|this) (?:factors?|attributes?|ratings?)",
    ),
    "speaks of other entities": _phrases(
        f"(?:describe|present|portray|introduce|rate|rank|recommend|promote|praise|mention|claim|say|write)~(?:"
        rf"{_WORK}(?: no| nr| number| id)?{SEP}\d+|"
        f"(?:every|all|other|another|next|following|previous|any)(?: other)? {_WORK})",
        f"(?:for|in|about|of|to)(?: the)? (?:next|previous|other|following|all|every) {_WORK} (?:write|say|answer)",
    ),
}
MARKERS: Final[Mapping[str, re.Pattern[str]]] = {
    "has the marker of a role": re.compile(
        r"(?:\A|\n)\W{0,5}(?:system|assistant|developer|instructions?)\s{0,3}:"
        r"|[\n.!?;>\]})'\"|#]\s{0,9}(?:system|assistant|developer|user|human|instructions?)\s{0,3}:"
    ),
    "gives new instructions": re.compile(
        r"\b(?:new|updated|additional|important|real|actual|urgent|final|following)[\W_]+"
        r"(?:instructions?|tasks?|directives?)\s{0,3}:"
        r"|(?:ignore|disregard|forget)(?:all|any|the)?(?:previous|prior|above|instructions|prompt)"
        r"|(?:\A|[\n.!?;:]\s{0,9})(?:respond|reply)[\W_]+(?:with|in|as)\b"
        r"|(?:\A|[\n.!?;:]\s{0,9})(?:output|print|respond|reply)\s{0,3}:"
        r"|snoitcurtsni|suoiverp"  # backwards
    ),
    "has the form of JSON": re.compile(
        r"[\"'](?:role|content|text|id|title|template|entity|prompt|system)[\"']\s{0,9}:|\}\s{0,9},\s{0,9}\{"
    ),
    "names an encoding": re.compile(r"\b(?:base64|rot13)\b"),
}
# "Ignore the previous instructions" in other languages: stems of the verb, then of its object.
OTHER_LANGUAGES: Final = (
    ("ignorier vergiss missacht", "anweisung instruktion davor zuvor vorherig bisherig obige"),
    ("ignore oublie", "instruction consigne precede ci-dessus"),
    ("ignora ignore olvida omite desobedece", "instruccion indicacion anterior"),
    ("ignor esquec desconsider", "instruc anterior acima"),
    ("ignora dimentica trascura", "istruzion precedent"),
    ("negeer vergeet", "instructie aanwijzing opdracht voorgaande bovenstaande"),
    ("ignorera glom", "instruktion anvisning"),
    ("zignoruj ignoruj zapomnij pomin", "instrukcj polecen poprzedni"),
    ("yoksay gormezden dikkate unut", "talimat komut"),
    ("abaikan lupakan", "instruksi perintah"),
    ("игнориру проигнориру забудь", "инструкци указани предыдущ"),
    ("ігноруй забудь", "інструкці вказівк попередн"),
    ("تجاهل انس", "تعليمات توجيهات"),
    ("התעלם שכח", "הוראות הנחיות"),
    ("अनदेखा नजरअंदाज भूल", "निर्देश"),
)
UNSPACED_LANGUAGES: Final = (
    ("忽略 无视 無視", "指令 指示 提示 规则 之前 以上 上述"),
    ("无视 忘记 忘記 忘れ", "指令 指示 命令 プロンプト"),
    ("무시", "지시 명령 프롬프트 이전"),
    ("เพิกเฉย ละเว้น", "คำสั่ง"),
)


def _either_order(stems: Sequence[tuple[str, str]], border: str) -> re.Pattern[str]:
    """Matches the verb and its object within 40 characters, in either order; `border` stands before the verb."""
    orders = []
    for pair in stems:
        verb, noun = ("|".join(re.escape(fold_with_positions(stem)[0]) for stem in words.split()) for words in pair)
        orders += [rf"{border}(?:{verb})[\s\S]{{0,40}}?(?:{noun})", rf"(?:{noun})[\s\S]{{0,40}}?{border}(?:{verb})"]
    return re.compile("|".join(orders))


INSTRUCTIONS: Final[Mapping[str, re.Pattern[str]]] = {
    **ENGLISH,
    **MARKERS,
    "tells to ignore instructions, in another language": _either_order(OTHER_LANGUAGES, r"\b"),
    "tells to ignore instructions, in a language without spaces": _either_order(UNSPACED_LANGUAGES, ""),
}
SPACED_LETTERS: Final = re.compile(r"(?<![^\W_])(?:[^\W_][\W_]{1,2}){5,}[^\W_](?![^\W_])")
SPACED_WORDS: Final = re.compile("ignore|disregard|instruction|prompt|previous")


class Finding(NamedTuple):
    """A phrase that looks like an instruction: its start in the visible text, and the reason."""

    start: int
    why: str


def _findings(text: str) -> Iterator[Finding]:
    folded, positions = fold_with_positions(text)
    for token in CHAT_TOKEN.finditer(folded):
        yield Finding(positions[token.start()], "has a token of chat templates")
        break
    without_markup = MARKUP.sub(lambda markup: " " * len(markup[0]), folded)
    for form in {without_markup, without_markup.translate(LOOK_ALIKES)}:
        for why, pattern in INSTRUCTIONS.items():
            if phrase := pattern.search(form):
                yield Finding(positions[phrase.start()], why)
        for word in SPACED_LETTERS.finditer(form):
            if SPACED_WORDS.search(re.sub(SEP, "", word[0])):
                yield Finding(positions[word.start()], "sets letters apart")


def find_instruction(text: str) -> Finding | None:
    """The first phrase of `visible(text)` that looks like an instruction to a model."""
    return min(_findings(visible(text)), default=None)

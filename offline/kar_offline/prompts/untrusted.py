"""Owns text from outside: titles, descriptions and reviews may say anything, and are shown as data or not at all.

Three lines of defence, none of which is taken to be enough by itself:

- `clean` makes any text one short line without what markup, templates or a model's own tokens are made of, and
  `quoted` puts it between double quotes that it cannot close. So no text changes the shape of a prompt.
- `instruction` finds text that speaks to a model. A title is shown up to there, another fact is not shown (`own_title`,
  `own_fact`).
- What is `suspicious` is never shown in the prompt of another entity (`title_elsewhere`).

Searches see through what hides words from them: look-alike letters of other scripts, accents, full width forms,
invisible characters, digits for letters, letters set apart.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = [
    "WITHHELD",
    "Part",
    "Shown",
    "clean",
    "own_fact",
    "own_title",
    "plain",
    "quoted",
    "suspicious",
    "title_elsewhere",
]

Part = str | int | float
"""A fact, or one of a list."""
WITHHELD: Final = "(withheld)"
READ_CHARS: Final = 20_000
"""Nothing beyond is read: no prompt shows so much, and searches must end."""

# Invisible, though Unicode calls them letters, marks or symbols: fillers, joiners, variation selectors, empty Braille.
INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Scripts of the Middle East and of India, and emoji, need the two joiners, one at a time.
JOINED: Final = "\u0600-\u08ff\u0900-\u0dff\u2600-\u27bf\U0001f000-\U0001faff"
JOINERS: Final = "\u200c\u200d"
LOOSE_JOINER: Final = re.compile(f"(?<![{JOINED}])[{JOINERS}]|[{JOINERS}](?![{JOINED}])")

# What a reader of double quotes may take for one, and what escapes one.
QUOTES: Final = str.maketrans({**dict.fromkeys('"“”„‟〝〞〟＂❝❞″˝ˮ`´｀', "'"), "\\": "/", "＼": "/"})


def visible(text: str) -> str:
    """Text in Unicode's NFC form: control characters are spaces (line feeds stay), invisible characters are gone."""
    text = text[:READ_CHARS]
    if text.isascii() and text.isprintable():
        return text
    kept = (c if c.isprintable() or c in JOINERS else _in_place_of(c) for c in INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", LOOSE_JOINER.sub("", "".join(kept)))


def _in_place_of(character: str) -> str:
    if character == "\n":
        return character
    return " " if character.isspace() or unicodedata.category(character) == "Cc" else ""


# Letters of other scripts that look like Latin ones, each pair once; and digits that stand for letters.
_ALIKE: Final = (
    "аa вb сc ԁd еe ғf һh нh іi јj кk ӏl мm ոn пn оo рp ԛq гr ѕs тt ѵv ԝw хx уy "
    "αa βb εe ηn ιi κk μu νv οo ρp τt υu χx ωw օo սu հh ցg "
    "ᴀa ʙb ᴄc ᴅd ᴇe ꜰf ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz ɑa ɡg ıi łl øo đd "
    "0o 1i 3e 4a 5s 7t @a $s"
)
ALIKE: Final = str.maketrans(
    {pair[0]: pair[1] for pair in _ALIKE.split()}
    # Letters in black circles and squares, and those that flags are made of.
    | {chr(first + n): chr(97 + n) for first in (0x1F150, 0x1F170, 0x1F1E6) for n in range(26)}
)


def _folded(text: str) -> tuple[str, Sequence[int]]:
    """Text without case, accents and compatibility forms, and where in `text` each of its characters comes from."""
    if text.isascii():
        return text.lower(), range(len(text) + 1)
    folded, places = [], []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.category(part)[0] not in "MC" or part == "\n":
                folded.append(part)
                places.append(place)
    return "".join(folded), [*places, len(text)]


# Patterns look at folded text. Every repetition has an end or a border, so that none takes long on any text.
SEP: Final = r"[\W_]+"
GAP: Final = rf"(?:{SEP}[^\W_]+){{0,4}}?{SEP}"


def _phrases(*phrases: str) -> re.Pattern[str]:
    """One pattern of several: a space stands for anything between two words, `~` also for up to four words."""
    whole = "|".join(phrase.replace("~", GAP).replace(" ", SEP) for phrase in phrases)
    return re.compile(rf"(?<![^\W_])(?:{whole})(?![^\W_])")


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
ADDRESS: Final = re.compile(
    r"(?<!\w)(?:[a-z]{2,12}://|www\.|javascript:|mailto:|data:\w{1,20}/)\S+"
    r"|(?<![\w.-])(?:[a-z0-9-]{1,63}\.){1,5}(?:com|net|org|io|ai|app|dev|info|biz|xyz|co|me|ru|cn|link|site|top|shop)/\S*"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,5}"
)
BLOB: Final = re.compile(r"(?<![a-z0-9+/])(?=[a-z+/]{0,200}\d)[a-z0-9+/]{40,}={0,2}")
NOT_SHOWN: Final = re.compile(f"{MARKUP.pattern}|{ADDRESS.pattern}|{BLOB.pattern}")

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
# "Ignore the previous instructions" in other languages: stems of the verb, and of what is to be ignored.
OTHERS: Final = (
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
UNSPACED: Final = (
    ("忽略 无视 無視", "指令 指示 提示 规则 之前 以上 上述"),
    ("无视 忘记 忘記 忘れ", "指令 指示 命令 プロンプト"),
    ("무시", "지시 명령 프롬프트 이전"),
    ("เพิกเฉย ละเว้น", "คำสั่ง"),
)


def _either_order(stems: Sequence[tuple[str, str]], border: str) -> re.Pattern[str]:
    ways = []
    for pair in stems:
        verb, noun = ("|".join(re.escape(_folded(stem)[0]) for stem in words.split()) for words in pair)
        ways += [rf"{border}(?:{verb})[\s\S]{{0,40}}?(?:{noun})", rf"(?:{noun})[\s\S]{{0,40}}?{border}(?:{verb})"]
    return re.compile("|".join(ways))


INSTRUCTIONS: Final[Mapping[str, re.Pattern[str]]] = {
    **ENGLISH,
    **MARKERS,
    "tells to ignore instructions, in another language": _either_order(OTHERS, r"\b"),
    "tells to ignore instructions, in a language without spaces": _either_order(UNSPACED, ""),
}
APART: Final = re.compile(r"(?<![^\W_])(?:[^\W_][\W_]{1,2}){5,}[^\W_](?![^\W_])")
TOLD_APART: Final = re.compile("ignore|disregard|instruction|prompt|previous")


class Finding(NamedTuple):
    """What looks like an instruction: where it starts in the visible text, and what it does."""

    start: int
    why: str


def _findings(text: str) -> Iterator[Finding]:
    folded, places = _folded(text)
    for token in CHAT_TOKEN.finditer(folded):
        yield Finding(places[token.start()], "has a token of chat templates")
        break
    bare = MARKUP.sub(lambda markup: " " * len(markup[0]), folded)
    for form in {bare, bare.translate(ALIKE)}:
        for why, pattern in INSTRUCTIONS.items():
            if found := pattern.search(form):
                yield Finding(places[found.start()], why)
        for found in APART.finditer(form):
            if TOLD_APART.search(re.sub(SEP, "", found[0])):
                yield Finding(places[found.start()], "sets letters apart")


def instruction(text: str) -> Finding | None:
    """The first phrase of `visible(text)` that looks like an instruction to a model."""
    return min(_findings(visible(text)), default=None)


def suspicious(text: str) -> str | None:
    """Why text must not be shown in the prompt of another entity; None: nothing speaks against it.

    It looks like an instruction to a model, or holds an address or encoded data. A heuristic: what it lets pass is
    still only data between quotes.
    """
    if found := instruction(text):
        return found.why
    folded = _folded(visible(text))[0]
    if ADDRESS.search(folded):
        return "has an address"
    return "has encoded data" if BLOB.search(folded) else None


def clean(text: str, chars: int) -> str:
    """Text on one line of at most `chars` characters, cut at a word where one ends in its last half.

    Control and invisible characters, markup, template syntax, tokens of chat templates, addresses and encoded data
    are gone; double quotes of all kinds and backticks are single ones, backslashes slashes.
    """
    text = visible(text)
    folded, places = _folded(text)
    shown = list(text)
    for found in NOT_SHOWN.finditer(folded):
        for place in range(places[found.start()], places[found.end() - 1] + 1):
            shown[place] = " "
    line = " ".join("".join(shown).translate(QUOTES).split())
    if len(line) <= chars:
        return line
    head = line[: chars - 1]
    space = head.rfind(" ")
    return (head[:space] if space >= chars // 2 else head).rstrip(" ,;:.-(") + "…"


class Shown(NamedTuple):
    """What may be shown of a fact: its parts, one where it is no list, and how many others are withheld."""

    parts: list[Part]
    withheld: int


def own_title(title: str, chars: int) -> str:
    """A title for the prompt of its own item: up to what looks like an instruction. Empty: nothing is left."""
    text = visible(title)
    found = instruction(text)
    if not found:
        return clean(text, chars)
    shown = clean(text[: found.start], chars).rstrip(" .,:;!?-–—'([")
    return shown if any(map(str.isalnum, shown)) else ""


@lru_cache(maxsize=1 << 16)
def title_elsewhere(title: str, chars: int) -> str:
    """A title for the prompts of other entities: whole, or `WITHHELD`."""
    return WITHHELD if suspicious(title) else clean(title, chars) or WITHHELD


def own_fact(value: object, chars: int) -> Shown:
    """A fact, or a list of them, for the prompt of its own entity: text clean, parts of lists that instruct withheld.

    Lists end with an ellipsis where their parts have more than `chars` characters together.
    """
    parts: list[Part] = []
    withheld, left = 0, chars
    for part in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(part, int | float):
            if instruction(text := str(part)):
                withheld += 1
                continue
            part = clean(text, chars)
        left -= len(str(part))
        if left < 0:
            parts.append("…")
            break
        if part != "":
            parts.append(part)
    if len(parts) > 1 and instruction(" ".join(map(str, parts))):  # which its parts make up together
        return Shown([], withheld + len(parts))
    return Shown(parts, withheld)


def plain(value: Part | Sequence[Part], quote: str = "") -> str:
    """Clean text and numbers as text: text between quotes, whole numbers without a point, lists with commas."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, Sequence):
        return ", ".join(plain(part, quote) for part in value)
    return format(value, "g") if isinstance(value, float) else str(value)


def quoted(value: Part | Sequence[Part]) -> str:
    """The same for a prompt, with text between double quotes, which clean text cannot close."""
    return plain(value, '"')

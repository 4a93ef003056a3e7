"""Owns text from outside (titles, descriptions, reviews), which may say anything: prompts show it only as data.

There are three lines of defence, because none is sufficient alone:

- `clean` makes any text one short line without markup, template syntax or special tokens, and `quoted` puts it between
  double quotes that it cannot close. So no text changes the structure of a prompt.
- `find_instruction` finds text that addresses a model. A title is cut before such text (`own_title`); any other fact
  with such text is left out (`own_fact`).
- `suspicious` text is never shown in the prompts of other entities (`title_elsewhere`).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from kar_offline.prompts.folded_text import fold_with_positions, visible
from kar_offline.prompts.instructions import MARKUP, find_instruction

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
"""A fact, or an element of a fact that is a list."""
WITHHELD: Final = "(withheld)"

# Characters that a reader may take for a double quote, and characters that escape one.
QUOTES: Final = str.maketrans({**dict.fromkeys('"“”„‟〝〞〟＂❝❞″˝ˮ`´｀', "'"), "\\": "/", "＼": "/"})
ADDRESS: Final = re.compile(
    r"(?<!\w)(?:[a-z]{2,12}://|www\.|javascript:|mailto:|data:\w{1,20}/)\S+"
    r"|(?<![\w.-])(?:[a-z0-9-]{1,63}\.){1,5}(?:com|net|org|io|ai|app|dev|info|biz|xyz|co|me|ru|cn|link|site|top|shop)/\S*"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,5}"
)
BLOB: Final = re.compile(r"(?<![a-z0-9+/])(?=[a-z+/]{0,200}\d)[a-z0-9+/]{40,}={0,2}")
NOT_SHOWN: Final = re.compile(f"{MARKUP.pattern}|{ADDRESS.pattern}|{BLOB.pattern}")


def suspicious(text: str) -> str | None:
    """Why text must not be shown in the prompts of other entities; None: it may be shown.

    Reasons are an instruction to a model, an address, or encoded data.
    """
    if instruction := find_instruction(text):
        return instruction.why
    folded = fold_with_positions(visible(text))[0]
    if ADDRESS.search(folded):
        return "has an address"
    return "has encoded data" if BLOB.search(folded) else None


def clean(text: str, chars: int) -> str:
    """Text on one line of at most `chars` characters, cut at the end of a word if one lies in its last half.

    Control and invisible characters, markup, template syntax, tokens of chat templates, addresses and encoded data are
    removed. Double quotes of all kinds and backticks become single quotes, backslashes become slashes.
    """
    text = visible(text)
    folded, positions = fold_with_positions(text)
    shown = list(text)
    for match in NOT_SHOWN.finditer(folded):
        for position in range(positions[match.start()], positions[match.end() - 1] + 1):
            shown[position] = " "
    line = " ".join("".join(shown).translate(QUOTES).split())
    if len(line) <= chars:
        return line
    head = line[: chars - 1]
    space = head.rfind(" ")
    return (head[:space] if space >= chars // 2 else head).rstrip(" ,;:.-(") + "…"


class Shown(NamedTuple):
    """The parts of a fact that may be shown (one if it is no list), and the number of withheld parts."""

    parts: list[Part]
    withheld: int


def own_title(title: str, chars: int) -> str:
    """A title for its own item's prompt, cut before anything that looks like an instruction; empty: nothing is left."""
    text = visible(title)
    instruction = find_instruction(text)
    if not instruction:
        return clean(text, chars)
    shown = clean(text[: instruction.start], chars).rstrip(" .,:;!?-–—'([")
    return shown if any(map(str.isalnum, shown)) else ""


@lru_cache(maxsize=1 << 16)
def title_elsewhere(title: str, chars: int) -> str:
    """A title for the prompts of other entities: the whole title, or `WITHHELD`."""
    return WITHHELD if suspicious(title) else clean(title, chars) or WITHHELD


def own_fact(value: object, chars: int) -> Shown:
    """A fact, or a list of facts, for its own entity's prompt: clean, without parts that look like instructions.

    A list is cut, with an ellipsis, where its parts together have more than `chars` characters.
    """
    parts: list[Part] = []
    withheld, left_chars = 0, chars
    for part in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(part, int | float):
            if find_instruction(text := str(part)):
                withheld += 1
                continue
            part = clean(text, chars)
        left_chars -= len(str(part))
        if left_chars < 0:
            parts.append("…")
            break
        if part != "":
            parts.append(part)
    # Parts may make up an instruction together.
    if len(parts) > 1 and find_instruction(" ".join(map(str, parts))):
        return Shown([], withheld + len(parts))
    return Shown(parts, withheld)


def plain(value: Part | Sequence[Part], quote: str = "") -> str:
    """Clean text and numbers as one text: texts between `quote`, whole numbers without a point, lists with commas."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, Sequence):
        return ", ".join(plain(part, quote) for part in value)
    return format(value, "g") if isinstance(value, float) else str(value)


def quoted(value: Part | Sequence[Part]) -> str:
    """`plain` for prompts: texts stand between double quotes, which clean text cannot close."""
    return plain(value, '"')

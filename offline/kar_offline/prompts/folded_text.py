"""Owns the forms of text that searches read: visible characters only; folded, without case, accents or look-alikes."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

__all__ = ["LOOK_ALIKES", "fold_with_positions", "visible"]

READ_CHARS: Final = 20_000
"""Number of characters of a text that are read: prompts show fewer, and the number bounds the time of a search."""

# Invisible characters that Unicode calls letters, marks or symbols: fillers, variation selectors, empty Braille.
INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Scripts of the Middle East and of India, and emoji, need single joiners.
JOINED: Final = "\u0600-\u08ff\u0900-\u0dff\u2600-\u27bf\U0001f000-\U0001faff"
JOINERS: Final = "\u200c\u200d"
LOOSE_JOINER: Final = re.compile(f"(?<![{JOINED}])[{JOINERS}]|[{JOINERS}](?![{JOINED}])")


def visible(text: str) -> str:
    """Text in Unicode's NFC form: control characters are spaces (line feeds stay), invisible characters are gone."""
    text = text[:READ_CHARS]
    if text.isascii() and text.isprintable():
        return text
    kept = (c if c.isprintable() or c in JOINERS else _replacement(c) for c in INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", LOOSE_JOINER.sub("", "".join(kept)))


def _replacement(character: str) -> str:
    if character == "\n":
        return character
    return " " if character.isspace() or unicodedata.category(character) == "Cc" else ""


# Pairs: a letter of another script, or a digit, then the Latin letter that it looks like or stands for.
_PAIRS: Final = (
    "аa вb сc ԁd еe ғf һh нh іi јj кk ӏl мm ոn пn оo рp ԛq гr ѕs тt ѵv ԝw хx уy "
    "αa βb εe ηn ιi κk μu νv οo ρp τt υu χx ωw օo սu հh ցg "
    "ᴀa ʙb ᴄc ᴅd ᴇe ꜰf ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz ɑa ɡg ıi łl øo đd "
    "0o 1i 3e 4a 5s 7t @a $s"
)
LOOK_ALIKES: Final = str.maketrans(
    {pair[0]: pair[1] for pair in _PAIRS.split()}
    # Letters in black circles and squares, and the letters of flags.
    | {chr(first + n): chr(97 + n) for first in (0x1F150, 0x1F170, 0x1F1E6) for n in range(26)}
)


def fold_with_positions(text: str) -> tuple[str, Sequence[int]]:
    """Text without case, accents and compatibility forms, and for each of its characters the position in `text`."""
    if text.isascii():
        return text.lower(), range(len(text) + 1)
    folded, positions = [], []
    for position, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.category(part)[0] not in "MC" or part == "\n":
                folded.append(part)
                positions.append(position)
    return "".join(folded), [*positions, len(text)]

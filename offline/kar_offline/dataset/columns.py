"""Owns the parsers of a log's cells: which values a column may hold, and how a cell becomes a value.

Every parser takes one cell, as text or as a value of the Parquet type. For a wrong cell it raises ValueError; the text
continues a sentence that begins with the value, such as "is not a number: correct it or remove the row".
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from typing import Any, Final

__all__ = [
    "HIGHEST_RATING",
    "LATEST_S",
    "TITLE",
    "UNSTORABLE",
    "parse_categories",
    "parse_category",
    "parse_id",
    "parse_number",
    "parse_optional_number",
    "parse_rating",
    "parse_seconds",
    "parse_title",
]

TITLE: Final = "title"
"""The fact that names an entity in prompts."""
HIGHEST_RATING: Final = 10.0
"""Ratings lie between 0 and this; models read them rounded to half points."""
LATEST_S: Final = 10**11
"""Seconds since 1970. A greater number is probably in milliseconds."""
LARGEST_WIDTH: Final = 64
"""Maximal number of categories in one cell: every row of the store has room for the widest cell of a feature."""
UNSTORABLE: Final = re.compile(r"[\0\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters that an id must not contain: NUL and everything that ends a line."""


def parse_id(cell: Any) -> str:
    """The id of a user or an item."""
    if cell is None or not str(cell).strip():
        raise ValueError("is empty: give every row an id")
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        raise ValueError("is not an id: make the column text or whole numbers")
    if UNSTORABLE.search(text := str(cell)):
        raise ValueError("holds a NUL or a line break: remove it")
    return text


def parse_number(cell: Any) -> float:
    """A finite number."""
    try:
        number = float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is not a number: correct it or remove the row")
    return number


def parse_optional_number(cell: Any) -> float | None:
    """A finite number; None for an empty cell."""
    return None if parse_category(cell) is None else parse_number(cell)


def parse_rating(values: Mapping[str, float], cell: Any) -> float:
    """A rating: the cell's number or, if `values` is not empty, the number of the cell's word in `values`."""
    if values and str(cell) not in values:
        raise ValueError(f"is none of {', '.join(values)}: add it to [events.values] of the mapping")
    number = values[str(cell)] if values else parse_number(cell)
    if not 0 <= number <= HIGHEST_RATING:
        raise ValueError(f"is not between 0 and {HIGHEST_RATING:g}: scale the ratings")
    return number


def parse_seconds(cell: Any) -> int:
    """Whole seconds since 1970 from seconds, an ISO date and time, or a timestamp; UTC where no zone is named."""
    try:
        if isinstance(cell, str):
            cell = int(cell) if cell.strip().lstrip("-").isdecimal() else datetime.fromisoformat(cell)
        elif isinstance(cell, date) and not isinstance(cell, datetime):
            cell = datetime.combine(cell, time())
        if isinstance(cell, datetime):
            cell = (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
        seconds = math.floor(cell)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("is not a timestamp: give seconds since 1970 or an ISO date and time") from error
    if abs(seconds) > LATEST_S:
        raise ValueError("is too great for seconds since 1970: divide milliseconds by 1000")
    return seconds


def parse_category(cell: Any) -> str | None:
    """One category without surrounding spaces; None for an empty cell."""
    is_whole_number = isinstance(cell, float) and cell.is_integer()
    return None if cell is None else (str(int(cell)) if is_whole_number else str(cell).strip()) or None


def parse_categories(separator: str, cell: Any) -> list[str]:
    """Several categories, from a list or from text with a separator."""
    parts = cell if isinstance(cell, list) else (parse_category(cell) or "").split(separator)
    categories = [category for part in parts if (category := parse_category(part)) is not None]
    if len(categories) > LARGEST_WIDTH:
        raise ValueError(f"has {len(categories)} values: keep at most {LARGEST_WIDTH}")
    return categories


def parse_title(cell: Any) -> str:
    """A title, which must not be empty."""
    if (title := parse_category(cell)) is None:
        raise ValueError("is empty: give it a title")
    return title

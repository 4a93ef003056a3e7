"""Owns files of one JSON object a line that people write: each line checked, a wrong one named by its number."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kar_sidecar.errors import InputError

__all__ = ["each_line"]

L = TypeVar("L", bound=BaseModel)
T = TypeVar("T")


def each_line(path: Path, line_type: type[L], take: Callable[[L], T], untouched: str) -> Iterator[T]:
    """What `take` makes of each line of a file; empty lines are passed over.

    Raises:
        InputError: a line is wrong, or `take` says so; the text has its number, and `untouched` at its end.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                taken = take(line_type.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                complaint = f"{where}: {first['msg']}" if where else first["msg"]
                raise InputError(f"{path} line {number}: {complaint}; {untouched}") from error
            except (InputError, UnicodeEncodeError) as error:
                raise InputError(f"{path} line {number}: {error}; {untouched}") from error
            yield taken

"""Owns the reading of files that people write with one JSON object a line: each line is checked on its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kar_sidecar.errors import InputError

__all__ = ["each_line"]

Line = TypeVar("Line", bound=BaseModel)
Value = TypeVar("Value")


def each_line(path: Path, line_type: type[Line], convert: Callable[[Line], Value], consequence: str) -> Iterator[Value]:
    """Read a file, check each line against `line_type`, and yield what `convert` makes of it; skip empty lines.

    Raises:
        InputError: a line does not fit `line_type`, or `convert` refuses it. The text names the line's number and ends
            with `consequence`, such as "nothing was changed".
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = convert(line_type.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(map(str, first["loc"]))
                complaint = f"{field}: {first['msg']}" if field else first["msg"]
                raise InputError(f"{path} line {number}: {complaint}; {consequence}") from error
            except (InputError, UnicodeEncodeError) as error:
                raise InputError(f"{path} line {number}: {error}; {consequence}") from error
            yield value

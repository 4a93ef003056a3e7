"""Owns reading JSON-lines files that people write: each line is checked, and errors name the line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kar_sidecar.errors import InputError

__all__ = ["each_line"]

Line = TypeVar("Line", bound=BaseModel)
Value = TypeVar("Value")


def each_line(path: Path, line_type: type[Line], convert: Callable[[Line], Value], consequence: str) -> Iterator[Value]:
    """Check each line of a file against `line_type` and yield `convert(line)`; empty lines are skipped.

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
                first_error = error.errors(include_url=False)[0]
                field = ".".join(map(str, first_error["loc"]))
                complaint = f"{field}: {first_error['msg']}" if field else first_error["msg"]
                raise InputError(f"{path} line {number}: {complaint}; {consequence}") from error
            except (InputError, UnicodeEncodeError) as error:
                raise InputError(f"{path} line {number}: {error}; {consequence}") from error
            yield value

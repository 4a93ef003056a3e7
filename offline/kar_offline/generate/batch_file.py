"""Owns what batch files say: lines of questions and of results, and the states of a batch, as OpenAI's API has them."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from kar_offline.generate.openai_chat import read_completion
from kar_offline.generate.provider import Failure, Reply
from kar_offline.openai_http.endpoint import Verdict, parse_json, said, verdict_of

__all__ = ["LABEL", "PATH", "Batch", "File", "Limits", "Page", "Result", "question_line", "reader", "result_of"]

PATH: Final = "/v1/chat/completions"
LABEL: Final = "kar"
"""The member of a batch's metadata that holds our handle."""
Result = tuple[str, Reply | Failure | str]
"""A question's key, and what a line of results says of it; a text says why it may be asked again."""
Body = TypeVar("Body", bound=BaseModel)


class Limits(NamedTuple):
    """The most that one file holds."""

    lines: int = 50_000
    bytes: int = 100_000_000
    input_tokens: float = math.inf
    """Estimated, four characters each. Endpoints bound what all batches under way hold together."""


class File(BaseModel):
    """An uploaded file; of a batch that was just made, its id is all that counts as well."""

    id: str = Field(min_length=1)


class Batch(BaseModel):
    """A batch at a look; times in seconds of Unix time, files of results once there are any."""

    id: str = Field(min_length=1)
    status: Literal[
        "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: Any = None
    completed_at: Any = None
    request_counts: Any = None
    errors: Any = None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in ("completed", "failed", "expired", "cancelled")

    @property
    def answered(self) -> int:
        """Questions that are done, one way or the other; 0 where it is not said."""
        counts = self.request_counts if isinstance(self.request_counts, dict) else {}
        return sum(n for name in ("completed", "failed") if type(n := counts.get(name)) is int)

    @property
    def complaint(self) -> str:
        """Why it was not accepted."""
        errors = self.errors.get("data") if isinstance(self.errors, dict) else None
        return said({"error": errors[0] if isinstance(errors, list) and errors else self.errors})

    @property
    def took_ms(self) -> float:
        """From the order to the last answer; 0 where it is not said."""
        times = (self.created_at, self.completed_at)
        return max(times[1] - times[0], 0) * 1e3 if all(type(at) is int for at in times) else 0.0


class Listed(BaseModel):
    """A batch in a list."""

    id: str = Field(min_length=1)
    metadata: Any = None

    @property
    def handle(self) -> str:
        """Ours; empty: it is not one of ours."""
        label = self.metadata.get(LABEL) if isinstance(self.metadata, dict) else None
        return label if isinstance(label, str) else ""


class Page(BaseModel):
    """A part of the list of batches, newest first."""

    data: list[Listed]
    has_more: bool = False


def reader(shape: type[Body]) -> Callable[[bytes], Body]:
    """What reads a body of this shape; it raises ValueError."""

    def read(content: bytes) -> Body:
        try:
            return shape.model_validate(parse_json(content))
        except ValidationError as error:
            raise ValueError(f"the answer is not what it should be: {said(content)[:80]}") from error

    return read


def question_line(key: str, body: dict[str, Any]) -> bytes:
    """The line that asks for a completion."""
    return json.dumps({"custom_id": key, "method": "POST", "url": PATH, "body": body}).encode() + b"\n"


def result_of(line: bytes, prompts: Mapping[str, str]) -> Result | None:
    """What a line of results says of which question, by prompts by key; None: the line is broken."""
    try:
        entry = parse_json(line)
        key, response = str(entry["custom_id"]), entry.get("response")
        if response is None:
            return key, said(entry)
        status, body = int(response["status_code"]), response["body"]
        verdict = verdict_of(status)
        if verdict is Verdict.GOOD:
            return key, read_completion(body, prompts.get(key, ""))
        reason = f"status {status}: {said(body)}"
        return key, Failure(f"refused with {reason}") if verdict is Verdict.OWN_FAULT else reason
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None

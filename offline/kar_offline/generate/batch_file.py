"""Owns the formats of OpenAI's batch API: lines of questions and of results, and the states of a batch."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from kar_offline.generate.openai_chat import read_completion
from kar_offline.generate.provider import Failure, Reply
from kar_offline.openai_http.endpoint import Verdict, error_message, parse_json, verdict_of

__all__ = ["LABEL", "PATH", "Batch", "File", "Limits", "Page", "Result", "question_line", "reader", "result_of"]

PATH: Final = "/v1/chat/completions"
LABEL: Final = "kar"
"""The member of a batch's metadata that holds our handle."""
Result = tuple[str, Reply | Failure | str]
"""A question's key and its outcome; a str is the reason why there is no answer, and the question may be asked again."""
Body = TypeVar("Body", bound=BaseModel)


class Limits(NamedTuple):
    """Largest size of one file."""

    lines: int = 50_000
    bytes: int = 100_000_000
    input_tokens: float = math.inf
    """Estimated, at four characters a token. Endpoints limit the tokens of all batches under way together."""


class File(BaseModel):
    """An uploaded file, or a batch that was just created: only the id is read."""

    id: str = Field(min_length=1)


class Batch(BaseModel):
    """The state of a batch; times in seconds of Unix time, files of results once they exist."""

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
        """Whether the state is final."""
        return self.status in ("completed", "failed", "expired", "cancelled")

    @property
    def answered(self) -> int:
        """Number of questions that were answered or failed; 0 where the endpoint does not say."""
        counts = self.request_counts if isinstance(self.request_counts, dict) else {}
        return sum(n for name in ("completed", "failed") if type(n := counts.get(name)) is int)

    @property
    def complaint(self) -> str:
        """Why the batch was not accepted."""
        errors = self.errors.get("data") if isinstance(self.errors, dict) else None
        return error_message({"error": errors[0] if isinstance(errors, list) and errors else self.errors})

    @property
    def took_ms(self) -> float:
        """Time from the batch's creation to its end, in milliseconds; 0 where the endpoint does not say."""
        times = (self.created_at, self.completed_at)
        return max(times[1] - times[0], 0) * 1e3 if all(type(time) is int for time in times) else 0.0


class Listed(BaseModel):
    """A batch in a list."""

    id: str = Field(min_length=1)
    metadata: Any = None

    @property
    def handle(self) -> str:
        """Our handle; empty: the batch is not ours."""
        label = self.metadata.get(LABEL) if isinstance(self.metadata, dict) else None
        return label if isinstance(label, str) else ""


class Page(BaseModel):
    """A part of the list of batches, newest first."""

    data: list[Listed]
    has_more: bool = False


def reader(shape: type[Body]) -> Callable[[bytes], Body]:
    """A function that reads a body of this shape, or raises ValueError."""

    def read(content: bytes) -> Body:
        try:
            return shape.model_validate(parse_json(content))
        except ValidationError as error:
            raise ValueError(f"the answer has an unexpected form: {error_message(content)[:80]}") from error

    return read


def question_line(key: str, body: dict[str, Any]) -> bytes:
    """The line of a batch file that asks one question."""
    return json.dumps({"custom_id": key, "method": "POST", "url": PATH, "body": body}).encode() + b"\n"


def result_of(line: bytes, prompts: Mapping[str, str]) -> Result | None:
    """The result in a line; None: the line is broken. `prompts` are by key."""
    try:
        entry = parse_json(line)
        key, response = str(entry["custom_id"]), entry.get("response")
        if response is None:
            return key, error_message(entry)
        status, body = int(response["status_code"]), response["body"]
        verdict = verdict_of(status)
        if verdict is Verdict.GOOD:
            return key, read_completion(body, prompts.get(key, ""))
        reason = f"status {status}: {error_message(body)}"
        return key, Failure(f"refused with {reason}") if verdict is Verdict.OWN_FAULT else reason
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None

"""Owns every exception that a user of this product can meet, and the gRPC status of each.

KarError                     INTERNAL             a fault of ours: report it
├── InputError               INVALID_ARGUMENT     the request or a command's input is wrong: change it
├── NotFoundError            NOT_FOUND            the named thing does not exist: name another
├── PreconditionError        FAILED_PRECONDITION  the system is not in the state needed: prepare it first
│   └── IntegrityError       DATA_LOSS            a file or record is corrupt or mismatched: restore it
├── BudgetError              RESOURCE_EXHAUSTED   the money set aside would not last: allow more
├── UnavailableError         UNAVAILABLE          a backend does not answer: retry later
│   ├── DeadlineError        DEADLINE_EXCEEDED    no time left: allow more
│   └── IncompleteError      UNAVAILABLE          a batch was answered in part: use that part, or retry
└── UnsupportedError         UNIMPLEMENTED        not built, or an optional package is missing: install it
"""

from collections.abc import Sequence
from typing import ClassVar

import grpc

__all__ = [
    "BudgetError",
    "DeadlineError",
    "IncompleteError",
    "InputError",
    "IntegrityError",
    "KarError",
    "NotFoundError",
    "PreconditionError",
    "UnavailableError",
    "UnsupportedError",
]


class KarError(Exception):
    """Base of all errors; its text is one sentence that says what to do."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    exit_code: ClassVar[int] = 1


class InputError(KarError):
    """The caller sent or typed something wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    exit_code = 2


class NotFoundError(KarError):
    """The thing named does not exist."""

    status = grpc.StatusCode.NOT_FOUND
    exit_code = 2


class PreconditionError(KarError):
    """The system is not in the state that the call needs."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class IntegrityError(PreconditionError):
    """A file or record is corrupt, or belongs to something else; the text names it."""

    status = grpc.StatusCode.DATA_LOSS


class BudgetError(KarError):
    """The next request could cost more than what is left of a budget."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(KarError):
    """A backend does not answer."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineError(UnavailableError):
    """A backend did not answer within the time left."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class IncompleteError(UnavailableError):
    """A backend read some records of a batch and not others, which are all None in `records`."""

    def __init__(self, text: str, records: Sequence[tuple[bytes | None, ...]], unread: Sequence[int]) -> None:
        """Carry what was read: records in the order asked for, and the positions of those that were not read."""
        super().__init__(text)
        self.records = records
        self.unread = unread


class UnsupportedError(KarError):
    """Not built yet, or an optional package is missing."""

    status = grpc.StatusCode.UNIMPLEMENTED

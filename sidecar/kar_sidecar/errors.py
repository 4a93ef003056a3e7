"""Owns every exception that a user of this product can meet, and the gRPC status of each.

class                        gRPC status          what the reader can do
KarError                     INTERNAL             report it: this is a bug
├── InputError               INVALID_ARGUMENT     correct the request, or the command's input
├── NotFoundError            NOT_FOUND            name another thing: this one does not exist
├── PreconditionError        FAILED_PRECONDITION  prepare the system first: run what the text names
│   └── IntegrityError       DATA_LOSS            restore the file or record that the text names: it is damaged
├── BudgetError              RESOURCE_EXHAUSTED   allow more money, or ask for less
├── UnavailableError         UNAVAILABLE          retry later, and check the backend that the text names
│   ├── DeadlineError        DEADLINE_EXCEEDED    allow more time
│   └── IncompleteError      UNAVAILABLE          use the part of the batch that was read, or retry
└── UnsupportedError         UNIMPLEMENTED        install the package that the text names, or wait for the feature

The text of every error is one sentence that ends with the remedy. The server answers with an error's `status`, and the
client turns a status back into an error by `ERROR_OF_STATUS`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import grpc

__all__ = [
    "ERROR_OF_STATUS",
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
    """Base of all errors. Commands end with its `exit_code`."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    exit_code: ClassVar[int] = 1


class InputError(KarError):
    """The request or the command's input is wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    exit_code = 2


class NotFoundError(KarError):
    """The named thing does not exist."""

    status = grpc.StatusCode.NOT_FOUND
    exit_code = 2


class PreconditionError(KarError):
    """The system is not in the state that the call needs, such as: nothing was published yet."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class IntegrityError(PreconditionError):
    """A file or record is damaged, or belongs to another release, space or schema; the text names it."""

    status = grpc.StatusCode.DATA_LOSS


class BudgetError(KarError):
    """The next request could cost more than the rest of the budget."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(KarError):
    """A backend does not answer."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineError(UnavailableError):
    """A backend did not answer in time."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class IncompleteError(UnavailableError):
    """A backend could not read some records of a batch."""

    def __init__(self, text: str, records: Sequence[tuple[bytes | None, ...]], unread: Sequence[int]) -> None:
        """Carry the records in the order of the keys (unread parts are None), and the positions of unread records."""
        super().__init__(text)
        self.records = records
        self.unread = unread


class UnsupportedError(KarError):
    """The feature is not built yet, or an optional package is missing."""

    status = grpc.StatusCode.UNIMPLEMENTED


ERROR_OF_STATUS: Final[Mapping[grpc.StatusCode, type[KarError]]] = {
    kind.status: kind
    for kind in (
        KarError,
        InputError,
        NotFoundError,
        PreconditionError,
        IntegrityError,
        BudgetError,
        UnavailableError,  # also stands for IncompleteError: a status cannot carry records
        DeadlineError,
        UnsupportedError,
    )
}
"""The error that stands for a gRPC status; KarError for any other."""

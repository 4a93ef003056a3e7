"""Owns the translation of Aerospike's error codes into our errors: one table, for calls and for records of a batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from aerospike import exception

from kar_sidecar.errors import DeadlineError, InputError, KarError, PreconditionError, UnavailableError

__all__ = ["FILTERED_OUT", "NOT_FOUND", "OK", "ClusterErrors"]

OK: Final = 0
NOT_FOUND: Final = exception.RecordNotFound.code
FILTERED_OUT: Final = exception.FilteredOut.code

_LATE: Final = (DeadlineError, "did not answer in time: allow more or add capacity")
_LOGIN: Final = (PreconditionError, "refuses the user: correct user, password, auth_mode or the user's roles")
_REQUEST: Final = (
    PreconditionError,
    "does not accept the request ({}): check that server and settings fit this version",
)
_NO_USERS: Final = (PreconditionError, "has no users: leave user and password empty")
_ERRORS: Final[dict[int | None, tuple[type[KarError], str]]] = {
    exception.TimeoutError.code: _LATE,
    exception.NoResponse.code: _LATE,  # type: ignore[attr-defined]
    exception.DeviceOverload.code: (
        UnavailableError,
        "is overloaded, its devices are too slow: write more slowly or add devices",
    ),
    exception.ServerFull.code: (PreconditionError, "is full: give its namespace more memory or disk"),
    exception.NamespaceNotFound.code: (PreconditionError, "has no such namespace: configure it or name another"),
    exception.RecordTooBig.code: (InputError, "accepts no record of this size: make it smaller"),
    exception.BinNameError.code: (InputError, "accepts no part name of this length: make it shorter"),
    exception.ParamError.code: _REQUEST,
    exception.InvalidRequest.code: _REQUEST,
    exception.TLSError.code: (  # type: ignore[attr-defined]
        PreconditionError,
        "cannot be reached by TLS ({}): correct the tls settings",
    ),
    exception.SecurityNotSupported.code: _NO_USERS,
    exception.SecurityNotEnabled.code: _NO_USERS,
    exception.InvalidUser.code: _LOGIN,
    exception.InvalidPassword.code: _LOGIN,
    exception.ExpiredPassword.code: _LOGIN,
    exception.InvalidCredential.code: _LOGIN,
    exception.NotAuthenticated.code: _LOGIN,
    exception.RoleViolation.code: _LOGIN,
}
"""Error class and sentence for each code of a call or of a record in a batch; `{}` stands for the client's own text.

Any other code is UNAVAILABLE. Only UNAVAILABLE errors are temporary, so only after these is a write repeated.
"""


@dataclass(frozen=True, slots=True)
class ClusterErrors:
    """Makes the errors of one cluster; their texts name the cluster."""

    cluster: str

    def of(self, code: int | None, text: str) -> KarError:
        """The error for a code; `text` is the client's own."""
        kind, sentence = _ERRORS.get(code, (UnavailableError, "failed ({}): check that it runs, then retry"))
        return kind(f"{self.cluster} {sentence.format(text)}")

    def of_records(self, codes: Iterable[int]) -> KarError:
        """One error for a batch's failed records: permanent errors take precedence, then codes in the table."""
        code = min(codes, key=lambda code: (_is_temporary(code), code not in _ERRORS))
        return self.of(code, f"code {code} for some records")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Inside the block, the client's exceptions become ours."""
        try:
            yield
        except exception.AerospikeError as error:
            raise self.of(error.code, error.msg or str(error)) from error


def _is_temporary(code: int) -> bool:
    return code not in _ERRORS or issubclass(_ERRORS[code][0], UnavailableError)

"""Each status on the wire stands for one error, so the client raises the error that the server raised."""

import grpc
import pytest

from kar_sidecar import errors
from kar_sidecar.errors import ERROR_OF_STATUS, IncompleteError, KarError, UnavailableError

pytestmark = pytest.mark.unit

CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_status_gives_back_the_error_that_it_was_made_from(kind):
    # The records of a partial read are not sent, so the client sees an unavailable store.
    assert ERROR_OF_STATUS[kind.status] is (UnavailableError if kind is IncompleteError else kind)


def test_statuses_of_our_errors_are_told_apart_from_grpcs_own():
    assert grpc.StatusCode.CANCELLED not in ERROR_OF_STATUS
    assert len(ERROR_OF_STATUS) == len(CLASSES) - 1


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_in_the_docstring_has_every_class_with_its_status(kind):
    [line] = [line for line in errors.__doc__.splitlines() if f"{kind.__name__} " in line]
    depth = len(kind.__mro__) - len(KarError.__mro__)
    assert kind.status.name in line.split()
    assert line.index(kind.__name__) == 4 * depth

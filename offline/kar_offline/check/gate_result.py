"""Owns the result of one gate on one text."""

from typing import Final, NamedTuple

from kar.records.v1 import records_pb2

__all__ = ["PASSED", "Finding", "failed", "unknown"]


class Finding(NamedTuple):
    """An outcome, and the reason for people to read; the reason is empty where the text passed."""

    outcome: records_pb2.Outcome
    reason: str = ""


PASSED: Final = Finding(records_pb2.OUTCOME_PASSED)


def failed(reason: str) -> Finding:
    """The gate refuses the text."""
    return Finding(records_pb2.OUTCOME_FAILED, reason)


def unknown(reason: str) -> Finding:
    """The gate cannot tell."""
    return Finding(records_pb2.OUTCOME_UNKNOWN, reason)

"""Owns what one gate says of one text."""

from typing import Final, NamedTuple

from kar.records.v1 import records_pb2

__all__ = ["PASSED", "Finding", "failed", "unknown"]


class Finding(NamedTuple):
    """An outcome and why, for people to read; empty where it passed."""

    outcome: records_pb2.Outcome
    reason: str = ""


PASSED: Final = Finding(records_pb2.OUTCOME_PASSED)


def failed(reason: str) -> Finding:
    """The text is wrong."""
    return Finding(records_pb2.OUTCOME_FAILED, reason)


def unknown(reason: str) -> Finding:
    """The gate could not tell."""
    return Finding(records_pb2.OUTCOME_UNKNOWN, reason)

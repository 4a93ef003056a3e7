"""Owns the check of a ranking request: it turns a `RankRequest` into a `Query`, or says what to correct."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar.ranking.v1 import ranking_pb2
from kar_sidecar.errors import InputError
from kar_sidecar.features import NUMERIC, FeatureLayout, History, hash_value
from kar_sidecar.releases.serving_view import ServedRelease

__all__ = ["Column", "Query", "read_query"]


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one feature that the request sent for n rows."""

    name: str
    values: NDArray
    """float32 [n], or category hashes uint64 [n, width]."""
    present: NDArray[np.bool_] | None
    """Which rows take the value instead of the stored one [n]; None: all."""


@dataclass(frozen=True, slots=True)
class Query:
    """A well-formed ranking request for C candidates."""

    user_id: str
    item_ids: tuple[str, ...]
    """The candidates [C]."""
    caller_scores: NDArray[np.float32] | None
    """The caller's own scores [C]; None where it sent none."""
    user_columns: tuple[Column, ...]
    """User features that the request sent, one row each."""
    item_columns: tuple[Column, ...]
    """Item features that the request sent, C rows each."""
    history: History | None
    """The history that the request sent; None: the stored one is used."""
    history_as_of_ms: int | None
    """Time at which the history was true, milliseconds since 1970; None: not sent, and the history is always used."""


def read_query(request: ranking_pb2.RankRequest, served: ServedRelease, max_candidates: int) -> Query:
    """Check a request against a release's schema and pack its inline values.

    Raises:
        InputError: the request is malformed; the text says what to send instead.
    """
    user, candidates = request.user, request.candidates
    items = tuple(candidates.ids)
    if not user.id:
        raise InputError("user.id is empty: send the id of the user to rank for")
    if not items:
        raise InputError("candidates.ids is empty: send at least one candidate")
    if len(items) > max_candidates:
        raise InputError(f"{len(items)} candidates are more than {max_candidates}: send fewer, or several requests")
    if "" in items:
        raise InputError(f"candidates.ids[{items.index('')}] is empty: send an id for every candidate")
    caller_scores = np.fromiter(candidates.caller_scores, np.float32) if candidates.caller_scores else None
    if caller_scores is not None and len(caller_scores) != len(items):
        raise InputError(
            f"{len(caller_scores)} caller_scores for {len(items)} candidates: send one per candidate, or none"
        )
    history = as_of_ms = None
    if user.HasField("history"):
        if "" in user.history.item_ids:
            raise InputError("user.history.item_ids holds an empty id: send an id for every event")
        history = History(tuple(user.history.item_ids), np.array(user.history.ratings, np.float32))
        if user.history.HasField("as_of"):
            try:
                as_of_ms = user.history.as_of.ToMilliseconds()
            except ValueError as error:
                raise InputError("user.history.as_of is not a time: send seconds of the years 1 to 9999") from error
    return Query(
        user_id=user.id,
        item_ids=items,
        caller_scores=caller_scores,
        user_columns=_columns(user.features, served.release.user_layout, 1, "user"),
        item_columns=_columns(candidates.features, served.release.item_layout, len(items), "candidate"),
        history=history,
        history_as_of_ms=as_of_ms,
    )


def _columns(
    columns: Iterable[ranking_pb2.FeatureColumn], layout: FeatureLayout, rows: int, entity: str
) -> tuple[Column, ...]:
    checked = tuple(_column(column, layout, rows, entity) for column in columns)
    names = [column.name for column in checked]
    if len(set(names)) < len(names):
        raise InputError(f"a {entity} feature is sent twice: send one column per feature")
    return checked


def _column(column: ranking_pb2.FeatureColumn, layout: FeatureLayout, rows: int, entity: str) -> Column:
    feature = layout.by_name.get(column.name)
    if feature is None:
        feature_names = ", ".join(layout.by_name) or "none"
        raise InputError(f"{entity} feature {column.name!r} is not in the schema (known: {feature_names}): remove it")
    numeric = feature.type == NUMERIC
    expected, other = ("numbers", "strings") if numeric else ("strings", "numbers")
    values = getattr(column, expected)
    if getattr(column, other) or len(values) != rows:
        raise InputError(
            f"{entity} feature {column.name!r} has {len(values)} {expected} and {len(getattr(column, other))} {other}: "
            f"send exactly {rows} {expected}, one per {entity}"
        )
    if column.present and len(column.present) != rows:
        raise InputError(
            f"{entity} feature {column.name!r} has {len(column.present)} present flags: send {rows}, or none for all"
        )
    present = np.fromiter(column.present, np.bool_, rows) if column.present else None
    if numeric:
        return Column(column.name, np.fromiter(values, np.float32, rows), present)
    return Column(column.name, _hashes([list(row.values) for row in values], feature.name, feature.width), present)


def _hashes(rows: Sequence[Sequence[str]], name: str, width: int) -> NDArray[np.uint64]:
    longest = max(map(len, rows))
    if longest > width:
        raise InputError(f"feature {name!r} takes at most {width} values, not {longest}: send fewer")
    padded = [[*map(hash_value, row), *[0] * (width - len(row))] for row in rows]
    return np.array(padded, np.uint64).reshape(len(rows), width)

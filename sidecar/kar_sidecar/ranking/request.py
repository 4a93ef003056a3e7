"""Owns what a well-formed ranking request is: a `RankRequest` becomes a `Query` or an error in one sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar.ranking.v1 import ranking_pb2
from kar_sidecar.errors import InputError
from kar_sidecar.experiments.assignment import Assignment, Experiment
from kar_sidecar.features import NUMERIC, FeatureLayout, History, hash_value
from kar_sidecar.releases.serving_view import ServedRelease

__all__ = ["Column", "Query", "assign", "read_query"]


@dataclass(frozen=True, slots=True)
class Column:
    """Inline values of one feature: float32 [n] or category hashes [n, width] uint64.

    `present` [n] says which rows they replace; None: all.
    """

    name: str
    values: NDArray
    present: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Query:
    """A well-formed ranking request for C candidates; `caller_scores` [C] float32."""

    user_id: str
    item_ids: tuple[str, ...]
    caller_scores: NDArray[np.float32] | None
    user_columns: tuple[Column, ...]
    item_columns: tuple[Column, ...]
    history: History | None
    history_as_of_ms: int | None


def read_query(request: ranking_pb2.RankRequest, served: ServedRelease, max_candidates: int) -> Query:
    """Check a request against a release's schema and pack its inline values.

    Raises:
        InputError: what is wrong and what to send instead.
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
            f"{len(caller_scores)} caller_scores for {len(items)} candidates: send one a candidate, or none"
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
                raise InputError("user.history.as_of is no time: send seconds of the years 1 to 9999") from error
    return Query(
        user.id,
        items,
        caller_scores,
        _columns(user.features, served.release.user_layout, 1, "user"),
        _columns(candidates.features, served.release.item_layout, len(items), "candidate"),
        history,
        as_of_ms,
    )


def assign(overrides: Mapping[str, str], experiment: Experiment, user_id: str) -> Assignment:
    """The arm that a request forces, else the one that the user's hash gives.

    Raises:
        InputError: an unknown experiment or arm.
    """
    for key, arm in overrides.items():
        if key != experiment.key:
            raise InputError(
                f"experiment {key!r} in experiment_overrides is unknown: the only one is {experiment.key!r}"
            )
        if arm not in experiment.arms:
            raise InputError(
                f"arm {arm!r} in experiment_overrides is unknown: send one of {', '.join(experiment.arms)}"
            )
    return Assignment(overrides[experiment.key], "") if overrides else experiment.assign(user_id)


def _columns(
    columns: Iterable[ranking_pb2.FeatureColumn], layout: FeatureLayout, rows: int, entity: str
) -> tuple[Column, ...]:
    read = tuple(_column(column, layout, rows, entity) for column in columns)
    names = [column.name for column in read]
    if len(set(names)) < len(names):
        raise InputError(f"a {entity} feature is sent twice: send one column a feature")
    return read


def _column(column: ranking_pb2.FeatureColumn, layout: FeatureLayout, rows: int, entity: str) -> Column:
    feature = layout.by_name.get(column.name)
    if feature is None:
        known = ", ".join(layout.by_name) or "none"
        raise InputError(f"{entity} feature {column.name!r} is not in the schema (known: {known}): remove it")
    kinds = ("numbers", "strings")
    right, wrong = kinds if feature.type == NUMERIC else reversed(kinds)
    values = getattr(column, right)
    if getattr(column, wrong) or len(values) != rows:
        raise InputError(
            f"{entity} feature {column.name!r} has {len(values)} {right} and {len(getattr(column, wrong))} {wrong}: "
            f"send exactly {rows} {right}, one a {entity}"
        )
    if column.present and len(column.present) != rows:
        raise InputError(
            f"{entity} feature {column.name!r} has {len(column.present)} present flags: send {rows}, or none for all"
        )
    present = np.fromiter(column.present, np.bool_, rows) if column.present else None
    if feature.type == NUMERIC:
        return Column(column.name, np.fromiter(values, np.float32, rows), present)
    return Column(column.name, _hashes([list(row.values) for row in values], feature.name, feature.width), present)


def _hashes(rows: Sequence[Sequence[str]], name: str, width: int) -> NDArray[np.uint64]:
    longest = max(map(len, rows))
    if longest > width:
        raise InputError(f"feature {name!r} takes at most {width} values, not {longest}: send fewer")
    padded = [[*map(hash_value, row), *[0] * (width - len(row))] for row in rows]
    return np.array(padded, np.uint64).reshape(len(rows), width)

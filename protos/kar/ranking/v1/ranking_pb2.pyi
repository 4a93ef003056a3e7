import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kar.records.v1 import records_pb2 as _records_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rung(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUNG_UNSPECIFIED: _ClassVar[Rung]
    RUNG_KNOWLEDGE: _ClassVar[Rung]
    RUNG_BACKBONE: _ClassVar[Rung]
    RUNG_CALLER: _ClassVar[Rung]
RUNG_UNSPECIFIED: Rung
RUNG_KNOWLEDGE: Rung
RUNG_BACKBONE: Rung
RUNG_CALLER: Rung

class StringList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class FeatureColumn(_message.Message):
    __slots__ = ("name", "numbers", "strings", "present")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    numbers: _containers.RepeatedScalarFieldContainer[float]
    strings: _containers.RepeatedCompositeFieldContainer[StringList]
    present: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, name: _Optional[str] = ..., numbers: _Optional[_Iterable[float]] = ..., strings: _Optional[_Iterable[_Union[StringList, _Mapping]]] = ..., present: _Optional[_Iterable[bool]] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("item_ids", "ratings", "as_of")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    RATINGS_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    ratings: _containers.RepeatedScalarFieldContainer[float]
    as_of: _timestamp_pb2.Timestamp
    def __init__(self, item_ids: _Optional[_Iterable[str]] = ..., ratings: _Optional[_Iterable[float]] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class User(_message.Message):
    __slots__ = ("id", "features", "history")
    ID_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    id: str
    features: _containers.RepeatedCompositeFieldContainer[FeatureColumn]
    history: History
    def __init__(self, id: _Optional[str] = ..., features: _Optional[_Iterable[_Union[FeatureColumn, _Mapping]]] = ..., history: _Optional[_Union[History, _Mapping]] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("ids", "caller_scores", "features")
    IDS_FIELD_NUMBER: _ClassVar[int]
    CALLER_SCORES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    caller_scores: _containers.RepeatedScalarFieldContainer[float]
    features: _containers.RepeatedCompositeFieldContainer[FeatureColumn]
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., caller_scores: _Optional[_Iterable[float]] = ..., features: _Optional[_Iterable[_Union[FeatureColumn, _Mapping]]] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("request_id", "user", "candidates", "context", "experiment_overrides", "explain", "release_id")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ExperimentOverridesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    user: User
    candidates: Candidates
    context: _containers.ScalarMap[str, str]
    experiment_overrides: _containers.ScalarMap[str, str]
    explain: bool
    release_id: str
    def __init__(self, request_id: _Optional[str] = ..., user: _Optional[_Union[User, _Mapping]] = ..., candidates: _Optional[_Union[Candidates, _Mapping]] = ..., context: _Optional[_Mapping[str, str]] = ..., experiment_overrides: _Optional[_Mapping[str, str]] = ..., explain: _Optional[bool] = ..., release_id: _Optional[str] = ...) -> None: ...

class StageTimings(_message.Message):
    __slots__ = ("assign_ms", "fetch_ms", "assemble_ms", "score_ms", "respond_ms", "total_ms")
    ASSIGN_MS_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    ASSEMBLE_MS_FIELD_NUMBER: _ClassVar[int]
    SCORE_MS_FIELD_NUMBER: _ClassVar[int]
    RESPOND_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    assign_ms: float
    fetch_ms: float
    assemble_ms: float
    score_ms: float
    respond_ms: float
    total_ms: float
    def __init__(self, assign_ms: _Optional[float] = ..., fetch_ms: _Optional[float] = ..., assemble_ms: _Optional[float] = ..., score_ms: _Optional[float] = ..., respond_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("model", "space_id", "history_events", "missing_values", "features_written_at", "inline_history_used", "knowledge_written_at")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HISTORY_EVENTS_FIELD_NUMBER: _ClassVar[int]
    MISSING_VALUES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    INLINE_HISTORY_USED_FIELD_NUMBER: _ClassVar[int]
    KNOWLEDGE_WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    model: str
    space_id: str
    history_events: int
    missing_values: int
    features_written_at: _timestamp_pb2.Timestamp
    inline_history_used: bool
    knowledge_written_at: _timestamp_pb2.Timestamp
    def __init__(self, model: _Optional[str] = ..., space_id: _Optional[str] = ..., history_events: _Optional[int] = ..., missing_values: _Optional[int] = ..., features_written_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., inline_history_used: _Optional[bool] = ..., knowledge_written_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("request_id", "scores", "order", "experiment", "arm", "release_id", "backbone", "rung", "reason", "user_level", "item_levels", "timings", "explanation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    USER_LEVEL_FIELD_NUMBER: _ClassVar[int]
    ITEM_LEVELS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    order: _containers.RepeatedScalarFieldContainer[int]
    experiment: str
    arm: str
    release_id: str
    backbone: str
    rung: Rung
    reason: str
    user_level: _records_pb2.KnowledgeLevel
    item_levels: _containers.RepeatedScalarFieldContainer[_records_pb2.KnowledgeLevel]
    timings: StageTimings
    explanation: Explanation
    def __init__(self, request_id: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ..., order: _Optional[_Iterable[int]] = ..., experiment: _Optional[str] = ..., arm: _Optional[str] = ..., release_id: _Optional[str] = ..., backbone: _Optional[str] = ..., rung: _Optional[_Union[Rung, str]] = ..., reason: _Optional[str] = ..., user_level: _Optional[_Union[_records_pb2.KnowledgeLevel, str]] = ..., item_levels: _Optional[_Iterable[_Union[_records_pb2.KnowledgeLevel, str]]] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

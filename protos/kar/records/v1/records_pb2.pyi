import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntityKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTITY_KIND_UNSPECIFIED: _ClassVar[EntityKind]
    ENTITY_KIND_USER: _ClassVar[EntityKind]
    ENTITY_KIND_ITEM: _ClassVar[EntityKind]

class KnowledgeLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KNOWLEDGE_LEVEL_UNSPECIFIED: _ClassVar[KnowledgeLevel]
    KNOWLEDGE_LEVEL_FULL: _ClassVar[KnowledgeLevel]
    KNOWLEDGE_LEVEL_STALE: _ClassVar[KnowledgeLevel]
    KNOWLEDGE_LEVEL_NEIGHBOUR: _ClassVar[KnowledgeLevel]
    KNOWLEDGE_LEVEL_NEUTRAL: _ClassVar[KnowledgeLevel]

class FeatureType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_TYPE_UNSPECIFIED: _ClassVar[FeatureType]
    FEATURE_TYPE_NUMERIC: _ClassVar[FeatureType]
    FEATURE_TYPE_CATEGORICAL: _ClassVar[FeatureType]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_PASSED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]
    OUTCOME_UNKNOWN: _ClassVar[Outcome]
ENTITY_KIND_UNSPECIFIED: EntityKind
ENTITY_KIND_USER: EntityKind
ENTITY_KIND_ITEM: EntityKind
KNOWLEDGE_LEVEL_UNSPECIFIED: KnowledgeLevel
KNOWLEDGE_LEVEL_FULL: KnowledgeLevel
KNOWLEDGE_LEVEL_STALE: KnowledgeLevel
KNOWLEDGE_LEVEL_NEIGHBOUR: KnowledgeLevel
KNOWLEDGE_LEVEL_NEUTRAL: KnowledgeLevel
FEATURE_TYPE_UNSPECIFIED: FeatureType
FEATURE_TYPE_NUMERIC: FeatureType
FEATURE_TYPE_CATEGORICAL: FeatureType
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_PASSED: Outcome
OUTCOME_FAILED: Outcome
OUTCOME_UNKNOWN: Outcome

class Feature(_message.Message):
    __slots__ = ("name", "entity", "type", "width")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    entity: EntityKind
    type: FeatureType
    width: int
    def __init__(self, name: _Optional[str] = ..., entity: _Optional[_Union[EntityKind, str]] = ..., type: _Optional[_Union[FeatureType, str]] = ..., width: _Optional[int] = ...) -> None: ...

class FeatureSchema(_message.Message):
    __slots__ = ("features", "history_length")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_LENGTH_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[Feature]
    history_length: int
    def __init__(self, features: _Optional[_Iterable[_Union[Feature, _Mapping]]] = ..., history_length: _Optional[int] = ...) -> None: ...

class FeatureEncoding(_message.Message):
    __slots__ = ("name", "entity", "vocabulary", "mean", "scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    entity: EntityKind
    vocabulary: _containers.RepeatedScalarFieldContainer[str]
    mean: float
    scale: float
    def __init__(self, name: _Optional[str] = ..., entity: _Optional[_Union[EntityKind, str]] = ..., vocabulary: _Optional[_Iterable[str]] = ..., mean: _Optional[float] = ..., scale: _Optional[float] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("path", "sha256", "bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: str
    bytes: int
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ModelEntry(_message.Message):
    __slots__ = ("backbone", "arm", "triton_model", "triton_ensemble", "metrics", "recipe")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    TRITON_MODEL_FIELD_NUMBER: _ClassVar[int]
    TRITON_ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    arm: str
    triton_model: str
    triton_ensemble: str
    metrics: _containers.ScalarMap[str, float]
    recipe: str
    def __init__(self, backbone: _Optional[str] = ..., arm: _Optional[str] = ..., triton_model: _Optional[str] = ..., triton_ensemble: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., recipe: _Optional[str] = ...) -> None: ...

class VectorSpace(_message.Message):
    __slots__ = ("space_id", "dim", "dtype")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    dim: int
    dtype: str
    def __init__(self, space_id: _Optional[str] = ..., dim: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class AffinitySegment(_message.Message):
    __slots__ = ("name", "dim")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ...) -> None: ...

class Affinity(_message.Message):
    __slots__ = ("space", "segments", "events", "mean", "scale", "learned")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    space: VectorSpace
    segments: _containers.RepeatedCompositeFieldContainer[AffinitySegment]
    events: int
    mean: _containers.RepeatedScalarFieldContainer[float]
    scale: _containers.RepeatedScalarFieldContainer[float]
    learned: bool
    def __init__(self, space: _Optional[_Union[VectorSpace, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[AffinitySegment, _Mapping]]] = ..., events: _Optional[int] = ..., mean: _Optional[_Iterable[float]] = ..., scale: _Optional[_Iterable[float]] = ..., learned: _Optional[bool] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("release_id", "created_at", "dataset", "encoder_id", "prompt_versions", "adapted_space", "encoded_space", "feature_schema", "feature_schema_hash", "feature_encodings", "models", "triton_adaptor", "files", "affinity", "towers")
    class PromptVersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    ENCODER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ADAPTED_SPACE_FIELD_NUMBER: _ClassVar[int]
    ENCODED_SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    FEATURE_ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TRITON_ADAPTOR_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    TOWERS_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    created_at: _timestamp_pb2.Timestamp
    dataset: str
    encoder_id: str
    prompt_versions: _containers.ScalarMap[str, str]
    adapted_space: VectorSpace
    encoded_space: VectorSpace
    feature_schema: FeatureSchema
    feature_schema_hash: str
    feature_encodings: _containers.RepeatedCompositeFieldContainer[FeatureEncoding]
    models: _containers.RepeatedCompositeFieldContainer[ModelEntry]
    triton_adaptor: str
    files: _containers.RepeatedCompositeFieldContainer[FileEntry]
    affinity: Affinity
    towers: _containers.RepeatedScalarFieldContainer[EntityKind]
    def __init__(self, release_id: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dataset: _Optional[str] = ..., encoder_id: _Optional[str] = ..., prompt_versions: _Optional[_Mapping[str, str]] = ..., adapted_space: _Optional[_Union[VectorSpace, _Mapping]] = ..., encoded_space: _Optional[_Union[VectorSpace, _Mapping]] = ..., feature_schema: _Optional[_Union[FeatureSchema, _Mapping]] = ..., feature_schema_hash: _Optional[str] = ..., feature_encodings: _Optional[_Iterable[_Union[FeatureEncoding, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelEntry, _Mapping]]] = ..., triton_adaptor: _Optional[str] = ..., files: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ..., affinity: _Optional[_Union[Affinity, _Mapping]] = ..., towers: _Optional[_Iterable[_Union[EntityKind, str]]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("gate", "outcome", "reason")
    GATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    gate: str
    outcome: Outcome
    reason: str
    def __init__(self, gate: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Loan(_message.Message):
    __slots__ = ("id", "weight")
    ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    id: str
    weight: float
    def __init__(self, id: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class KnowledgeRecord(_message.Message):
    __slots__ = ("id", "entity", "text", "template", "prompt_sha256", "llm", "history_cutoff", "created_at", "expires_at", "context", "confidence", "verdicts", "retries", "loans")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SHA256_FIELD_NUMBER: _ClassVar[int]
    LLM_FIELD_NUMBER: _ClassVar[int]
    HISTORY_CUTOFF_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    LOANS_FIELD_NUMBER: _ClassVar[int]
    id: str
    entity: EntityKind
    text: str
    template: str
    prompt_sha256: str
    llm: str
    history_cutoff: int
    created_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    context: _containers.ScalarMap[str, str]
    confidence: str
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    retries: int
    loans: _containers.RepeatedCompositeFieldContainer[Loan]
    def __init__(self, id: _Optional[str] = ..., entity: _Optional[_Union[EntityKind, str]] = ..., text: _Optional[str] = ..., template: _Optional[str] = ..., prompt_sha256: _Optional[str] = ..., llm: _Optional[str] = ..., history_cutoff: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., context: _Optional[_Mapping[str, str]] = ..., confidence: _Optional[str] = ..., verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., retries: _Optional[int] = ..., loans: _Optional[_Iterable[_Union[Loan, _Mapping]]] = ...) -> None: ...

class Exposure(_message.Message):
    __slots__ = ("request_id", "user_id", "experiment", "arm", "release_id", "item_ids", "served_at")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    SERVED_AT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    user_id: str
    experiment: str
    arm: str
    release_id: str
    item_ids: _containers.RepeatedScalarFieldContainer[str]
    served_at: _timestamp_pb2.Timestamp
    def __init__(self, request_id: _Optional[str] = ..., user_id: _Optional[str] = ..., experiment: _Optional[str] = ..., arm: _Optional[str] = ..., release_id: _Optional[str] = ..., item_ids: _Optional[_Iterable[str]] = ..., served_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

from kar.records.v1 import records_pb2 as _records_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BatchGetKnowledgeRequest(_message.Message):
    __slots__ = ("entity", "ids", "include_texts", "release_id")
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEXTS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    entity: _records_pb2.EntityKind
    ids: _containers.RepeatedScalarFieldContainer[str]
    include_texts: bool
    release_id: str
    def __init__(self, entity: _Optional[_Union[_records_pb2.EntityKind, str]] = ..., ids: _Optional[_Iterable[str]] = ..., include_texts: _Optional[bool] = ..., release_id: _Optional[str] = ...) -> None: ...

class BatchGetKnowledgeResponse(_message.Message):
    __slots__ = ("release_id", "space", "vectors", "levels", "texts", "written_at_ms", "unread")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_AT_MS_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    space: _records_pb2.VectorSpace
    vectors: bytes
    levels: _containers.RepeatedScalarFieldContainer[_records_pb2.KnowledgeLevel]
    texts: _containers.RepeatedCompositeFieldContainer[_records_pb2.KnowledgeRecord]
    written_at_ms: _containers.RepeatedScalarFieldContainer[int]
    unread: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, release_id: _Optional[str] = ..., space: _Optional[_Union[_records_pb2.VectorSpace, _Mapping]] = ..., vectors: _Optional[bytes] = ..., levels: _Optional[_Iterable[_Union[_records_pb2.KnowledgeLevel, str]]] = ..., texts: _Optional[_Iterable[_Union[_records_pb2.KnowledgeRecord, _Mapping]]] = ..., written_at_ms: _Optional[_Iterable[int]] = ..., unread: _Optional[_Iterable[int]] = ...) -> None: ...

class FindSimilarRequest(_message.Message):
    __slots__ = ("entity", "id", "vector", "limit", "release_id", "space_id")
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    entity: _records_pb2.EntityKind
    id: str
    vector: bytes
    limit: int
    release_id: str
    space_id: str
    def __init__(self, entity: _Optional[_Union[_records_pb2.EntityKind, str]] = ..., id: _Optional[str] = ..., vector: _Optional[bytes] = ..., limit: _Optional[int] = ..., release_id: _Optional[str] = ..., space_id: _Optional[str] = ...) -> None: ...

class FindSimilarResponse(_message.Message):
    __slots__ = ("ids", "similarities", "release_id", "snapshot_id", "snapshot_age_ms")
    IDS_FIELD_NUMBER: _ClassVar[int]
    SIMILARITIES_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    similarities: _containers.RepeatedScalarFieldContainer[float]
    release_id: str
    snapshot_id: str
    snapshot_age_ms: int
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., similarities: _Optional[_Iterable[float]] = ..., release_id: _Optional[str] = ..., snapshot_id: _Optional[str] = ..., snapshot_age_ms: _Optional[int] = ...) -> None: ...

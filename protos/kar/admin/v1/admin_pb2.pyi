import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListReleasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseSummary(_message.Message):
    __slots__ = ("release_id", "created_at", "dataset", "active", "loaded")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    created_at: _timestamp_pb2.Timestamp
    dataset: str
    active: bool
    loaded: bool
    def __init__(self, release_id: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dataset: _Optional[str] = ..., active: _Optional[bool] = ..., loaded: _Optional[bool] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[ReleaseSummary]
    def __init__(self, releases: _Optional[_Iterable[_Union[ReleaseSummary, _Mapping]]] = ...) -> None: ...

class ActivateReleaseRequest(_message.Message):
    __slots__ = ("release_id",)
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    def __init__(self, release_id: _Optional[str] = ...) -> None: ...

class ActivateReleaseResponse(_message.Message):
    __slots__ = ("release_id", "previous_release_id")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    previous_release_id: str
    def __init__(self, release_id: _Optional[str] = ..., previous_release_id: _Optional[str] = ...) -> None: ...

"""Owns the bytes of a store record's parts: one fixed header, then numbers that `np.frombuffer` reads in place.

Every part but a text (a serialised KnowledgeRecord) starts with `HEADER` (32 bytes, little-endian). A vector part
goes on with `dim` float32 or float16 values, a features part with the schema's packed row (`FeatureLayout`), for
users followed by their history. The fingerprint is the vector space or the feature schema that the payload belongs
to; another one is refused, and so is a record whose checksum (CRC-32 of every other byte) does not fit.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from struct import Struct
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.errors import IntegrityError
from kar_sidecar.store import EntityKey

__all__ = [
    "HEADER",
    "NEVER",
    "Header",
    "VectorBatch",
    "checksum",
    "decode_parts",
    "decode_vectors",
    "encode_vectors",
    "fingerprint",
    "in_batches",
    "is_newer",
    "now_ms",
    "read_header",
]

MAGIC: Final = 0x4B41  # "KA"
LAYOUT: Final = 1
NEVER: Final = 0
"""`expires_at_ms` of a record that does not expire."""

HEADER: Final = np.dtype(
    [
        ("magic", "<u2"),
        ("layout", "u1"),
        ("level", "u1"),  # KnowledgeLevel that the publisher resolved; 0 for features
        ("crc32", "<u4"),  # of all bytes of the part but these four
        ("fingerprint", "<u8"),  # first 16 hexadecimal digits of space or schema hash
        ("written_at_ms", "<i8"),
        ("expires_at_ms", "<i8"),
    ]
)

PACKED: Final = Struct("<HBBIQqq")
"""The same as `HEADER`, for one record: a fifth of NumPy's time."""

FULL: Final = int(records_pb2.KNOWLEDGE_LEVEL_FULL)
STALE: Final = int(records_pb2.KNOWLEDGE_LEVEL_STALE)
NEUTRAL: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEUTRAL)


def now_ms() -> int:
    """Wall-clock milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@lru_cache(maxsize=64)
def fingerprint(content_hash: str) -> int:
    """The number in a header for a hexadecimal content hash of at most 16 digits."""
    return int(content_hash, 16)


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of one part before its payload is read."""

    level: int
    fingerprint: int
    written_at_ms: int
    expires_at_ms: int

    def seal(self, payload: bytes) -> bytes:
        """The part: 32 bytes of header and the payload."""
        head = PACKED.pack(MAGIC, LAYOUT, self.level, 0, self.fingerprint, self.written_at_ms, self.expires_at_ms)
        known = crc32(payload, crc32(head[8:], crc32(head[:4])))
        return head[:4] + known.to_bytes(4, "little") + head[8:] + payload


def checksum(blob: bytes | memoryview) -> int:
    """CRC-32 of a part without the four bytes that hold it."""
    return crc32(blob[8:], crc32(blob[:4]))


def read_header(blob: bytes | memoryview) -> Header:
    """Parse the header of one part.

    Raises:
        IntegrityError: not one of our records, another layout, or damaged.
    """
    if len(blob) < HEADER.itemsize:
        raise IntegrityError(f"a store record has {len(blob)} bytes, less than its header: publish it again")
    magic, layout, level, known, *rest = PACKED.unpack_from(blob)
    if (magic, layout) != (MAGIC, LAYOUT):
        raise IntegrityError("a store record is not in this version's layout: publish it again")
    if known != checksum(blob):
        raise IntegrityError("a store record is corrupt (its checksum differs): publish it again")
    return Header(level, *rest)


def is_newer(blob: bytes, stored: bytes | memoryview | None) -> bool:
    """Whether `blob` was true later than the part that is stored, as `Store.write(newer_only=True)` asks.

    A stored part that is damaged is older than anything.
    """
    if stored is None:
        return True
    try:
        known = read_header(stored)
    except IntegrityError:
        return True
    return read_header(blob).written_at_ms > known.written_at_ms


def in_batches(
    records: Iterable[tuple[EntityKey, bytes]], size: int, size_bytes: float = inf
) -> Iterator[dict[EntityKey, bytes]]:
    """Cut a stream into batches of at most `size` records; a key that comes again starts a new batch.

    A batch ends, too, with the record that makes it `size_bytes` or more.
    """
    batch: dict[EntityKey, bytes] = {}
    held_bytes = 0
    for key, blob in records:
        if len(batch) == size or held_bytes >= size_bytes or key in batch:
            yield batch
            batch, held_bytes = {}, 0
        batch[key] = blob
        held_bytes += len(blob)
    if batch:
        yield batch


def encode_vectors(
    vectors: NDArray[np.floating],
    space_id: str,
    *,
    dtype: str = "float32",
    level: int = FULL,
    written_at_ms: int,
    expires_at_ms: int = NEVER,
) -> list[bytes]:
    """Pack the rows of `vectors` [n, dim] into n vector parts of one space."""
    values = np.ascontiguousarray(vectors, dtype=np.dtype(dtype).newbyteorder("<"))
    header = Header(level, fingerprint(space_id), written_at_ms, expires_at_ms)
    return [header.seal(row.tobytes()) for row in values]


@dataclass(frozen=True, slots=True)
class VectorBatch:
    """Vectors [n, dim] float32 and their knowledge levels [n] uint8, aligned with the keys that were read."""

    vectors: NDArray[np.float32]
    levels: NDArray[np.uint8]
    written_at_ms: NDArray[np.int64]
    """[n] since the epoch; 0 where there is no vector."""


def decode_parts(
    blobs: Sequence[bytes | None], layout: np.dtype, content_hash: str, kind: str
) -> tuple[list[int], NDArray[np.void]]:
    """Decode equally long parts in one pass: which of `blobs` are there, and their records of `layout`.

    `layout` starts with a field `header`; all records must carry the fingerprint of `content_hash`, which is the hash
    of a `kind` ("space" or "schema").

    Raises:
        IntegrityError: a record of another size, layout or fingerprint, or a damaged one.
    """
    present = [i for i, blob in enumerate(blobs) if blob is not None]
    if not present:
        return present, np.zeros(0, layout)
    found = [blob for blob in blobs if blob is not None]
    if {layout.itemsize} != set(map(len, found)):
        raise IntegrityError(f"a store record has the wrong size for {kind} {content_hash}: publish it again")
    records = np.frombuffer(b"".join(found), dtype=layout)
    header = records["header"]
    mine = (header["magic"] == MAGIC) & (header["layout"] == LAYOUT)
    if not (mine & (header["fingerprint"] == fingerprint(content_hash))).all():
        raise IntegrityError(f"a store record is not of {kind} {content_hash}: publish it again")
    if (header["crc32"] != np.fromiter(map(checksum, found), np.uint32, len(found))).any():
        raise IntegrityError(
            f"a store record of {kind} {content_hash} is corrupt (its checksum differs): publish it again"
        )
    return present, records


@lru_cache(maxsize=64)
def _vector_layout(dim: int, dtype: str) -> np.dtype:
    return np.dtype([("header", HEADER), ("values", np.dtype(dtype).newbyteorder("<"), (dim,))])


def decode_vectors(
    blobs: Sequence[bytes | None], space_id: str, dim: int, neutral: NDArray[np.float32], *, dtype: str, at_ms: int
) -> VectorBatch:
    """Decode vector parts of one space in one pass; absent ones become `neutral` [dim].

    Raises:
        IntegrityError: a record of another space, size or layout.
    """
    present, records = decode_parts(blobs, _vector_layout(dim, dtype), space_id, "space")
    vectors = np.tile(neutral.astype(np.float32), (len(blobs), 1))
    levels = np.full(len(blobs), NEUTRAL, dtype=np.uint8)
    header = records["header"]
    expired = (header["expires_at_ms"] != NEVER) & (header["expires_at_ms"] <= at_ms)
    vectors[present] = records["values"]
    levels[present] = np.where(expired, STALE, header["level"])
    written_at_ms = np.zeros(len(blobs), np.int64)
    written_at_ms[present] = header["written_at_ms"]
    return VectorBatch(vectors, levels, written_at_ms)

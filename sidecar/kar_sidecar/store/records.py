"""Owns the bytes of a store record's parts: one fixed header, then numbers that `np.frombuffer` reads in place.

Every part but a text (a serialised KnowledgeRecord) starts with `HEADER` (32 bytes, little-endian). In a vector part,
`dim` float32 or float16 values follow; in a features part, the schema's packed row (`FeatureLayout`) and, for users,
their history. The header's fingerprint names the vector space or feature schema of the payload. A part with another
fingerprint, or with a wrong checksum (CRC-32 of all its other bytes), is refused.
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
        ("level", "u1"),  # KnowledgeLevel at the time of publishing; 0 for features
        ("crc32", "<u4"),  # of all bytes of the part but these four
        ("fingerprint", "<u8"),  # first 16 hexadecimal digits of space or schema hash
        ("written_at_ms", "<i8"),
        ("expires_at_ms", "<i8"),
    ]
)

PACKED: Final = Struct("<HBBIQqq")
"""The same layout as `HEADER`; for one record it takes a fifth of NumPy's time."""

FULL: Final = int(records_pb2.KNOWLEDGE_LEVEL_FULL)
STALE: Final = int(records_pb2.KNOWLEDGE_LEVEL_STALE)
NEUTRAL: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEUTRAL)


def now_ms() -> int:
    """Time of day, milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@lru_cache(maxsize=64)
def fingerprint(content_hash: str) -> int:
    """The number in a header that stands for a content hash of at most 16 hexadecimal digits."""
    return int(content_hash, 16)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one part."""

    level: int
    """Knowledge level at the time of publishing; 0 for features."""
    fingerprint: int
    """Fingerprint of the vector space or the feature schema."""
    written_at_ms: int
    """Time at which the payload was true, milliseconds since 1970."""
    expires_at_ms: int
    """When the payload becomes stale, milliseconds since 1970; `NEVER`: it does not expire."""

    def seal(self, payload: bytes) -> bytes:
        """The part: 32 bytes of header with the checksum, then the payload."""
        head = PACKED.pack(MAGIC, LAYOUT, self.level, 0, self.fingerprint, self.written_at_ms, self.expires_at_ms)
        crc = crc32(payload, crc32(head[8:], crc32(head[:4])))
        return head[:4] + crc.to_bytes(4, "little") + head[8:] + payload


def checksum(blob: bytes | memoryview) -> int:
    """CRC-32 of all bytes of a part but the four that store it."""
    return crc32(blob[8:], crc32(blob[:4]))


def read_header(blob: bytes | memoryview) -> Header:
    """Parse the header of one part.

    Raises:
        IntegrityError: the part has another layout or is damaged.
    """
    if len(blob) < HEADER.itemsize:
        raise IntegrityError(f"a store record has {len(blob)} bytes, fewer than its header: publish it again")
    magic, layout, level, crc, *rest = PACKED.unpack_from(blob)
    if (magic, layout) != (MAGIC, LAYOUT):
        raise IntegrityError("a store record is not in this version's layout: publish it again")
    if crc != checksum(blob):
        raise IntegrityError("a store record is corrupt (its checksum differs): publish it again")
    return Header(level, *rest)


def is_newer(blob: bytes, stored: bytes | memoryview | None) -> bool:
    """Whether a part has a later `written_at_ms` than the stored one: the condition of `Store.write(newer_only=True)`.

    An absent or damaged stored part counts as older.
    """
    if stored is None:
        return True
    try:
        stored_header = read_header(stored)
    except IntegrityError:
        return True
    return read_header(blob).written_at_ms > stored_header.written_at_ms


def in_batches(
    records: Iterable[tuple[EntityKey, bytes]], size: int, size_bytes: float = inf
) -> Iterator[dict[EntityKey, bytes]]:
    """Cut a stream into batches of at most `size` records, each key at most once per batch.

    A batch also ends with the record that brings it to `size_bytes`.
    """
    batch: dict[EntityKey, bytes] = {}
    batch_bytes = 0
    for key, blob in records:
        if len(batch) == size or batch_bytes >= size_bytes or key in batch:
            yield batch
            batch, batch_bytes = {}, 0
        batch[key] = blob
        batch_bytes += len(blob)
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
    """Pack the rows of `vectors` [n, dim] into n vector parts of one space.

    Args:
        vectors: [n, dim].
        space_id: The space, 12 hexadecimal digits.
        dtype: "float32" or "float16", as stored.
        level: Knowledge level of all vectors.
        written_at_ms: Time at which they were true, milliseconds since 1970.
        expires_at_ms: When they become stale, milliseconds since 1970; `NEVER`: they do not expire.
    """
    values = np.ascontiguousarray(vectors, dtype=np.dtype(dtype).newbyteorder("<"))
    header = Header(level, fingerprint(space_id), written_at_ms, expires_at_ms)
    return [header.seal(row.tobytes()) for row in values]


@dataclass(frozen=True, slots=True)
class VectorBatch:
    """Vectors of one space for n keys, in the order of the keys."""

    vectors: NDArray[np.float32]
    """[n, dim]; a key without a vector has the neutral vector."""
    levels: NDArray[np.uint8]
    """Knowledge levels [n]; NEUTRAL where there is no vector."""
    written_at_ms: NDArray[np.int64]
    """When each was written [n], milliseconds since 1970; 0 where there is no vector."""


def decode_parts(
    blobs: Sequence[bytes | None], layout: np.dtype, content_hash: str, kind: str
) -> tuple[list[int], NDArray[np.void]]:
    """Decode parts of equal length in one pass: the positions of the m parts that exist, and their records [m].

    Args:
        blobs: Parts; None where one is absent.
        layout: Structured dtype of a part; its first field is `header`.
        content_hash: Hash of the space or schema whose fingerprint every part must have.
        kind: "space" or "schema", for error messages.

    Raises:
        IntegrityError: a part has another size, layout or fingerprint, or is damaged.
    """
    present = [i for i, blob in enumerate(blobs) if blob is not None]
    if not present:
        return present, np.zeros(0, layout)
    parts = [blob for blob in blobs if blob is not None]
    if {layout.itemsize} != set(map(len, parts)):
        raise IntegrityError(f"a store record has the wrong size for {kind} {content_hash}: publish it again")
    records = np.frombuffer(b"".join(parts), dtype=layout)
    header = records["header"]
    has_layout = (header["magic"] == MAGIC) & (header["layout"] == LAYOUT)
    if not (has_layout & (header["fingerprint"] == fingerprint(content_hash))).all():
        raise IntegrityError(f"a store record belongs to another {kind} than {content_hash}: publish it again")
    if (header["crc32"] != np.fromiter(map(checksum, parts), np.uint32, len(parts))).any():
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
    """Decode vector parts of one space in one pass.

    Args:
        blobs: Parts; None where one is absent.
        space_id: The space, 12 hexadecimal digits.
        dim: Components of a vector.
        neutral: [dim], takes the place of absent vectors.
        dtype: "float32" or "float16", as stored.
        at_ms: The time of day, milliseconds since 1970: vectors that have expired by then are STALE.

    Raises:
        IntegrityError: a part has another space, size or layout, or is damaged.
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

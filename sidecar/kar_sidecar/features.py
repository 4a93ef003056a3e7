"""Owns the forms of features: raw values, packed rows in the store, model input. Training and serving share this code.

Packed rows do not depend on a release: a number is a float32 (NaN: missing), a category the 64-bit BLAKE2b hash of its
string (0: absent). A release turns hashes into indices, by one binary search per feature for all candidates.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError, IntegrityError
from kar_sidecar.store.records import HEADER, NEVER, Header, decode_parts, fingerprint, read_header

__all__ = [
    "PADDING",
    "RESERVED",
    "UNKNOWN",
    "FeatureEncoder",
    "FeatureLayout",
    "History",
    "UserFeatures",
    "hash_value",
    "rating_bucket",
    "schema_hash",
]

PADDING: Final = 0
"""Index of a missing category and of an absent history event."""
UNKNOWN: Final = 1
"""Index of an item or category that was not in the training data."""
RESERVED: Final = 2
"""Position i of a vocabulary has the index i + RESERVED."""

FeatureValue = float | str | Sequence[str] | None
CLIP_DEVIATIONS: Final = 10.0
"""Numbers are clipped to this many standard deviations from the mean, so that no single number decides a score."""
MISSING_DEVIATIONS: Final = 1e6
"""Numbers that are more than this many standard deviations from the mean count as missing, like NaN."""
NUMERIC: Final = records_pb2.FEATURE_TYPE_NUMERIC
MAX_RATING_BUCKET: Final = 20
LARGEST_NUMBER: Final = float(np.finfo(np.float32).max)
"""Largest float32. Numbers that are larger in absolute value count as missing."""


@lru_cache(maxsize=1 << 20)
def hash_value(value: str) -> int:
    """The 64-bit BLAKE2b hash of a category, never 0."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") or 1


def schema_hash(schema: records_pb2.FeatureSchema) -> str:
    """Content hash of a feature schema, 16 hexadecimal digits."""
    return hashlib.sha256(schema.SerializeToString(deterministic=True)).hexdigest()[:16]


def rating_bucket(ratings: NDArray[np.floating]) -> NDArray[np.int64]:
    """Half-star buckets int64 of ratings in stars, of the same shape: 1 to 20, since 0 is the index of padding."""
    return np.rint(np.clip(np.nan_to_num(ratings), 0.5, MAX_RATING_BUCKET / 2) * 2).astype(np.int64)


@dataclass(frozen=True, slots=True)
class History:
    """Rated items of one user, oldest first; `ratings` [n] float32 is aligned with `item_ids`."""

    item_ids: tuple[str, ...]
    ratings: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check that items and ratings are aligned and that the ids can be stored.

        Raises:
            InputError: they are not.
        """
        if len(self.item_ids) != len(self.ratings):
            raise InputError(
                f"a history has {len(self.item_ids)} items but {len(self.ratings)} ratings: send one rating per item"
            )
        if any("\0" in item for item in self.item_ids):
            raise InputError("an item id of a history contains a NUL character: remove it")


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """One user's stored features."""

    row: NDArray[np.void]
    """Packed row [1]."""
    history: History
    written_at_ms: int
    """Time at which the features were true, milliseconds since 1970; 0 where nothing is stored."""


class FeatureLayout:
    """The packed row of one kind of entity under one schema, and the bytes of its store part."""

    def __init__(self, schema: records_pb2.FeatureSchema, kind: EntityKind) -> None:
        """Lay out the features of `kind` in schema order."""
        self.features: tuple[records_pb2.Feature, ...] = tuple(f for f in schema.features if f.entity == kind.number)
        self.by_name = {feature.name: feature for feature in self.features}
        self.schema_hash = schema_hash(schema)
        self.row_dtype = np.dtype(
            [
                (feature.name, "<f4") if feature.type == NUMERIC else (feature.name, "<u8", (feature.width,))
                for feature in self.features
            ]
        )
        self._record = np.dtype([("header", HEADER), ("row", self.row_dtype)])

    @cached_property
    def missing(self) -> NDArray[np.void]:
        """The row [1] of an entity without features."""
        row = np.zeros(1, dtype=self.row_dtype)
        for feature in self.features:
            if feature.type == NUMERIC:
                row[feature.name] = np.nan
        return row

    def row(self, values: Mapping[str, FeatureValue]) -> NDArray[np.void]:
        """Pack raw values into one row [1]; features without a value are missing.

        Raises:
            InputError: an unknown feature, a value of the wrong type, or more categories than the feature's width.
        """
        row = self.missing.copy()
        for name, value in values.items():
            feature = self.by_name.get(name)
            if feature is None:
                feature_names = ", ".join(self.by_name) or "none"
                raise InputError(f"feature {name!r} is not in the schema (known: {feature_names}): remove it")
            if value is not None:
                row[name] = self.pack(feature, value)
        return row

    def pack(self, feature: records_pb2.Feature, value: FeatureValue) -> NDArray:
        """Pack one value: a number as float32 [], categories as hashes uint64 [width].

        Raises:
            InputError: a value of the wrong type, or more categories than the feature's width.
        """
        if feature.type == NUMERIC:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"feature {feature.name!r} is numeric: send a number, not {value!r}")
            return np.asarray(value if abs(value) <= LARGEST_NUMBER else np.nan, dtype=np.float32)
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
            raise InputError(f"feature {feature.name!r} is categorical: send strings, not {value!r}")
        if len(strings) > feature.width:
            raise InputError(
                f"feature {feature.name!r} takes at most {feature.width} values, not {len(strings)}: send fewer"
            )
        hashes = np.zeros(feature.width, dtype=np.uint64)
        hashes[: len(strings)] = [hash_value(text) for text in strings]
        return hashes

    def encode(self, row: NDArray[np.void], *, written_at_ms: int, history: History | None = None) -> bytes:
        """The store part of one entity: header, row [1] and, for users, the history."""
        body = row.tobytes()
        if history is not None:
            count = np.uint32(len(history.item_ids)).tobytes()
            body += count + np.asarray(history.ratings, dtype="<f4").tobytes() + "\0".join(history.item_ids).encode()
        return Header(0, fingerprint(self.schema_hash), written_at_ms, NEVER).seal(body)

    def decode_user(self, blob: bytes | None) -> UserFeatures:
        """Decode one user's store part; None gives missing features and an empty history.

        Raises:
            IntegrityError: the record belongs to another schema or is damaged.
        """
        if blob is None:
            return UserFeatures(self.missing, History((), np.zeros(0, np.float32)), 0)
        header = read_header(blob)
        if header.fingerprint != fingerprint(self.schema_hash):
            raise IntegrityError(
                f"a user features record belongs to another schema than {self.schema_hash}: publish features again"
            )
        history_start = self._record.itemsize
        try:
            row = np.frombuffer(blob, dtype=self._record, count=1)["row"]
            count = int(np.frombuffer(blob, dtype="<u4", count=1, offset=history_start)[0])
            ratings = np.frombuffer(blob, dtype="<f4", count=count, offset=history_start + 4)
            ids = blob[history_start + 4 + 4 * count :].decode()
            history = History(tuple(ids.split("\0")) if count else (), ratings)
        except (ValueError, InputError) as error:
            raise IntegrityError(f"a user features record is corrupt ({error}): publish features again") from error
        return UserFeatures(row, history, header.written_at_ms)

    def decode_items(self, blobs: Sequence[bytes | None]) -> NDArray[np.void]:
        """Decode many items' store parts into rows [n] (writable); None gives a missing row.

        Raises:
            IntegrityError: the record belongs to another schema or is damaged.
        """
        present, records = decode_parts(blobs, self._record, self.schema_hash, "schema")
        rows = np.repeat(self.missing, len(blobs))
        rows[present] = records["row"]
        return rows


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Hashes of a vocabulary's values in ascending order, and the index of each."""

    hashes: NDArray[np.uint64]
    index: NDArray[np.int64]

    @staticmethod
    def of(values: Sequence[str]) -> "_Vocabulary":
        hashes = np.array([hash_value(value) for value in values], dtype=np.uint64)
        order = np.argsort(hashes)
        if len(hashes) > 1 and (np.diff(hashes[order]) == 0).any():
            raise IntegrityError("two values of one vocabulary have the same hash: rename one of them")
        return _Vocabulary(hashes[order], order + RESERVED)

    def lookup(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Index of each hash: PADDING for 0, UNKNOWN for a value that is not in the vocabulary."""
        indices = np.where(hashes == 0, PADDING, UNKNOWN).astype(np.int64)
        if len(self.hashes):
            nearest = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
            is_known = self.hashes[nearest] == hashes
            indices[is_known] = self.index[nearest[is_known]]
        return indices


class FeatureEncoder:
    """Turns packed rows and item ids into the indices and standardised numbers that one release's models read."""

    def __init__(
        self,
        schema: records_pb2.FeatureSchema,
        encodings: Sequence[records_pb2.FeatureEncoding],
        item_ids: Sequence[str],
    ) -> None:
        """Prepare look-ups; `item_ids[i]` has index i + RESERVED."""
        self.history_length = int(schema.history_length)
        self.item_index = {item: i + RESERVED for i, item in enumerate(item_ids)}
        self._encodings = {(e.entity, e.name): e for e in encodings}
        self._vocabularies = {
            (f.entity, f.name): _Vocabulary.of(self._encodings[f.entity, f.name].vocabulary)
            for f in schema.features
            if f.type != NUMERIC
        }

    def items(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Embedding index [n] of item ids; UNKNOWN for items that were not in the training data."""
        get = self.item_index.get
        return np.fromiter((get(item, UNKNOWN) for item in ids), dtype=np.int64, count=len(ids))

    def history(self, history: History) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Item indices [L] and rating buckets [L] of the last L events, right-padded with 0."""
        length = self.history_length
        items, ratings = np.zeros(length, np.int64), np.zeros(length, np.int64)
        recent = self.items(history.item_ids[-length:])
        items[: len(recent)] = recent
        ratings[: len(recent)] = rating_bucket(history.ratings[-length:])
        return items, ratings

    def rows(self, layout: FeatureLayout, rows: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
        """Model input of n packed rows.

        Returns:
            Category indices int64 [n, sum of widths], standardised numbers float32 [n, numeric features], and how many
            numbers were missing. A kind without categories, or without numbers, has one column of 0 instead.
        """
        categories: list[NDArray] = []
        numbers: list[NDArray] = []
        missing = 0
        for feature in layout.features:
            column = rows[feature.name]
            if feature.type == NUMERIC:
                encoding = self._encodings[feature.entity, feature.name]
                with np.errstate(over="ignore"):
                    standard = (column - encoding.mean) / encoding.scale
                absent = ~(np.abs(standard) <= MISSING_DEVIATIONS)
                missing += int(absent.sum())
                numbers.append(np.where(absent, 0.0, np.clip(standard, -CLIP_DEVIATIONS, CLIP_DEVIATIONS))[:, None])
            else:
                categories.append(self._vocabularies[feature.entity, feature.name].lookup(column))
        zero = np.zeros((len(rows), 1))
        return (
            np.concatenate(categories or [zero], axis=1).astype(np.int64),
            np.concatenate(numbers or [zero], axis=1).astype(np.float32),
            missing,
        )

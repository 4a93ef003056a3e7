"""Owns the gate for near-duplicates: it refuses a text that nearly repeats another entity's text.

Texts are compared by their shingles (every three words in a row), without each item's own titles: "X is a moving
film" could be written about any film. Candidate pairs come from MinHash signatures cut into bands (Broder, "On the
resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3), and are then compared exactly.
"""

import re
import zlib
from collections.abc import Callable, Hashable, Mapping, Set
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar_offline.check.gate_context import Subject
from kar_sidecar.entities import ITEM

__all__ = ["DUPLICATE", "near_duplicates"]

Key = TypeVar("Key", bound=Hashable)
DUPLICATE: Final = 0.4
"""Jaccard similarity of the shingles from which two texts are near-duplicates."""
SHINGLE: Final = 3
"""Number of words in a shingle."""
BANDS: Final = 32
ROWS: Final = 3
"""Number of hashes in a band.

Two texts of similarity s share a band with probability 1 - (1 - s^3)^32: 0.88 at 0.4, 0.99 at 0.5.
"""
MARGIN: Final = 0.15
"""How far an estimate from 96 hashes can lie below the similarity: three standard deviations."""
CHUNK: Final = 2048
"""Number of texts hashed at a time; bounds memory."""
PAIRS: Final = 65_536
"""Number of pairs of texts compared at a time; bounds memory."""
SEED: Final = 1
MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
WORD: Final = re.compile(r"\w+")
OWN_NAME: Final = " \0 "
"""Replaces an entity's own name."""


def near_duplicates(
    texts: Mapping[Key, str], subjects: Mapping[Key, Subject] | None = None, *, threshold: float = DUPLICATE
) -> dict[Key, tuple[Key, float]]:
    """Find the texts that nearly repeat an earlier text.

    This needs about 400 bytes per text besides the texts. Texts of fewer than three words are never duplicates.

    Args:
        texts: Texts by entity, in order: of two near-duplicates, the later one is refused.
        subjects: Facts about the entities. An item's own titles are not compared; titles in users' texts are.
        threshold: Jaccard similarity from which a text is a duplicate.

    Returns:
        For each entity with a refused text, the entity of the earlier text and the Jaccard similarity, in [0, 1].
    """
    keys = list(texts)

    def shingles(number: int) -> NDArray[np.uint64]:
        subject = subjects[keys[number]] if subjects else None
        return _shingles(texts[keys[number]], subject.titles if subject and subject.entity == ITEM else frozenset())

    duplicates = {}
    signatures, numbers = _signatures(shingles, len(keys))
    nearest, estimate = _nearest(signatures)
    for row in np.flatnonzero(estimate > max(threshold - MARGIN, 0)):
        later, earlier = int(numbers[row]), int(numbers[nearest[row]])
        similarity = _jaccard(shingles(later), shingles(earlier))
        if similarity >= threshold:
            duplicates[keys[later]] = (keys[earlier], similarity)
    return duplicates


def _shingles(text: str, names: Set[str]) -> NDArray[np.uint64]:
    """Hashes [S] of the distinct shingles of a text; S = 0 for a text of fewer words than a shingle."""
    line = f" {' '.join(WORD.findall(text.lower()))} "
    for name in sorted(names, key=len, reverse=True):
        line = line.replace(f" {name} ", OWN_NAME)
    words = np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in line.split()), np.uint64)
    if len(words) < SHINGLE:
        return words[:0]
    hashed = words[: len(words) - SHINGLE + 1].copy()
    for offset in range(1, SHINGLE):
        hashed = _mix(hashed * MULTIPLIER + words[offset : len(words) - SHINGLE + 1 + offset])
    return np.unique(hashed)


def _mix(hashed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all bits (the finaliser of SplitMix64)."""
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed ^ (hashed >> np.uint64(31))


def _signatures(
    shingles: Callable[[int], NDArray[np.uint64]], texts: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """MinHash signatures [N, BANDS * ROWS] of the texts that have shingles, and the numbers [N] of those texts."""
    random = np.random.default_rng(SEED)
    # h(x) = upper half of (a x + b) mod 2^64: universal enough for minima (Dietzfelbinger, 1996).
    a = random.integers(0, 2**63, BANDS * ROWS, np.uint64) * np.uint64(2) + np.uint64(1)
    b = random.integers(0, 2**63, BANDS * ROWS, np.uint64)
    signatures = np.empty((texts, len(a)), np.uint32)
    filled = np.zeros(texts, np.bool_)
    for start in range(0, texts, CHUNK):
        hashed = {number: shingles(number) for number in range(start, min(start + CHUNK, texts))}
        hashed = {number: text_hashes for number, text_hashes in hashed.items() if len(text_hashes)}
        if hashed:
            numbers = list(hashed)
            all_hashes = np.concatenate(list(hashed.values()))
            starts = np.cumsum([0, *(len(hashed[number]) for number in numbers[:-1])])
            for i in range(len(a)):
                minima = np.minimum.reduceat((all_hashes * a[i] + b[i]) >> np.uint64(32), starts)
                signatures[numbers, i] = minima.astype(np.uint32)
            filled[numbers] = True
    if filled.all():
        return signatures, np.arange(texts)
    return signatures[filled], np.flatnonzero(filled)


def _nearest(signatures: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each text [N] the most similar earlier text, and the estimated similarity (share of equal hashes).

    A text is compared with two of the texts that share a band with it: the first and the previous one.
    """
    count = len(signatures)
    nearest, estimate = np.zeros(count, np.int64), np.zeros(count, np.float32)
    for band in range(BANDS):
        rows = signatures[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        keys = rows[:, 0]
        for row in range(1, ROWS):
            keys = _mix(keys * MULTIPLIER + rows[:, row])
        order = np.argsort(keys, kind="stable")  # stable: equal keys keep the order of the texts
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        begins = np.ones(count, np.bool_)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        for others in (first[same], same - 1):
            for start in range(0, len(same), PAIRS):
                later, earlier = order[same[start : start + PAIRS]], order[others[start : start + PAIRS]]
                equal_share = (signatures[later] == signatures[earlier]).mean(axis=1, dtype=np.float32)
                better = equal_share > estimate[later]
                nearest[later[better]], estimate[later[better]] = earlier[better], equal_share[better]
    return nearest, estimate


def _jaccard(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> float:
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)

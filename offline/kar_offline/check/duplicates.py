"""Owns the gate for sets of texts: which of them say what another entity's text says already.

Texts are compared by their shingles, every few words in a row, with each item's own titles taken out: "X is a moving
film" is no text about X. Candidates come from MinHash signatures cut into bands (Broder, "On the resemblance and
containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3), and are then
compared exactly.
"""

import re
import zlib
from collections.abc import Callable, Hashable, Mapping, Set
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar_offline.check.gate_context import Subject

__all__ = ["DUPLICATE", "near_duplicates"]

Key = TypeVar("Key", bound=Hashable)
DUPLICATE: Final = 0.4
"""Share of shingles in common (Jaccard) from which two texts are one."""
SHINGLE: Final = 3
"""Words of a shingle."""
BANDS: Final = 32
ROWS: Final = 3
"""Hashes of a band. Two texts of similarity s share a band with probability 1 - (1 - s^3)^32: 0.88 at 0.4, 0.99 at 0.5.
"""
MARGIN: Final = 0.15
"""How far the estimate from 96 hashes may lie below the similarity: three standard deviations."""
CHUNK: Final = 2048
"""Texts that are hashed together; bounds memory."""
PAIRS: Final = 65_536
"""Pairs of texts that are compared together; bounds memory."""
SEED: Final = 1
ODD: Final = np.uint64(0x9E3779B97F4A7C15)
WORD: Final = re.compile(r"\w+")
NAME: Final = " \0 "
"""Stands for an entity's own name."""


def near_duplicates(
    texts: Mapping[Key, str], subjects: Mapping[Key, Subject] | None = None, *, threshold: float = DUPLICATE
) -> dict[Key, tuple[Key, float]]:
    """Texts that are nearly the same as an earlier one, with that one and their similarity (Jaccard, in [0, 1]).

    Beside the texts it needs about 400 bytes a text. Texts of fewer words than a shingle are never duplicates.

    Args:
        texts: By entity, in the order in which the first of two keeps its text.
        subjects: What is known of the entities. An item's own titles are not compared; a user's text lives by titles.
        threshold: Similarity from which a text is a duplicate.
    """
    keys = list(texts)

    def shingles(number: int) -> NDArray[np.uint64]:
        about = subjects[keys[number]] if subjects else None
        return _shingles(texts[keys[number]], about.titles if about and about.entity == "item" else frozenset())

    found = {}
    signatures, numbers = _signatures(shingles, len(keys))
    nearest, likeness = _nearest(signatures)
    for at in np.flatnonzero(likeness > max(threshold - MARGIN, 0)):
        later, earlier = int(numbers[at]), int(numbers[nearest[at]])
        similarity = _jaccard(shingles(later), shingles(earlier))
        if similarity >= threshold:
            found[keys[later]] = (keys[earlier], similarity)
    return found


def _shingles(text: str, names: Set[str]) -> NDArray[np.uint64]:
    """Hashes of the distinct shingles of a text [S], S = 0 for a text of fewer words than a shingle."""
    line = f" {' '.join(WORD.findall(text.lower()))} "
    for name in sorted(names, key=len, reverse=True):
        line = line.replace(f" {name} ", NAME)
    words = np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in line.split()), np.uint64)
    if len(words) < SHINGLE:
        return words[:0]
    hashed = words[: len(words) - SHINGLE + 1].copy()
    for at in range(1, SHINGLE):
        hashed = _mix(hashed * ODD + words[at : len(words) - SHINGLE + 1 + at])
    return np.unique(hashed)


def _mix(hashed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all (the finaliser of SplitMix64)."""
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed ^ (hashed >> np.uint64(31))


def _signatures(
    shingles: Callable[[int], NDArray[np.uint64]], texts: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """MinHash signatures [N, BANDS * ROWS] of the texts that have shingles, and those texts' numbers [N]."""
    random = np.random.default_rng(SEED)
    # h(x) = (a x + b) mod 2^64, of which the upper half is kept: universal enough for minima (Dietzfelbinger, 1996).
    a = random.integers(0, 2**63, BANDS * ROWS, np.uint64) * np.uint64(2) + np.uint64(1)
    b = random.integers(0, 2**63, BANDS * ROWS, np.uint64)
    signatures = np.empty((texts, len(a)), np.uint32)
    filled = np.zeros(texts, np.bool_)
    for start in range(0, texts, CHUNK):
        hashed = {number: shingles(number) for number in range(start, min(start + CHUNK, texts))}
        hashed = {number: found for number, found in hashed.items() if len(found)}
        if hashed:
            numbers = list(hashed)
            every = np.concatenate(list(hashed.values()))
            starts = np.cumsum([0, *(len(hashed[number]) for number in numbers[:-1])])
            for i in range(len(a)):
                minima = np.minimum.reduceat((every * a[i] + b[i]) >> np.uint64(32), starts)
                signatures[numbers, i] = minima.astype(np.uint32)
            filled[numbers] = True
    if filled.all():
        return signatures, np.arange(texts)
    return signatures[filled], np.flatnonzero(filled)


def _nearest(signatures: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each text [N], the earlier one that its signature is most like, and how like (share of equal hashes).

    Only texts that share a band are compared: of such, with the first and with the one before.
    """
    count = len(signatures)
    nearest, likeness = np.zeros(count, np.int64), np.zeros(count, np.float32)
    for band in range(BANDS):
        rows = signatures[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        keys = rows[:, 0]
        for row in range(1, ROWS):
            keys = _mix(keys * ODD + rows[:, row])
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the texts
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        begins = np.ones(count, np.bool_)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        for others in (first[same], same - 1):
            for start in range(0, len(same), PAIRS):
                later, earlier = order[same[start : start + PAIRS]], order[others[start : start + PAIRS]]
                alike = (signatures[later] == signatures[earlier]).mean(axis=1, dtype=np.float32)
                better = alike > likeness[later]
                nearest[later[better]], likeness[later[better]] = earlier[better], alike[better]
    return nearest, likeness


def _jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)

"""Owns collective knowledge: which prompts are asked when calls are fewer than entities, and who lends to whom.

Where a catalogue is too large to ask about each entity, entities that are alike share texts (the idea of collective
knowledge in REKI, Xi et al., arXiv 2408.10520). What is alike is told by cheap content vectors: the entity's own facts
through a text encoder.

    near-duplicates   almost equal vectors and almost the same words: they share the text of the first of them
    head              the entities with the most events ask their own prompts, with the share `HEAD` of the calls
    clusters          spherical k-means over the rest, one prompt a cluster; a cluster of one asks its own prompt
    loans             an entity without a text of its own borrows from the nearest entities of the head and clusters,
                      weighted by softmax(cosine to the entity, or to the cluster's centre, / TEMPERATURE)

The constants were chosen on users of one fold that do not test there; docs/results.md has what calls are worth. All of
it is deterministic on one machine, so a killed run that starts again asks the same prompts.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.knowledge.imputation import LENDERS, nearest_by_cosine, nearest_lenders, normalised
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError
from kar_sidecar.index import unit_rows
from kar_sidecar.index.faiss import faiss_threads

__all__ = ["HEAD", "PREFIX", "Clusters", "Plan", "cluster", "duplicates", "event_counts", "plan"]

HEAD: Final = 0.8
PREFIX: Final = "cluster/"
"""What ids of records about clusters begin with."""
SAME_COSINE: Final = 0.98
SAME_WORDS: Final = 0.95
"""Share of both texts' words that near-duplicates have in common."""
CANDIDATES: Final = 8
"""Neighbours of an entity that are looked at as near-duplicates."""
ITERATIONS: Final = 20
DIRECT: Final = 1024
"""More clusters than these are found in two steps: clusters, then clusters within each."""
WORD: Final = re.compile(r"\w+")


class Clusters(NamedTuple):
    """k clusters of n vectors, none of them empty."""

    centres: NDArray[np.float32]
    """[k, D] of unit length."""
    members: list[NDArray[np.int64]]
    """Rows of each, the nearest to the centre (the medoid) first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which prompts about n entities are asked, and whose texts stand for the others."""

    own: NDArray[np.int64]
    """Rows of the entities that are asked about by themselves, rising."""
    clusters: Mapping[str, NDArray[np.int64]]
    """By record id, such as "cluster/12", the rows that one prompt is about, the most typical first."""
    lender_ids: Sequence[str]
    """Ids of the records that lend: entities' or clusters'."""
    lenders: NDArray[np.int64]
    """[n, m] numbers in `lender_ids`, the nearest first."""
    weights: NDArray[np.float32]
    """[n, m] their shares; 0: none."""

    @property
    def calls(self) -> int:
        """How many prompts are asked."""
        return len(self.own) + len(self.clusters)

    def loans(self, row: int) -> list[records_pb2.Loan]:
        """What stands for an entity without a text, weights summing to 1; empty: nothing does.

        Entities that are asked about by themselves have loans too, of others: for the case that their own text is
        refused. Nothing is lent where there are calls for all.
        """
        pairs = zip(self.lenders[row].tolist(), self.weights[row].tolist(), strict=True)
        return [records_pb2.Loan(id=self.lender_ids[lender], weight=weight) for lender, weight in pairs if weight > 0]


def event_counts(dataset: Dataset) -> dict[str, NDArray[np.int64]]:
    """How many events there are of each item and user, by dataset row: those that prompts may show, no sample."""
    place = np.arange(len(dataset.event_item)) - dataset.offsets[dataset.event_user]
    shown = dataset.event_item[place < dataset.cutoff[dataset.event_user]]
    return {ITEM: np.bincount(shown, minlength=len(dataset.items)), USER: dataset.cutoff.astype(np.int64)}


def plan(
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    share: float,
    *,
    counts: NDArray[np.integer] | None = None,
    seed: int = 0,
    head: float = HEAD,
    lenders: int = LENDERS,
    threads: int = 1,
) -> Plan:
    """Share at most `share` x n calls among n entities of one kind.

    Near-duplicates share a text first. What remains asks for itself where the calls suffice, as with a share of 1;
    else there is a head and there are clusters.

    Args:
        ids: The entities' ids [n].
        texts: What the vectors were made of [n].
        vectors: Content vectors [n, D] of any length.
        share: Calls by entities, above 0 and at most 1; one call is made in any case.
        counts: How many events there are of each entity [n]; None: not known, so there are clusters alone.
        seed: Of k-means.
        head: Of the calls, those for the entities with the most events, each by itself.
        lenders: From how many records an entity borrows, at most.
        threads: Cores to use.

    Raises:
        InputError: `share` is out of range, or an id looks like a cluster's.
    """
    if not 0 < share <= 1:
        raise InputError(f"{share:g} is no share of calls: give one above 0 and at most 1")
    if taken := [id_ for id_ in ids if id_.startswith(PREFIX)]:
        raise InputError(f"the id {taken[0]!r} is one of a cluster: ids must not begin with {PREFIX!r}")
    count = len(ids)
    first = duplicates(vectors, texts, threads=threads)
    rows = np.flatnonzero(first == np.arange(count))
    calls = max(1, round(share * count))
    if calls >= len(rows):
        copies = (first != np.arange(count)).astype(np.float32)
        return Plan(rows, {}, ids, first[:, None], copies[:, None])

    events = np.bincount(first, counts, count) if counts is not None else np.zeros(count)
    most = min(int(head * calls), calls - 1) if counts is not None else 0
    often = rows[np.argsort(-events[rows], kind="stable")][:most]
    rest = np.setdiff1d(rows, often)
    found = cluster(vectors[rest], calls - most, seed=seed, threads=threads)
    members = [rest[at] for at in found.members]
    lender_ids = [ids[row] for row in often]
    # By row, the number of the lender that is the entity itself, or its near-duplicate; -1 where there is none.
    itself = np.full(count, -1)
    itself[often] = np.arange(most)
    clusters = {}
    for number, at in enumerate(members):
        if len(at) == 1:
            itself[at] = most + number
            lender_ids.append(ids[at[0]])
        else:
            clusters[f"{PREFIX}{number}"] = at
            lender_ids.append(f"{PREFIX}{number}")
    itself = itself[first]

    nearest, weights = nearest_lenders(
        vectors[first], np.concatenate([unit_rows(vectors[often]), found.centres]), lenders, threads
    )
    own = np.flatnonzero((itself >= 0) & (first == np.arange(count)))
    weights[own] = normalised(np.where(nearest[own] == itself[own, None], 0, weights[own]))
    copies = np.flatnonzero((itself >= 0) & (first != np.arange(count)))
    nearest[copies, 0] = itself[copies]
    weights[copies] = np.eye(1, weights.shape[1])
    return Plan(own, clusters, lender_ids, nearest, weights)


def duplicates(vectors: NDArray[np.float32], texts: Sequence[str], *, threads: int = 1) -> NDArray[np.int64]:
    """For each of n entities the row [n] of the first of its near-duplicates: its own where there is none before.

    Two entities are near-duplicates when their vectors [n, D] have a cosine of `SAME_COSINE` and their texts are made
    of nearly the same words, whatever their order and case, and of the very same numbers: a sequel is another film.
    So are those that a chain of near-duplicates connects.
    """
    first = np.arange(len(texts))
    if len(texts) < 2:
        return first
    rows = unit_rows(vectors)
    with faiss_threads(threads) as faiss:
        cosine, found = nearest_by_cosine(faiss, rows, rows, CANDIDATES + 1)
    near, column = np.nonzero((cosine >= SAME_COSINE) & (found >= 0))
    pairs = np.sort(np.stack([near, found[near, column]], 1), 1)
    for one, other in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
        if _same(texts[one], texts[other]):
            low, high = sorted((_root(first, one), _root(first, other)))
            first[high] = low
    return np.array([_root(first, row) for row in range(len(first))], dtype=np.int64)


def _root(first: NDArray[np.int64], row: int) -> int:
    while first[row] != row:
        first[row] = first[first[row]]
        row = int(first[row])
    return row


def _same(one: str, other: str) -> bool:
    """Whether two texts are made of nearly the same words and of the same numbers."""
    a, b = (Counter(WORD.findall(text.casefold())) for text in (one, other))
    differing = list(((a - b) + (b - a)).elements())
    return len(differing) <= (1 - SAME_WORDS) * (a.total() + b.total()) and not any(
        character.isdigit() for word in differing for character in word
    )


def cluster(vectors: NDArray[np.float32], calls: int, *, seed: int = 0, threads: int = 1) -> Clusters:
    """Put n vectors [n, D] of any length into at most `calls` clusters by the cosine: fewer where vectors are equal.

    With as many calls as vectors each is a cluster of its own.

    Args:
        vectors: Content vectors.
        calls: At least 1.
        seed: Of the first centres.
        threads: Cores to use.
    """
    rows = unit_rows(vectors)
    if calls >= len(rows):
        return Clusters(rows, list(np.arange(len(rows))[:, None]))
    with faiss_threads(threads) as faiss:
        centres = _centres(faiss, rows, calls, seed)
        cosine, nearest = (found[:, 0] for found in nearest_by_cosine(faiss, centres, rows, 1))
    order = np.lexsort((-cosine, nearest))
    members = np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1)
    return Clusters(centres[[nearest[rows_of[0]] for rows_of in members]], members)


def _centres(faiss: Any, rows: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    """k unit centres [k, D] of unit vectors [n, D], n > k."""
    if k <= DIRECT:
        return _k_means(faiss, rows, k, seed)
    # One step takes n x k products, two take n x 2 x sqrt(k): a million vectors would need hours instead of minutes.
    coarse = _k_means(faiss, rows, isqrt(k), seed)
    part = nearest_by_cosine(faiss, coarse, rows, 1)[1][:, 0]
    sizes = np.bincount(part, minlength=len(coarse))
    quotas = np.diff(np.cumsum(sizes) * k // len(rows), prepend=0)
    order = np.argsort(part, kind="stable")
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return np.concatenate(
        [_k_means(faiss, rows[at], quota, seed) for at, quota in zip(parts, quotas.tolist(), strict=True) if quota]
    )


def _k_means(faiss: Any, rows: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    # FAISS warns of few points a cluster, which is what is asked for here.
    found = faiss.Kmeans(rows.shape[1], k, niter=ITERATIONS, spherical=True, seed=seed, min_points_per_centroid=1)
    found.train(rows)
    centres: NDArray[np.float32] = found.centroids
    return centres

"""Owns collective knowledge: which prompts are asked when there are fewer calls than entities.

In a catalogue that is too large to ask about each entity, similar entities share texts (the idea of collective
knowledge in REKI, Xi et al., arXiv 2408.10520). Similarity is the cosine of content vectors: each entity's own facts
through a text encoder.

    near-duplicates   almost equal vectors and almost the same words: they share the text of the first of them
    head              the entities with the most events; they get the share `HEAD` of the calls, one prompt each
    clusters          spherical k-means over the rest, one prompt a cluster; a cluster of one has its own prompt
    imputation        an entity without a text of its own gets a vector from its nearest neighbours among the head and
                      the clusters, by its cosine to the entity or to the cluster's centre

The constants were chosen on users of one fold that are not its test users; docs/results.md has the quality by calls.
Results are deterministic on one machine, so a killed run that starts again asks the same prompts.
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
from kar_offline.knowledge.imputation import NEIGHBOURS, nearest_by_cosine, neighbour_weights, normalised
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError
from kar_sidecar.index import unit_rows
from kar_sidecar.index.library import faiss_threads

__all__ = ["CLUSTER_PREFIX", "HEAD", "CallPlan", "Clusters", "cluster", "duplicates", "event_counts", "plan_calls"]

HEAD: Final = 0.8
CLUSTER_PREFIX: Final = "cluster/"
"""First characters of the ids of records about clusters."""
SAME_COSINE: Final = 0.98
SAME_WORDS: Final = 0.95
"""Share of both texts' words that near-duplicates have in common."""
CANDIDATES: Final = 8
"""Number of an entity's neighbours that are compared with it as possible near-duplicates."""
ITERATIONS: Final = 20
DIRECT: Final = 1024
"""Above this number of clusters, k-means runs in two steps: coarse clusters, then clusters within each."""
WORD: Final = re.compile(r"\w+")


class Clusters(NamedTuple):
    """k clusters of n vectors, none of them empty."""

    centres: NDArray[np.float32]
    """[k, D] of unit length."""
    members: list[NDArray[np.int64]]
    """The rows of each cluster; the row nearest to the centre (the medoid) comes first."""


@dataclass(frozen=True, slots=True)
class CallPlan:
    """Which prompts about n entities are asked, and from which records the other entities' vectors are imputed."""

    own: NDArray[np.int64]
    """Rows of the entities with a prompt of their own, ascending."""
    clusters: Mapping[str, NDArray[np.int64]]
    """Rows that one prompt is about, by record id such as "cluster/12"; the most typical row first."""
    record_ids: Sequence[str]
    """Ids of the records that can be neighbours: entities' or clusters'."""
    neighbours: NDArray[np.int64]
    """[n, m] indices into `record_ids`, the nearest first."""
    weights: NDArray[np.float32]
    """[n, m] weights of the neighbours; 0: no neighbour."""

    @property
    def calls(self) -> int:
        """Number of prompts that are asked."""
        return len(self.own) + len(self.clusters)

    def neighbour_weights(self, row: int) -> list[records_pb2.Loan]:
        """The records from which an entity's vector is imputed, with weights that sum to 1; empty if there are none.

        An entity with a prompt of its own has neighbours too, in case its text is refused. If the calls suffice for all
        entities, only near-duplicates have a neighbour.
        """
        pairs = zip(self.neighbours[row].tolist(), self.weights[row].tolist(), strict=True)
        return [records_pb2.Loan(id=self.record_ids[record], weight=weight) for record, weight in pairs if weight > 0]


def event_counts(dataset: Dataset) -> dict[EntityKind, NDArray[np.int64]]:
    """The number of events of each item and user that prompts may show, by dataset row."""
    position = np.arange(len(dataset.event_item)) - dataset.offsets[dataset.event_user]
    shown_items = dataset.event_item[position < dataset.cutoff[dataset.event_user]]
    return {ITEM: np.bincount(shown_items, minlength=len(dataset.items)), USER: dataset.cutoff.astype(np.int64)}


def plan_calls(
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    share: float,
    *,
    counts: NDArray[np.integer] | None = None,
    seed: int = 0,
    head: float = HEAD,
    neighbours: int = NEIGHBOURS,
    threads: int = 1,
) -> CallPlan:
    """Share at most `share` x n calls among n entities of one kind.

    First, near-duplicates share a text. If the calls suffice for the remaining entities, as with a share of 1, each of
    them gets its own prompt; otherwise they are divided into a head and clusters.

    Args:
        ids: The entities' ids [n].
        texts: The texts that the vectors were made of [n].
        vectors: Content vectors [n, D] of any length.
        share: Number of calls divided by number of entities, above 0 and at most 1; at least one call is made.
        counts: The number of events of each entity [n]; None: not known, so there is no head.
        seed: Seed of k-means.
        head: Share of the calls for the entities with the most events, one call each.
        neighbours: Largest number of records from which a vector is imputed.
        threads: Cores to use.

    Raises:
        InputError: `share` is out of range, or an id looks like a cluster's.
    """
    if not 0 < share <= 1:
        raise InputError(f"{share:g} is no share of calls: give one above 0 and at most 1")
    if reserved := [id_ for id_ in ids if id_.startswith(CLUSTER_PREFIX)]:
        raise InputError(f"the id {reserved[0]!r} is one of a cluster: ids must not begin with {CLUSTER_PREFIX!r}")
    count = len(ids)
    first = duplicates(vectors, texts, threads=threads)  # (n,) the row whose text an entity shares
    is_copy = first != np.arange(count)
    distinct = np.flatnonzero(~is_copy)
    calls = max(1, round(share * count))
    if calls >= len(distinct):
        return CallPlan(distinct, {}, ids, first[:, None], is_copy.astype(np.float32)[:, None])

    head_calls = min(int(head * calls), calls - 1) if counts is not None else 0
    events = np.bincount(first, counts, count) if counts is not None else np.zeros(count)
    head_rows = distinct[np.argsort(-events[distinct], kind="stable")][:head_calls]
    rest = np.setdiff1d(distinct, head_rows)
    clustering = cluster(vectors[rest], calls - head_calls, seed=seed, threads=threads)

    record_ids = [ids[row] for row in head_rows]
    own_record = np.full(count, -1)  # (n,) index into `record_ids` of the entity's own text; -1: it has none
    own_record[head_rows] = np.arange(head_calls)
    clusters = {}
    for number, members in enumerate(rest[rows] for rows in clustering.members):
        if len(members) == 1:
            own_record[members] = head_calls + number
            record_ids.append(ids[members[0]])
        else:
            clusters[f"{CLUSTER_PREFIX}{number}"] = members
            record_ids.append(f"{CLUSTER_PREFIX}{number}")
    own_record = own_record[first]

    record_vectors = np.concatenate([unit_rows(vectors[head_rows]), clustering.centres])
    nearest, weights = neighbour_weights(vectors[first], record_vectors, neighbours, threads=threads)
    own = np.flatnonzero((own_record >= 0) & ~is_copy)
    # An entity is not its own neighbour. A near-duplicate of an entity with its own text uses that text alone.
    weights[own] = normalised(np.where(nearest[own] == own_record[own, None], 0, weights[own]))
    copies = np.flatnonzero((own_record >= 0) & is_copy)
    nearest[copies, 0] = own_record[copies]
    weights[copies] = np.eye(1, weights.shape[1])
    return CallPlan(own, clusters, record_ids, nearest, weights)


def duplicates(vectors: NDArray[np.float32], texts: Sequence[str], *, threads: int = 1) -> NDArray[np.int64]:
    """For each of n entities the row [n] of its first near-duplicate; its own row where no earlier one exists.

    Two entities are near-duplicates when their vectors [n, D] have a cosine of at least `SAME_COSINE` and their texts
    have nearly the same words, in any order and case, and exactly the same numbers: a sequel is another film. A chain
    of near-duplicates is one group.
    """
    first = np.arange(len(texts))
    if len(texts) < 2:
        return first
    rows = unit_rows(vectors)
    with faiss_threads(threads) as faiss:
        cosine, nearest = nearest_by_cosine(faiss, rows, rows, CANDIDATES + 1)
    row, column = np.nonzero((cosine >= SAME_COSINE) & (nearest >= 0))
    pairs = np.sort(np.stack([row, nearest[row, column]], 1), 1)  # (pairs, 2)
    for left, right in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
        if _same_words(texts[left], texts[right]):
            low, high = sorted((_root(first, left), _root(first, right)))
            first[high] = low
    return np.array([_root(first, row) for row in range(len(first))], dtype=np.int64)


def _root(first: NDArray[np.int64], row: int) -> int:
    while first[row] != row:
        first[row] = first[first[row]]
        row = int(first[row])
    return row


def _same_words(left: str, right: str) -> bool:
    """Whether two texts have nearly the same words and the same numbers."""
    left_words, right_words = (Counter(WORD.findall(text.casefold())) for text in (left, right))
    differing = list(((left_words - right_words) + (right_words - left_words)).elements())
    return len(differing) <= (1 - SAME_WORDS) * (left_words.total() + right_words.total()) and not any(
        character.isdigit() for word in differing for character in word
    )


def cluster(vectors: NDArray[np.float32], calls: int, *, seed: int = 0, threads: int = 1) -> Clusters:
    """Put n vectors [n, D] of any length into at most `calls` clusters by cosine; equal vectors can make fewer.

    With at least as many calls as vectors, each vector is a cluster of its own.

    Args:
        vectors: Content vectors.
        calls: Largest number of clusters, at least 1.
        seed: Seed of the first centres.
        threads: Cores to use.
    """
    rows = unit_rows(vectors)
    if calls >= len(rows):
        return Clusters(rows, list(np.arange(len(rows))[:, None]))
    with faiss_threads(threads) as faiss:
        centres = _centres(faiss, rows, calls, seed)
        cosine, nearest = (column[:, 0] for column in nearest_by_cosine(faiss, centres, rows, 1))
    order = np.lexsort((-cosine, nearest))
    members = np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1)
    return Clusters(centres[[nearest[cluster_rows[0]] for cluster_rows in members]], members)


def _centres(faiss: Any, rows: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    """k unit centres [k, D] of unit vectors [n, D], n > k."""
    if k <= DIRECT:
        return _k_means(faiss, rows, k, seed)
    # One step takes n x k products, two steps n x 2 x sqrt(k): for a million vectors minutes instead of hours.
    coarse = _k_means(faiss, rows, isqrt(k), seed)
    part = nearest_by_cosine(faiss, coarse, rows, 1)[1][:, 0]
    sizes = np.bincount(part, minlength=len(coarse))
    quotas = np.diff(np.cumsum(sizes) * k // len(rows), prepend=0)
    order = np.argsort(part, kind="stable")
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return np.concatenate(
        [
            _k_means(faiss, rows[part_rows], quota, seed)
            for part_rows, quota in zip(parts, quotas.tolist(), strict=True)
            if quota
        ]
    )


def _k_means(faiss: Any, rows: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    # Clusters of few points are intended here; by default FAISS warns about them.
    k_means = faiss.Kmeans(rows.shape[1], k, niter=ITERATIONS, spherical=True, seed=seed, min_points_per_centroid=1)
    k_means.train(rows)
    centres: NDArray[np.float32] = k_means.centroids
    return centres

"""Owns knowledge for entities that have none when a release is made: the nearest that know lend theirs.

Nearest by content, the entities' own facts through a text encoder; weighted by softmax(cosine / temperature), as the
loans of collective knowledge are.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_kernels import Tower
from kar_offline.dataset.samples import Dataset, Entity
from kar_offline.encode.stage import lend, lent_ids
from kar_offline.generate.collective import LENDERS, TEMPERATURE
from kar_offline.generate.collective import borrow as nearest_lenders
from kar_offline.train.arms import Texts
from kar_offline.train.given import TEXT, AffinityInput, Components
from kar_offline.train.vectors import TextVectors, load_text_vectors
from kar_sidecar.index import unit_rows

__all__ = ["Lent", "borrow", "lend_by_content"]

KINDS: Final[tuple[Tower, ...]] = ("user", "item")
CHUNK: Final = 4096
"""Borrowers whose lenders' vectors are in memory together."""


def borrow(
    content: NDArray[np.float32],
    knows: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    *,
    lenders: int = LENDERS,
    temperature: float = TEMPERATURE,
    threads: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Have those of n entities that know nothing borrow from the nearest that do.

    Args:
        content: Content vectors [n, D] of any length; a row of zeros has no content, lends nothing and borrows nothing.
        knows: [n] whether an entity has knowledge.
        vectors: Knowledge vectors [n, D2]; rows of those that know nothing do not matter.
        lenders: From how many an entity borrows, at most.
        temperature: Of the softmax over cosines.
        threads: Cores that search.

    Returns:
        Knowledge vectors [n, D2], lent ones of unit length, and [n] which are lent.
    """
    found = np.array(vectors, dtype=np.float32)
    has_content = np.any(content, axis=1)
    able = np.flatnonzero(knows & has_content)
    lent = ~knows & has_content & bool(len(able))
    rows = np.flatnonzero(lent)
    if not len(rows):
        return found, lent
    at, known = unit_rows(content[able]), found[able]
    for some in np.split(rows, range(CHUNK, len(rows), CHUNK)):
        nearest, weights = nearest_lenders(content[some], at, lenders, threads, temperature)
        found[some] = lend(known[nearest], weights)
    return found, lent


@dataclass(frozen=True, slots=True)
class Lent:
    """What a release serves: an arm's vectors, with those of entities that borrow."""

    texts: TextVectors
    affinity: AffinityInput | None
    ids: dict[Tower, frozenset[str]]
    """Whose vector is lent, by loans of collective knowledge or by content."""


def lend_by_content(
    encodings: Path, dataset: Dataset, source: Texts, texts: TextVectors, affinity: AffinityInput | None
) -> Lent:
    """Lend vectors to the entities that have facts but no text, and affinity vectors made of them to the items.

    Training does not see what is lent here.

    Args:
        encodings: Folder of the encoding stage, whose raw texts are the content; without them nothing is lent.
        dataset: The dataset.
        source: Which texts `texts` are of.
        texts: An arm's vectors.
        affinity: What the trained model reads of items.

    Raises:
        IntegrityError: the encodings are corrupt or of another dataset.
    """
    loans: dict[Tower, frozenset[str]] = {kind: frozenset(lent_ids(encodings, source, kind)) for kind in KINDS}
    if not all((encodings / f"raw_{kind}.json").is_file() for kind in KINDS):
        return Lent(texts, affinity, loans)
    content = load_text_vectors(encodings, "raw", dataset)
    user, user_lent = _lent(content.user, texts.user, texts.user_present, dataset.users, loans["user"])
    item, item_lent = _lent(content.item, texts.item, texts.item_present, dataset.items, loans["item"])
    ids: dict[Tower, frozenset[str]] = {
        "user": loans["user"] | {dataset.users[row].id for row in user_lent.nonzero().flatten().tolist()},
        "item": loans["item"] | {dataset.items[row].id for row in item_lent.nonzero().flatten().tolist()},
    }
    served = replace(
        texts,
        user=user,
        user_present=texts.user_present | user_lent,
        item=item,
        item_present=texts.item_present | item_lent,
    )
    if affinity is not None and item_lent.any():
        affinity = _with_text(affinity, texts.item[texts.item_present], item, item_lent)
    return Lent(served, affinity, ids)


def _lent(
    content: Tensor, vectors: Tensor, present: Tensor, entities: Sequence[Entity], loans: Collection[str]
) -> tuple[Tensor, Tensor]:
    """Vectors of one kind with what is lent, and which rows are. Entities that borrow themselves lend to nobody."""
    own = np.array([entity.id not in loans for entity in entities], dtype=np.bool_)
    some = np.flatnonzero(own | ~present.numpy())
    found, lent = borrow(content.numpy()[some], present.numpy()[some], vectors.numpy()[some])
    rows = torch.zeros(len(vectors), dtype=torch.bool)
    rows[some[lent]] = True
    with_lent = vectors.clone()
    with_lent[rows] = torch.from_numpy(found[lent])
    return with_lent, rows


def _with_text(affinity: AffinityInput, known: Tensor, items: Tensor, lent: Tensor) -> AffinityInput:
    """Affinity vectors whose segment of texts comes, for items with a lent vector, from it: as if it were their own."""
    vectors, start = affinity.vectors.clone(), 0
    for name, width in affinity.segments:
        if name == TEXT:
            vectors[lent, start : start + width] = Components.of(known, width).project(items[lent])
        start += width
    return replace(affinity, vectors=vectors)
